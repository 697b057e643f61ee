"""Rollouts of prompts of any length, written by any tokenizer."""

import random

from helpers.reasoning import rollout as module
from helpers.reasoning.countdown import VOCABULARY, problems
from helpers.reasoning.rollout import (
    answer_log_probs,
    roll_out_prompts,
    rollout,
    token_log_probs,
)
from helpers.tests.builders import YARN, draw
from helpers.tests.reasoning.small_models import (
    CONFIG,
    DENSE,
    KINDS,
    any_model,
    dense,
    generator,
    record,
)

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

PROMPT = 9  # tokens of a question of Countdown


@pytest.fixture(autouse=True)
def one(one_thread):
    """All models here are too small for more."""


def ragged_model(kind):
    if kind == "v3 with yarn":
        return draw(CONFIG.with_(rope_scaling=YARN))
    if kind == "gpt2":
        # its positions are learnt, so a row that is moved must say so
        torch.manual_seed(0)
        sizes = {"vocab_size": len(VOCABULARY), "n_embd": 32, "n_layer": 2, "n_head": 4}
        config = GPT2Config(n_positions=96, initializer_range=0.3, **sizes)
        return GPT2LMHeadModel(config).eval()
    return any_model(kind)


RAGGED = pytest.mark.parametrize(
    "kind", ["v3", "v3 with yarn", "llama", "qwen2", "gpt2"]
)
STOP = 7  # another end token than Countdown's


def ragged_prompts():
    rng = random.Random(4)
    lengths = [1, 2, 5, 9, 9, 17, 30, 3]
    return [[rng.randrange(1, len(VOCABULARY)) for _ in range(n)] for n in lengths]


def spoken(ids):
    return "-".join(map(str, ids))


def greedy(model, prompts):
    return roll_out_prompts(model, prompts, 20, STOP, spoken, generator(), 0.0)


@pytest.mark.slow
@RAGGED
def test_prompts_of_any_length_are_answered_as_each_alone(kind):
    model = ragged_model(kind)
    model.lm_head.weight.data[STOP] *= 2
    prompts = ragged_prompts()
    together = greedy(model, prompts)
    assert together.prompt == 30
    assert together.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    for i, prompt in enumerate(prompts):
        alone = greedy(model, [prompt])
        n = int(alone.lengths)
        row = together.tokens[i]
        assert row[30 - len(prompt) : 30].tolist() == prompt
        assert set(row[: 30 - len(prompt)].tolist()) <= {STOP}
        assert together.texts[i] == alone.texts[0]
        assert together.lengths[i] == n
        assert torch.equal(row[30 : 30 + n], alone.tokens[0, len(prompt) :])
        assert torch.allclose(
            together.log_probs[i, :n], alone.log_probs[0], atol=1e-5, rtol=1e-4
        )
        ids = alone.tokens[0, len(prompt) :].tolist()
        said = ids[:-1] if ids[-1] == STOP else ids
        assert alone.texts == [spoken(said)]
    assert together.lengths.min() < 20
    assert len(set(together.texts)) > 4


@pytest.mark.slow
@RAGGED
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5, 6, 7], [2, 0, 3], [4, 3], [6, 1]])
def test_log_probs_of_ragged_answers_and_gradients_are_those_of_each_alone(kind, rows):
    model = ragged_model(kind)
    prompts = ragged_prompts()
    answers = roll_out_prompts(model, prompts, 20, STOP, spoken, generator())
    found = answer_log_probs(model, answers, torch.tensor(rows))
    assert found.shape == (len(rows), int(answers.lengths[rows].max()))

    one_by_one = []
    for i in rows:
        P = len(prompts[i])
        text = answers.tokens[i, 30 - P : 30 + answers.lengths[i]]
        one_by_one.append(token_log_probs(model, text[None], P)[0])
    inside = torch.arange(found.shape[1]) < answers.lengths[rows][:, None]
    assert torch.allclose(found[inside], torch.cat(one_by_one), atol=1e-5, rtol=1e-4)
    assert torch.allclose(
        found[inside], answers.log_probs[rows][:, : found.shape[1]][inside], atol=1e-4
    )

    weights = list(model.parameters())
    total = torch.where(inside, found, 0.0).sum()
    together = torch.autograd.grad(total, weights, allow_unused=True)
    total = torch.cat(one_by_one).sum()
    alone = torch.autograd.grad(total, weights, allow_unused=True)
    for a, b in zip(together, alone, strict=True):
        if b is None:
            assert a is None
        else:
            assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()) + 1e-6)


@DENSE
def test_a_transformers_model_is_told_of_padding_only_where_there_is_some(
    kind, monkeypatch
):
    model = dense(kind)
    told = []
    forward = model.forward

    def watched(*args, **named):
        told.append("attention_mask" in named and "position_ids" in named)
        return forward(*args, **named)

    monkeypatch.setattr(model, "forward", watched)
    greedy(model, [[1, 2, 3], [4, 5, 6]])
    assert not any(told)
    told.clear()
    greedy(model, [[1, 2, 3], [4, 5]])
    assert all(told)


@KINDS
def test_equal_prompts_take_the_short_way(kind, monkeypatch):
    """The same numbers to the bit as `token_log_probs`: no row is moved."""
    model = any_model(kind)
    answers = rollout(model, problems("train", 6, 0), 12, generator())
    rows = torch.tensor([4, 1, 2])
    n = int(answers.lengths[rows].max())
    seen = record(monkeypatch, module, "token_log_probs", lambda *args: args[1:])
    found = answer_log_probs(model, answers, rows)
    tokens = answers.tokens[rows, : PROMPT + n]
    [(given, prompt)] = seen
    assert prompt == PROMPT
    assert torch.equal(given, tokens)
    assert torch.equal(found, token_log_probs(model, tokens, PROMPT))
