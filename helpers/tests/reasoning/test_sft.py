"""Fine-tuning on questions and answers."""

import math
from dataclasses import replace

from helpers.checks import InputError
from helpers.reasoning import sft as module
from helpers.reasoning.countdown import problems, tokenizer
from helpers.reasoning.rollout import rollout
from helpers.reasoning.sft import SFT, Example, right_padded, sft
from helpers.tests.builders import draw
from helpers.tests.reasoning.small_models import (
    CONFIG,
    DENSE,
    EXAMPLES,
    KINDS,
    LESSON,
    any_model,
    changed,
    dense,
    generator,
    ids_of,
    lessons,
    logits_of,
    record,
    weights_of,
    without_seconds,
)
from helpers.training.corpus import END
from helpers.training.loop import TrainingDiverged

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path / "home"))


@pytest.fixture
def base():
    return draw(CONFIG)


def texts_of(tokens):
    """The texts of a batch [B, T]."""
    words = tokenizer()
    return [words.decode(row.tolist()) for row in tokens]


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"lr": -1.0},
        {"by_length": "yes"},
        {"seed": True},
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_named(change):
    [name] = change
    with pytest.raises(InputError, match=f"{name}=.* cannot work: "):
        SFT(**change)


def test_without_examples_nothing_is_learnt_and_it_is_said(base, capsys):
    model, history = sft(base, [], LESSON, "the first lesson")
    assert "the first lesson: there are no examples" in capsys.readouterr().out
    assert history["loss"] == []
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def mean_loss(model):
    """Of all tokens of the answers, their ends included."""
    total = 0.0
    count = 0
    for prompt, answer in EXAMPLES:
        row = torch.tensor([*ids_of(f"{prompt} {answer}"), END])
        scores = logits_of(model, row[None, :-1])[0].log_softmax(dim=-1)
        n = len(answer.split()) + 1
        total -= scores[torch.arange(len(row) - 1), row[1:]][-n:].sum().item()
        count += n
    return total / count


@pytest.mark.slow
@KINDS
def test_fine_tuning_learns_the_answers_and_only_them(kind):
    base = any_model(kind)
    before = weights_of(base)
    model, history = sft(base, EXAMPLES, replace(LESSON, epochs=6), "sft")
    assert len(history["loss"]) == 6 * 5
    assert history["loss"][-1] < history["loss"][0] - 1
    assert not model.training
    assert not changed(before, base.state_dict())
    assert mean_loss(model) < mean_loss(base) - 1


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("by_length", [True, False])
def test_the_loss_is_the_mean_over_all_tokens_of_the_answers(kind, by_length):
    """Also where the batch is calculated in parts of like length."""
    base = any_model(kind)
    whole = replace(LESSON, epochs=1, batch_size=100, by_length=by_length)
    _, history = sft(base, EXAMPLES, whole, "one batch")
    assert history["loss"] == [pytest.approx(mean_loss(base), rel=1e-4)]


def test_what_is_learnt_by_hand():
    """Two texts: only answers, and the end of each, and no padding."""
    tokens, learnt = right_padded([Example([0, 5], [6, 7, 0]), Example([0], [9, 0])])
    assert tokens.tolist() == [[0, 5, 6, 7, 0], [0, 9, 0, 0, 0]]
    yes = True
    no = False
    assert learnt.tolist() == [[no, yes, yes, yes], [yes, yes, no, no]]


@pytest.mark.parametrize("filling", [math.inf, -math.inf, math.nan])
def test_what_stands_on_padding_reaches_no_loss(base, monkeypatch, filling):
    """A logit on padding may be anything: 0 * infinity would be NaN."""
    log_probs = module.token_log_probs

    def spoilt(model, tokens, prompt):
        found = log_probs(model, tokens, prompt)
        _, learnt = right_padded(part)
        return torch.where(learnt, found, filling)

    part = [Example([0, 5], [6, 7, 0]), Example([0], [9, 0])]
    trainer = module.SFTTrainer(base, EXAMPLES, LESSON)
    plain = trainer._summed_loss(part)
    monkeypatch.setattr(module, "token_log_probs", spoilt)
    assert torch.equal(trainer._summed_loss(part), plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v3", "llama with dropout"])
def test_the_mode_of_the_base_does_not_matter(kind):
    def build():
        return draw(CONFIG) if kind == "v3" else dense("llama", attention_dropout=0.5)

    quiet, history = sft(build().eval(), EXAMPLES, LESSON, "quiet")
    loud, same = sft(build().train(), EXAMPLES, LESSON, "loud")
    assert not changed(quiet.state_dict(), loud.state_dict())
    assert without_seconds(same) == without_seconds(history)


@pytest.mark.slow
def test_the_base_mtp_and_expert_biases_stay_as_they_are(base):
    before = weights_of(base)
    state = torch.random.get_rng_state()
    model, _ = sft(base, EXAMPLES, LESSON, "sft")
    assert not changed(before, base.state_dict())
    assert not base.training
    assert all(p.grad is None for p in base.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    still = set()
    for name in before:
        if name.startswith("mtp.") or name.endswith("e_score_correction_bias"):
            still.add(name)
    assert len(still) > 10
    assert changed(before, model.state_dict()) == set(before) - still


@pytest.mark.slow
def test_an_epoch_takes_every_example_once_in_an_order_of_its_own(base, monkeypatch):
    seen = record(
        monkeypatch, module, "token_log_probs", lambda model, tokens, prompt: tokens
    )
    sft(base, EXAMPLES, LESSON, "order")
    assert sorted(len(tokens) for tokens in seen[:5]) == [2, 5, 5, 5, 5]
    epochs = []
    for batches in (seen[:5], seen[5:]):
        texts = []
        for tokens in batches:
            texts += texts_of(tokens)
        epochs.append(texts)
    expected = sorted(f"{prompt} {answer}" for prompt, answer in EXAMPLES)
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]


@pytest.mark.slow
def test_a_batch_of_all_lengths_in_parts_teaches_what_the_whole_batch_does(base):
    lesson = replace(LESSON, epochs=4, batch_size=100)
    _, whole = sft(base, lessons(60), lesson, "whole")
    _, parts = sft(base, lessons(60), replace(lesson, by_length=False), "parts")
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    assert whole["loss"][-1] < whole["loss"][0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("by_length", [True, False])
def test_batches_hold_like_lengths_or_all_lengths(base, monkeypatch, by_length):
    """A word weighs the same for all only where every batch mixes the lengths."""
    short = ("make 5 from 5 1 9 9 A", "right")
    long = ("make 5 from 5 1 9 9 A", "try " * 30)
    seen = record(
        monkeypatch, module, "token_log_probs", lambda model, tokens, prompt: tokens
    )
    lesson = replace(LESSON, batch_size=10, by_length=by_length)
    sft(base, [short, long] * 20, lesson, "lengths")
    shorts = []
    for tokens in seen[:4]:
        widths = [len(text.split()) for text in texts_of(tokens)]
        shorts.append(sum(width < 20 for width in widths))
    assert sum(shorts) == 20
    assert (sorted(shorts) == [0, 0, 10, 10]) == by_length


@pytest.mark.slow
def test_the_learning_rate_of_fine_tuning_falls_to_a_tenth(base, monkeypatch):
    rates = record(
        monkeypatch,
        module,
        "descend",
        lambda model, optimizer, clip: optimizer.param_groups[0]["lr"],
    )
    sft(base, EXAMPLES, replace(LESSON, epochs=8, lr=0.01), "rates")
    assert rates[0] == pytest.approx(0.01)
    assert rates[20] == pytest.approx(0.0055)
    assert rates[-1] == pytest.approx(0.001, rel=0.02)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.slow
def test_fine_tuning_can_teach_a_text_by_heart():
    """The whole way round: what is learnt is what is sampled."""
    lesson = SFT(epochs=150, batch_size=2, lr=1e-2)
    model, _ = sft(draw(CONFIG), EXAMPLES[:2], lesson, "by heart")
    answers = rollout(model, problems("train", 2, 8), 60, generator(), 0.0)
    assert answers.texts == [answer for _, answer in EXAMPLES[:2]]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_with_advice(base):
    lesson = replace(LESSON, epochs=8, lr=1e30)
    with pytest.raises(TrainingDiverged, match=r"at step \d+;.*lower lr"):
        sft(base, EXAMPLES, lesson, "diverged")


@pytest.mark.slow
@DENSE
def test_a_student_saved_by_transformers_opens_as_before(kind, tmp_path):
    model, _ = sft(dense(kind), EXAMPLES, LESSON, "student")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert not changed(model.state_dict(), again.state_dict())
