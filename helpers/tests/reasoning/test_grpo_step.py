"""One step of GRPO, beside the paper's loss built by another way."""

import copy
import math
from dataclasses import replace

from helpers.reasoning import grpo as module
from helpers.reasoning.countdown import problems
from helpers.reasoning.grpo import GRPOTrainer, MiniBatch, grpo, reward
from helpers.reasoning.rollout import rollout
from helpers.tests.builders import draw
from helpers.tests.reasoning.small_models import (
    CONFIG,
    SETTINGS,
    changed,
    generator,
    record,
)
from helpers.training.corpus import END
from helpers.training.loop import LossNotFinite

import pytest
import torch

PROMPT = 9  # tokens of a question


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path / "home"))


@pytest.fixture
def base():
    return draw(CONFIG)


def exact_loss(base, settings, answers):
    """The loss of a step, answer by answer, without padding, parts or dropped groups.

    -> the loss, with gradients, and the sum of |advantage|.
    """
    group = settings.group
    asked = []
    for problem in problems("train", settings.questions, 0):
        asked += [problem] * group
    B = len(asked)
    paid = []
    for problem, text in zip(asked, answers.texts, strict=True):
        paid.append(reward(settings, problem, text))
    loss = 0.0
    sizes = 0.0
    for i in range(B):
        length = int(answers.lengths[i])
        others = paid[i - i % group : i - i % group + group]
        mean = sum(others) / group
        std = (sum((r - mean) ** 2 for r in others) / group) ** 0.5
        advantage = paid[i] - mean
        if settings.divide_by_std:
            advantage /= std + 1e-6
        row = answers.tokens[i, : PROMPT + length]
        scores = base(row[None, :-1])[0].double().log_softmax(dim=-1)
        places = torch.arange(PROMPT - 1, PROMPT - 1 + length)
        log_probs = scores[places, row[PROMPT:]]
        ratio = (log_probs - log_probs.detach()).exp()
        d = log_probs.detach() - log_probs  # the reference is the base itself
        gain = ratio * advantage - settings.kl * (d.exp() - d - 1)
        weight = {
            "sequence": 1 / B / length,
            "token": 1 / int(answers.lengths.sum()),
            "constant": 1 / B / settings.max_new_tokens,
        }[settings.level]
        loss = loss - (gain * weight).sum()
        sizes += abs(advantage)
    return loss, sizes


class PlainDescent(torch.optim.SGD):
    """w - rate * gradient, so that the change of the weights shows the gradient."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"level": "token"},
        {"level": "constant"},
        {"divide_by_std": False},
        {"kl": 0.5},
        {"level": "token", "kl": 0.5},
    ],
    ids=str,
)
def test_a_step_changes_the_weights_by_the_gradient_of_the_papers_loss(
    base, monkeypatch, variant
):
    settings = replace(
        SETTINGS,
        steps=1,
        updates=1,
        warmup_steps=1,
        lr=0.05,
        grad_clip=1e9,
        questions=6,
        max_new_tokens=40,
        **variant,
    )
    monkeypatch.setattr(
        module, "adamw", lambda model, _: PlainDescent(model.parameters(), lr=1.0)
    )
    micro_batches = module.micro_batches
    monkeypatch.setattr(
        module, "micro_batches", lambda lengths: micro_batches(lengths, 100)
    )
    base.lm_head.weight.data[END] *= 1.5
    answers = rollout(base, six_questions(), 40, generator(0))
    assert len(answers.lengths.unique()) > 3
    assert answers.lengths.min() < 40

    model, history = grpo(base, settings, "one step")
    exact = copy.deepcopy(base)
    loss, sizes = exact_loss(exact, settings, answers)
    loss.backward()
    assert sizes > 3
    assert history["loss"] == [pytest.approx(loss.item(), abs=1e-5)]
    before = base.state_dict()
    after = model.state_dict()
    largest = 0.0
    for name, parameter in exact.named_parameters():
        step = (before[name] - after[name]) / 0.05
        expected = torch.zeros_like(step) if parameter.grad is None else parameter.grad
        assert torch.allclose(step, expected, atol=2e-5, rtol=1e-3), name
        largest = max(largest, expected.abs().max().item())
    assert largest > 1e-3


def six_questions():
    asked = []
    for problem in problems("train", 6, 0):
        asked += [problem] * 4
    return asked


def part_losses(monkeypatch):
    """-> a list: (trainer's model, reference, rows, weight, PartLoss) of each part."""
    seen = []
    part_loss = GRPOTrainer.part_loss

    def noting(self, rows, weight):
        result = part_loss(self, rows, weight)
        share = weight[rows] * self.batch.answers.lengths[rows]
        seen.append((self, rows.tolist(), share, result))
        return result

    monkeypatch.setattr(GRPOTrainer, "part_loss", noting)
    return seen


def test_each_update_sees_its_part_of_the_questions_and_the_second_a_changed_policy(
    base, monkeypatch
):
    seen = part_losses(monkeypatch)
    settings = replace(SETTINGS, steps=1, updates=2, kl=0.01)
    _, history = grpo(base, settings, "updates")
    (_, first, _, first_loss), (_, second, _, second_loss) = seen
    assert sorted(first + second) == list(range(16))
    assert len(first) == len(second) == 8
    for _, rows, share, _ in seen:
        groups = {row // 4 for row in rows}
        assert len(groups) == 2, "a group stays together"
        # every answer of an update weighs an eighth
        assert torch.allclose(share, torch.full((8,), 1 / 8))
    assert first_loss.gap < 1e-4 < second_loss.gap
    assert history["gap"] == [first_loss.gap]


def test_a_later_mini_batch_without_a_finite_loss_changes_nothing(base, monkeypatch):
    trainer = GRPOTrainer(copy.deepcopy(base), replace(SETTINGS, updates=2))
    trainer.gradients(0)
    descents = record(monkeypatch, module, "descend", lambda *arguments: arguments)
    monkeypatch.setattr(trainer, "backward", lambda rows: MiniBatch(loss=math.nan))
    with pytest.raises(LossNotFinite):
        trainer.update(0)
    assert len(descents) == 1


def test_the_first_mini_batch_leaves_the_weights(base):
    trainer = GRPOTrainer(copy.deepcopy(base), replace(SETTINGS, updates=2))
    loss = trainer.gradients(0)
    assert not changed(base.state_dict(), trainer.model.state_dict())
    assert any(p.grad is not None for p in trainer.model.parameters())
    assert loss == pytest.approx(0, abs=1e-6)
    trainer.update(0)
    assert changed(base.state_dict(), trainer.model.state_dict())
    assert all(p.grad is None for p in trainer.model.parameters())


# ---------------------------------------------------- nothing to learn where all agree


@pytest.mark.slow
@pytest.mark.parametrize("paid", [0.0, 0.2, 1.0, 1.2, 2.2, 2.7, 0.3])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_where_all_rewards_are_equal_nothing_is_computed_and_nothing_changes(
    base, monkeypatch, paid, level
):
    """Eight rewards of 1.2 were pushed up by 0.107 each, and of 0.2 down."""
    monkeypatch.setattr(module, "reward", lambda settings, problem, text: paid)
    forwards = record(
        monkeypatch, module, "answer_log_probs", lambda *arguments: arguments
    )
    settings = replace(
        SETTINGS, steps=2, questions=2, group=8, weight_decay=0.1, level=level
    )
    model, history = grpo(base, settings, "alike")
    assert forwards == []
    assert not changed(base.state_dict(), model.state_dict())
    assert history["loss"] == [0.0] * 2
    assert history["clipped"] == [0.0] * 2
    assert history["gap"] == [0.0] * 2


@pytest.mark.slow
def test_only_the_group_that_does_not_agree_is_computed(base, monkeypatch):
    rewards = iter([1.2] * 8 + [0.0, 1.0] * 4 + [0.2] * 8 + [2.7] * 8)
    monkeypatch.setattr(module, "reward", lambda *_: next(rewards))
    seen = part_losses(monkeypatch)
    grpo(base, replace(SETTINGS, steps=1, updates=1, group=8), "one group")
    rows = []
    for _, part, _, _ in seen:
        rows += part
    assert sorted(rows) == list(range(8, 16))


@pytest.mark.slow
def test_with_a_reference_groups_that_agree_are_held_near_it(base, monkeypatch):
    monkeypatch.setattr(module, "reward", lambda *_: 1.2)
    seen = part_losses(monkeypatch)
    grpo(base, replace(SETTINGS, steps=1, updates=1, kl=0.1), "held")
    assert sum(len(rows) for _, rows, _, _ in seen) == 16


def test_the_witness_of_a_run_is_more_than_rounding(base):
    def witness(model):
        trainer = GRPOTrainer(copy.deepcopy(model), SETTINGS)
        loss = trainer.gradients(0)
        return loss, trainer.witness()

    loss, first = witness(base)
    assert abs(loss) < 1e-6  # so the loss would tell nothing
    assert first > 0.1
    assert witness(base)[1] == first

    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    assert witness(other)[1] != pytest.approx(first, rel=1e-5)
