"""Settings, reward, and whole runs of GRPO."""

import json
import math
from dataclasses import asdict, replace

from helpers.checks import InputError
from helpers.evidence.facts import fact
from helpers.reasoning import grpo as module
from helpers.reasoning.countdown import Problem, problems, tuples
from helpers.reasoning.grpo import GRPO, GRPOTrainer, grpo, reward
from helpers.reasoning.rollout import measure, rollout, token_log_probs
from helpers.tests.builders import draw
from helpers.tests.reasoning.small_models import (
    CONFIG,
    KINDS,
    SETTINGS,
    any_model,
    changed,
    dense,
    generator,
    record,
    weights_of,
    without_seconds,
)
from helpers.training.loop import TrainingDiverged
from helpers.training.runs import cache_dir, fingerprint

import pytest
import torch

ASKED = Problem((2, 6, 9, 1), 21)
PROMPT = 9


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path / "home"))


@pytest.fixture
def base():
    return draw(CONFIG)


# ---------------------------------------------------------------- settings and reward


@pytest.mark.parametrize(
    "change",
    [
        {"level": "word"},
        {"steps": 0},
        {"questions": 0},
        {"group": 1},
        {"group": 0},
        {"max_new_tokens": 0},
        {"updates": 0},
        {"refresh": 0},
        {"steps": 1.5},
        {"questions": True},
        {"group": "8"},
        {"updates": -1},
        {"updates": 65},
        {"warmup_steps": 0},
        {"kl": -0.1},
        {"lr": math.nan},
        {"clip": "0.2"},
        {"weight_format": math.inf},
        {"divide_by_std": 1},
        {"operators": "+/"},
        {"operators": ""},
        {"seed": -1},
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_named(change):
    [name] = change
    with pytest.raises(InputError, match=f"{name}=.* cannot work: "):
        GRPO(**change)


def test_the_defaults_that_the_papers_give():
    assert GRPO().level == "sequence"
    assert GRPO().divide_by_std
    assert GRPO().beta1 == fact("v3.train.beta1").value


def test_every_setting_is_part_of_what_a_run_is_known_by():
    names = {"seed", "level", "kl", "refresh", "operators", "weight_readable"}
    assert set(asdict(GRPO())) >= names
    assert json.dumps(asdict(GRPO()))


def test_the_reward_is_the_sum_of_its_parts():
    text = (
        "<think> try check bien </think> <answer> 2 * 6 + 9 * 1 </answer> "
        "check 21 right"
    )
    plain = GRPO(weight_format=0.0)
    assert reward(plain, ASKED, text) == 1
    assert reward(replace(plain, weight_format=0.25), ASKED, text) == 1.25
    by_language = replace(plain, weight_language=3.0)
    assert reward(by_language, ASKED, text) == pytest.approx(3)
    assert reward(replace(plain, weight_readable=0.5), ASKED, text) == 1.5
    assert reward(replace(plain, operators="+-"), ASKED, text) == 0
    assert reward(GRPO(), ASKED, "") == 0


def test_watching_without_a_watch_is_refused(base):
    with pytest.raises(InputError, match="watch_at="):
        grpo(base, SETTINGS, "blind", watch_at=(0,))


# --------------------------------------------------------------------- a run of steps


@pytest.mark.slow
def test_the_reward_goes_up_when_it_is_within_reach(base):
    settings = replace(SETTINGS, steps=40, questions=8, group=8, lr=1e-2)
    _, history = grpo(base, settings, "up")
    first = sum(history["reward"][:6]) / 6
    last = sum(history["reward"][-6:]) / 6
    assert last > first + 0.25, (first, last)


@pytest.mark.slow
def test_the_history_of_grpo(base):
    seen = []

    def watch(model, step):
        seen.append(weights_of(model))
        return {"step": step}

    settings = replace(SETTINGS, steps=5)
    model, history = grpo(base, settings, "history", watch, watch_at=(0, 3, 4))
    assert history["watch"] == [{"step": step} for step in (0, 3, 4, 5)]
    assert not changed(base.state_dict(), seen[0])
    assert not changed(model.state_dict(), seen[3])
    assert changed(seen[1], seen[2])
    assert changed(seen[2], seen[3])

    asked = []
    for problem in problems("train", 4, 0):
        asked += [problem] * 4
    answers = rollout(base, asked, 16, generator(0))
    measured = measure(asked, answers)
    names = {*measured, "reward", "loss", "gap", "clipped"}
    assert set(history) == names | {"watch", "seconds", "provenance"}
    assert {len(history[name]) for name in names} == {5}
    assert max(history["gap"]) < 1e-4
    assert abs(history["loss"][0]) < 0.5
    assert history["seconds"] > 0
    assert all(0 <= value <= 1 for value in history["clipped"])
    assert max(history["clipped"]) > 0
    json.dumps(history, allow_nan=False)
    for name in ("length", "tries"):
        assert history[name][0] == pytest.approx(measured[name])
    paid = [reward(settings, p, t) for p, t in zip(asked, answers.texts, strict=True)]
    assert history["reward"][0] == pytest.approx(sum(paid) / 16)


def test_a_run_that_nobody_watches_has_an_empty_watch(base):
    assert grpo(base, replace(SETTINGS, steps=1), "alone")[1]["watch"] == []


@pytest.mark.slow
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_the_base_mtp_and_expert_biases_stay_as_they_are(base, kl):
    before = weights_of(base)
    state = torch.random.get_rng_state()
    settings = replace(SETTINGS, steps=3, kl=kl, weight_decay=0.1)
    model, _ = grpo(base, settings, "grpo")
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
    assert not model.training


@pytest.mark.slow
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_the_mode_of_the_base_does_not_matter(kl):
    """Neither to a V3 nor to a student with dropout, nor to the reference."""
    settings = replace(SETTINGS, steps=2, kl=kl)
    for build in (
        lambda: draw(CONFIG),
        lambda: dense("llama", attention_dropout=0.5),
    ):
        quiet, history = grpo(build().eval(), settings, "quiet")
        loud, same = grpo(build().train(), settings, "loud")
        assert not changed(quiet.state_dict(), loud.state_dict())
        assert without_seconds(same) == without_seconds(history)
        assert not loud.training


@pytest.mark.slow
@KINDS
def test_the_reference_is_a_copy_of_the_policy_made_every_so_many_steps(
    kind, monkeypatch
):
    base = any_model(kind)
    seen = record(
        monkeypatch,
        GRPOTrainer,
        "part_loss",
        lambda self, *_: (fingerprint(self.model), fingerprint(self.reference)),
    )
    settings = replace(SETTINGS, steps=5, updates=1, kl=0.1)
    grpo(base, replace(settings, refresh=2), "refresh")
    policies, references = zip(*seen, strict=True)
    assert len(set(policies)) == 5
    assert policies[0] == fingerprint(base)
    assert references == tuple(policies[i] for i in (0, 0, 2, 2, 4))
    seen.clear()
    grpo(base, replace(settings, steps=3), "no refresh")
    assert {reference for _, reference in seen} == {fingerprint(base)}


@pytest.mark.slow
def test_a_strong_kl_term_holds_the_policy_near_the_reference(base):
    tokens = rollout(base, problems("dev", 32, 0), 16, generator(9)).tokens

    def distance(kl):
        model, _ = grpo(base, replace(SETTINGS, steps=10, kl=kl), "kl")
        with torch.no_grad():
            moved = token_log_probs(model, tokens, PROMPT)
            return (moved - token_log_probs(base, tokens, PROMPT)).abs().mean().item()

    assert distance(3.0) < 0.7 * distance(0.0)


@pytest.mark.slow
def test_every_step_asks_and_draws_anew_and_for_the_settings_seed(base, monkeypatch):
    drawn = record(
        monkeypatch,
        module,
        "rollout",
        lambda model, asked, n, generator: (tuple(asked), generator.initial_seed()),
    )
    for seed in (0, 1):
        grpo(base, replace(SETTINGS, steps=3, seed=seed), "seeds")
    assert len({draw for _, draw in drawn}) == 6
    assert len({asked for asked, _ in drawn}) == 6
    train = set(tuples("train"))
    for asked, _ in drawn:
        assert all(asked[i] == asked[i - i % 4] for i in range(16))
        assert {problem.digits for problem in asked} <= train


@pytest.mark.slow
def test_the_learning_rate_warms_up(base, monkeypatch):
    rates = record(
        monkeypatch,
        module,
        "descend",
        lambda model, optimizer, clip: optimizer.param_groups[0]["lr"],
    )
    settings = replace(SETTINGS, steps=4, updates=1, lr=1.0, warmup_steps=4, kl=0.1)
    grpo(base, settings, "warm-up")
    assert rates == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"questions": 3, "updates": 2},
        {"questions": 3, "updates": 3, "level": "token"},
    ],
    ids=str,
)
def test_updates_need_not_divide_the_questions(base, change):
    _, history = grpo(base, replace(SETTINGS, steps=2, **change), "uneven")
    assert len(history["loss"]) == 2
    assert all(map(math.isfinite, history["loss"]))


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("updates", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_with_advice(kind, updates):
    """In the midst of a step, or when nothing can be drawn in the next."""
    settings = replace(
        SETTINGS, steps=20, lr=1e30, warmup_steps=1, updates=updates, kl=0.1
    )
    message = r"loss is (nan|inf|-inf) at step \d+;.*lower lr"
    with pytest.raises(TrainingDiverged, match=message):
        grpo(any_model(kind), settings, "diverged")


def test_a_context_too_short_is_said_as_it_is(base):
    with pytest.raises(ValueError, match="do not fit max_position_embeddings"):
        grpo(base, replace(SETTINGS, max_new_tokens=90), "long")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_dense_students_go_through_grpo(kind, kl):
    base = dense(kind)
    before = weights_of(base)
    settings = replace(SETTINGS, steps=3, kl=kl)
    model, history = grpo(base, settings, "student")
    assert type(model) is type(base)
    assert not changed(before, base.state_dict())
    assert changed(before, model.state_dict()) == set(before)
    assert max(history["gap"]) < 1e-4
    assert len(history["reward"]) == 3
    assert not cache_dir().exists()
    again, same = grpo(base, settings, "student")
    assert without_seconds(same) == without_seconds(history)
    assert not changed(model.state_dict(), again.state_dict())
