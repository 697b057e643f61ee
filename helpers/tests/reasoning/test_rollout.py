"""Answers to Countdown, their log-probabilities, and what they show."""

import math
import random
from dataclasses import replace

from helpers.reasoning.countdown import VOCABULARY, Problem, problems, tokenizer
from helpers.reasoning.rollout import (
    Rollout,
    measure,
    micro_batches,
    prompt_ids,
    roll_out_prompts,
    rollout,
    sampled,
    token_log_probs,
)
from helpers.tests.builders import draw
from helpers.tests.reasoning.small_models import (
    CONFIG,
    KINDS,
    any_model,
    generator,
    ids_of,
    logits_of,
)
from helpers.training.corpus import END

import pytest
import torch

ASKED = Problem((2, 6, 9, 1), 21)
PROMPT = 9  # tokens of a question of Countdown


@pytest.fixture(autouse=True)
def one(one_thread):
    """All models here are too small for more."""


def chosen(logits, tokens):
    return logits.log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)


# --------------------------------------------------------------------------- rollouts


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_a_rollout_has_the_texts_and_lengths_of_what_was_drawn(kind, temperature):
    model = any_model(kind)
    if kind == "v3":
        model.lm_head.weight.data[END] *= 1.2
    n = 30
    asked = problems("train", 40, 3)
    answers = rollout(model, asked, n, generator(), temperature)
    tokens = answers.tokens
    assert answers.prompt == PROMPT
    assert answers.prompt_lengths.tolist() == [PROMPT] * 40
    assert answers.log_probs.shape == (40, tokens.shape[1] - PROMPT)
    assert answers.log_probs.shape[1] <= n

    early = 0
    cut_off = 0
    for i, problem in enumerate(asked):
        row = tokens[i].tolist()
        length = int(answers.lengths[i])
        assert row[:PROMPT] == ids_of(problem.prompt)
        answer = row[PROMPT:]
        ended = END in answer
        assert length == (answer.index(END) + 1 if ended else n)
        assert set(answer[length:]) <= {END}
        assert (answers.log_probs[i, length:] == 0).all()
        words = [VOCABULARY[token] for token in answer[:length] if token != END]
        assert answers.texts[i].split() == words
        early += ended and length < n
        cut_off += not ended
    if temperature > 0:
        assert early > 0
        assert cut_off > 0


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_those_of_the_whole_model_row_by_row(kind, temperature):
    model = any_model(kind)
    asked = problems("train", 40, 3)
    answers = rollout(model, asked, 30, generator(), temperature)
    tokens = answers.tokens
    inside = torch.arange(answers.log_probs.shape[1]) < answers.lengths[:, None]
    with torch.no_grad():
        again = token_log_probs(model, tokens, PROMPT)
    logits = torch.cat([logits_of(model, row[None, :-1]) for row in tokens])
    plain = chosen(logits, tokens[:, 1:])[:, PROMPT - 1 :]
    assert ((answers.log_probs - again).abs() * inside).max() < 1e-4
    assert torch.allclose(again, plain, atol=1e-4)
    if temperature == 0:
        largest = logits.log_softmax(dim=-1).amax(dim=-1)[:, PROMPT - 1 :]
        assert (plain[inside] == largest[inside]).float().mean() > 0.98
    # training may use them
    assert not answers.log_probs.is_inference()
    assert not tokens.is_inference()


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_rollout_is_drawn_from_its_generator_alone(kind, temperature):
    model = any_model(kind)
    asked = problems("train", 40, 3)
    state = torch.random.get_rng_state()
    first = rollout(model, asked, 30, generator(), temperature)
    same = rollout(model, asked, 30, generator(), temperature)
    other = rollout(model, asked, 30, generator(1), temperature)
    assert torch.equal(state, torch.random.get_rng_state())
    assert same.texts == first.texts
    assert torch.equal(same.log_probs, first.log_probs)
    assert (other.texts == first.texts) == (temperature == 0)


@pytest.mark.slow
@KINDS
def test_a_rollout_draws_from_the_models_distribution(kind):
    model = any_model(kind)
    n = 3000
    first = rollout(model, [ASKED] * n, 1, generator(4)).tokens[:, -1]
    prompt = torch.tensor([ids_of(ASKED.prompt)])
    p = logits_of(model, prompt)[0, -1].softmax(dim=-1)
    share = torch.bincount(first, minlength=len(p)) / n
    assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-3).all()
    assert len(first.unique()) > 50, "no truncation to the best 50 tokens"


@pytest.mark.slow
@KINDS
def test_many_are_sampled_in_parts_and_filled_up(kind):
    model = any_model(kind)
    asked = problems("train", 520, 3)
    many = sampled(model, asked, 5, seed=7)
    g = generator(7)
    parts = [rollout(model, asked[:512], 5, g), rollout(model, asked[512:], 5, g)]
    assert many.tokens.shape == (520, 14)
    assert many.log_probs.shape == (520, 5)
    assert many.texts == parts[0].texts + parts[1].texts
    assert torch.equal(many.lengths, torch.cat([p.lengths for p in parts]))
    for got, part in zip(many.tokens.split((512, 8)), parts, strict=True):
        width = part.tokens.shape[1]
        assert torch.equal(got[:, :width], part.tokens)
        assert (got[:, width:] == END).all()
    cut_off = (many.tokens[:, -1] != END).float().mean().item()
    assert measure(asked, many)["cut_off"] == pytest.approx(cut_off)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompts": []}, "prompts="),
        ({"prompts": [[1, 2], []]}, "prompts="),
        ({"max_new_tokens": 0}, "max_new_tokens="),
        ({"max_new_tokens": 2.5}, "max_new_tokens="),
        ({"temperature": -1.0}, "temperature="),
        ({"temperature": math.nan}, "temperature="),
        ({"max_new_tokens": 95}, "max_position_embeddings"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_named(change, named):
    arguments = {
        "prompts": [[1, 2], [3]],
        "max_new_tokens": 3,
        "end": END,
        "decode": str,
        "generator": generator(),
    }
    with pytest.raises(ValueError, match=named):
        roll_out_prompts(draw(CONFIG), **(arguments | change))


def test_no_problems_are_named():
    with pytest.raises(ValueError, match="problems="):
        sampled(draw(CONFIG), [], 5)


# ------------------------------------------------------------------ log-probabilities


@KINDS
def test_log_probs_have_gradients(kind):
    model = any_model(kind)
    tokens = rollout(model, [ASKED] * 3, 5, generator()).tokens
    token_log_probs(model, tokens, PROMPT).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("mtp."):
            assert parameter.grad is None
        else:
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("limit", [1, 50, 4096])
def test_micro_batches_hold_every_row_once_and_few_padded_tokens(limit):
    rng = random.Random(0)
    lengths = torch.tensor([rng.randint(1, 200) for _ in range(97)])
    parts = micro_batches(lengths, limit)
    assert sorted(torch.cat(parts).tolist()) == list(range(97))
    longest = [int(lengths[part].max()) for part in parts]
    for part, length in zip(parts, longest, strict=True):
        assert len(part) == 1 or len(part) * length <= limit
    assert longest == sorted(longest, reverse=True)
    if limit == 4096:
        assert len(parts) <= 1 + 2 * int(lengths.sum()) / limit
    assert micro_batches(torch.tensor([], dtype=torch.long)) == []


# ---------------------------------------------------------------------------- measure


def rollout_of(texts, width, ended):
    """A Rollout of given answers, all of `width` tokens."""
    words = tokenizer()
    rows = []
    lengths = []
    for text, end in zip(texts, ended, strict=True):
        row = words.encode(text).ids + [END] * end
        lengths.append(len(row))
        rows.append([5] * PROMPT + row + [END] * (width - len(row)))
    return Rollout(
        torch.tensor(rows),
        torch.zeros(len(rows), width),
        torch.tensor(lengths),
        texts,
        torch.full((len(rows),), PROMPT),
    )


RIGHT = (
    "<think> try 2 * 6 check 21 right wait wait </think> "
    "<answer> 2 * 6 + 9 * 1 </answer>"
)


def test_measure_by_hand():
    width = len(RIGHT.split()) + 1
    # a third of the second one is Spanish; the last one is cut off
    mixed = "<think> try prueba check </think> <answer> 2 + 6 + 9 + 1 </answer>"
    cut = "prueba espera revisa bien" + " 2" * (width - 4)
    texts = [RIGHT, mixed, "2 2 2", cut]
    spanish = replace(ASKED, language="es")
    asked = [ASKED, ASKED, spanish, spanish]
    seen = measure(asked, rollout_of(texts, width, [1, 1, 1, 0]))

    lengths = [len(text.split()) + 1 for text in texts[:3]]
    assert seen == pytest.approx(
        {
            "accuracy": 1 / 4,
            "format": 2 / 4,
            "readable": 0,
            "tries": (1 + 2 + 0 + 1) / 4,
            "verify": 3 / 4,
            "waits": (2 + 0 + 0 + 1) / 4,
            "mixed": 1 / 4,
            "consistency": (1 + 2 / 3 + 1) / 3,
            "consistency_en": (1 + 2 / 3) / 2,
            "consistency_es": 1,
            "length": (sum(lengths) + width) / 4,
            "cut_off": 1 / 4,
        }
    )


def test_measure_of_those_who_say_nothing_and_of_other_operators():
    spanish = replace(ASKED, language="es")
    nobody = measure([spanish], rollout_of(["2 2 2"], 4, [1]))
    for name in ("consistency", "consistency_en", "consistency_es"):
        assert math.isnan(nobody[name])
    assert nobody["cut_off"] == 0
    width = len(RIGHT.split()) + 1
    assert measure([ASKED], rollout_of([RIGHT], width, [1]), "+-")["accuracy"] == 0


def test_a_prompt_starts_like_a_document():
    assert prompt_ids(tokenizer(), ASKED.prompt) == ids_of(ASKED.prompt)
    assert len(prompt_ids(tokenizer(), ASKED.prompt)) == PROMPT
