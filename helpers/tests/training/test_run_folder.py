"""A run that is found: made by other code, or being trained by another program."""

import json
import math
import signal
import time
from dataclasses import asdict, replace

from helpers.tests.training.small_runs import (
    CONFIG,
    SETTINGS,
    TIMEOUT,
    Bits,
    Shell,
    counted,
    new_model,
    newest,
    step_of,
    wait_for_progress,
)
from helpers.training import pretrain, runs
from helpers.training.loop import Plan, Stopped, TrainingDiverged, train_in_steps
from helpers.training.parallel import World
from helpers.training.run_folder import RunFolder

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


def code_is(monkeypatch, code):
    monkeypatch.setattr(runs, "code_hash", lambda module: code)


def provenance_of(history):
    return runs.Provenance(**history["provenance"])


# ------------------------------------------------------------------ made by other code


@pytest.mark.slow
def test_a_run_keeps_its_code_and_the_losses_of_its_first_three_steps(corpus):
    history = pretrain.train(new_model(), corpus, SETTINGS)
    made = provenance_of(history)
    assert made.code == runs.code_hash("helpers.training.pretrain")
    # alpha and lambda weigh in: it is the loss that was descended
    by_hand = history["loss"][0] + SETTINGS.mtp_lambda * history["mtp_loss"][0]
    assert made.witness[0] == pytest.approx(by_hand, rel=1e-3)
    assert len(made.witness) == 3
    assert made.compared == ""
    short = pretrain.train(new_model(), corpus, replace(SETTINGS, steps=2))
    assert len(provenance_of(short).witness) == 2


@pytest.mark.slow
def test_other_code_with_the_same_numbers_reuses_a_finished_run(
    corpus, tmp_path, monkeypatch, capsys
):
    code_is(monkeypatch, "before")
    first = pretrain.train(new_model(), corpus, SETTINGS, tmp_path / "run")
    code_is(monkeypatch, "after")
    asked = counted(corpus, monkeypatch)
    model = new_model()
    again = pretrain.train(model, corpus, SETTINGS, tmp_path / "run")
    assert asked == [0, 1, 2]
    assert provenance_of(again).code == "before"
    assert provenance_of(again).compared == "after"
    for name in first.keys() - {"provenance"}:
        assert again[name] == first[name]
    Bits(tmp_path / "run").must_be(Bits(tmp_path / "run", model))
    assert capsys.readouterr().out == ""
    # what was compared once is not compared again
    pretrain.train(new_model(), corpus, SETTINGS, tmp_path / "run")
    assert asked == [0, 1, 2]


def stop_at(corpus, monkeypatch, step, folder):
    """Train until Ctrl-C in `step`, so that the checkpoint is of `step` + 1."""
    with monkeypatch.context() as patch:
        counted(corpus, patch, step, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped):
            pretrain.train(new_model(), corpus, SETTINGS, folder)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1, 6])
def test_other_code_goes_on_with_a_half_finished_run_to_the_same_bits(
    corpus, tmp_path, monkeypatch, stopped
):
    code_is(monkeypatch, "before")
    pretrain.train(new_model(), corpus, SETTINGS, tmp_path / "whole")
    stop_at(corpus, monkeypatch, stopped, tmp_path / "run")
    code_is(monkeypatch, "after")
    asked = counted(corpus, monkeypatch)
    pretrain.train(new_model(), corpus, SETTINGS, tmp_path / "run")
    assert asked[: min(3, stopped + 1)] == [0, 1, 2][: stopped + 1]
    assert asked[min(3, stopped + 1) :] == list(range(stopped + 1, 12))
    found = Bits(tmp_path / "run")
    assert found.history["provenance"].pop("compared") == "after"
    expected = Bits(tmp_path / "whole")
    expected.history["provenance"].pop("compared")
    found.must_be(expected)


def without_clipping(model, optimizer, grad_clip):
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def nan_losses(*args):
    found = LOSSES(*args)
    return found._replace(main=found.main * math.nan)


LOSSES = pretrain.losses
OTHER_RULES = {"descend": without_clipping, "losses": nan_losses}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_RULES)
def test_a_changed_learning_rule_moves_the_run_aside_and_trains_anew(
    corpus, tmp_path, monkeypatch, capsys, name
):
    code_is(monkeypatch, "before")
    settings = replace(SETTINGS, grad_clip=0.1)
    out = tmp_path / "run"
    pretrain.train(new_model(), corpus, settings, out)
    before = Bits(out)
    code_is(monkeypatch, "after")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, name, OTHER_RULES[name])
        if name == "losses":
            with pytest.raises(TrainingDiverged, match="at step 0; no checkpoint"):
                pretrain.train(new_model(), corpus, settings, out)
        else:
            pretrain.train(new_model(), corpus, settings, out)
            pretrain.train(new_model(), corpus, settings, tmp_path / "anew")
            Bits(out).must_be(Bits(tmp_path / "anew"))
            assert Bits(out).history["provenance"]["code"] == "after"
    [line] = capsys.readouterr().out.splitlines()
    assert line == (
        "run was computed by other code, which gives other numbers: it is moved to "
        "run.stale-1 and trained again"
    )
    Bits(tmp_path / "run.stale-1").must_be(before)


@pytest.mark.slow
def test_a_run_of_the_first_edition_is_stale_and_the_next_one_has_the_next_number(
    corpus, tmp_path, capsys
):
    out = tmp_path / "run"
    for number in (1, 2):
        pretrain.train(new_model(), corpus, SETTINGS, out)
        state_file = out / "latest" / "training.json"
        state = json.loads(state_file.read_text(encoding="utf-8"))
        del state["history"]["provenance"]
        state_file.write_text(json.dumps(state), encoding="utf-8")
        pretrain.train(new_model(), corpus, SETTINGS, out)
        assert f"moved to run.stale-{number}" in capsys.readouterr().out
        assert step_of(tmp_path / f"run.stale-{number}") == 12
    assert "provenance" in Bits(out).history


class Counting(pretrain.Pretrainer):
    """A trainer with a state of its own, which decides what it learns."""

    def __init__(self, model, corpus):
        super().__init__(model, corpus, SETTINGS, World())
        self.seen = torch.zeros(1)

    def gradients(self, step):
        loss = super().gradients(step)
        for group in self.optimizer.param_groups:
            group["lr"] *= 1 / (1 + self.seen.item())
        return loss

    def update(self, step):
        self.seen += 1
        return super().update(step)


def trained(corpus, folder, model):
    trainer = Counting(model, corpus)
    plan = Plan(
        steps=SETTINGS.steps,
        identity={"settings": asdict(SETTINGS)},
        module="helpers.training.pretrain",
        tokenizer=corpus.tokenizer,
        label="counting",
        folder=folder,
        keep={"seen": trainer.seen},
    )
    train_in_steps(trainer, lambda step: 1e-3, plan)


@pytest.mark.slow
def test_the_comparison_leaves_no_trace_in_what_the_trainer_keeps(
    corpus, tmp_path, monkeypatch
):
    trained(corpus, tmp_path / "whole", new_model())
    with monkeypatch.context() as patch:
        counted(corpus, patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped):
            trained(corpus, tmp_path / "run", new_model())
    code_is(monkeypatch, "after")
    trained(corpus, tmp_path / "run", new_model())
    found = Bits(tmp_path / "run")
    assert found.tensors["seen"].item() == 12
    assert found.history["provenance"].pop("compared") == "after"
    expected = Bits(tmp_path / "whole")
    expected.history["provenance"].pop("compared")
    found.must_be(expected)


@pytest.mark.slow
def test_a_run_that_starts_anew_keeps_nothing_of_the_comparison(
    corpus, tmp_path, monkeypatch
):
    trained(corpus, tmp_path / "whole", new_model())
    trained(corpus, tmp_path / "run", new_model())
    code_is(monkeypatch, "after")
    with monkeypatch.context() as patch:
        patch.setattr(runs.Provenance, "verdict", lambda made, now: "stale")
        trained(corpus, tmp_path / "run", new_model())
    found = Bits(tmp_path / "run")
    assert found.history["provenance"].pop("code") == "after"
    expected = Bits(tmp_path / "whole")
    expected.history["provenance"].pop("code")
    found.must_be(expected)


@pytest.mark.slow
def test_sources_that_changed_are_told_by_their_numbers(tmp_path, texts):
    shell = Shell(tmp_path, texts)
    out = tmp_path / "run"
    code, printed = shell.finish(out)
    assert code == 0, printed
    first = Bits(out)

    source = shell.root / "helpers" / "training" / "pretrain.py"
    before = source.read_text(encoding="utf-8")
    reworded = before.replace("is too small for a corpus", "is small for a corpus")
    source.write_text(reworded, encoding="utf-8")
    code, printed = shell.finish(out)
    assert code == 0, printed
    assert Bits(out).history["loss"] == first.history["loss"]
    compared = Bits(out).history["provenance"]["compared"]
    assert compared not in ("", first.history["provenance"]["code"])

    changed = before.replace("balance = balance + ", "balance = balance + 1e3 * ")
    assert changed != before
    source.write_text(changed, encoding="utf-8")
    code, printed = shell.finish(out)
    assert code == 0, printed
    assert "run was computed by other code" in printed
    assert Bits(out).history["loss"] != first.history["loss"]
    Bits(tmp_path / "run.stale-1").must_be(Bits(tmp_path / "run.stale-1"))
    assert Bits(tmp_path / "run.stale-1").history["loss"] == first.history["loss"]


# ------------------------------------------------------------ trained by two programs


@pytest.mark.slow
def test_when_one_of_two_programs_is_killed_the_other_goes_on(shell, never_stopped):
    out = shell.folder / "shared"
    first = shell.start(out)
    assert wait_for_progress(first, out)
    second = shell.start(out)
    first.kill()  # whether or not the second one waits by now
    first.communicate(timeout=TIMEOUT)
    assert first.returncode == -signal.SIGKILL
    printed, errors = second.communicate(timeout=TIMEOUT)
    assert second.returncode == 0, errors
    assert "validation loss" in printed
    Bits(out).must_be(never_stopped)


@pytest.mark.slow
def test_two_programs_started_at_once_both_finish(shell, never_stopped):
    out = shell.folder / "at-once"
    both = [shell.start(out, save_every=1) for _ in range(2)]
    for process in both:
        printed, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors
        assert "validation loss" in printed
    Bits(out).must_be(never_stopped)


@pytest.mark.slow
def test_the_second_program_waits_and_says_so(shell, corpus, tmp_path):
    out = shell.folder / "waited-for"
    folder = RunFolder(out, World())
    with folder.alone():
        process = shell.start(out)
        line = process.stdout.readline()
        assert line == "another program trains waited-for: waiting until it is done\n"
        time.sleep(0.5)
        assert process.poll() is None
        assert not out.exists()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "stopped before the first step"


@pytest.mark.slow
def test_the_lock_is_free_after_an_error_an_interrupt_and_the_end(
    corpus, tmp_path, monkeypatch
):
    out = tmp_path / "run"

    def must_be_free():
        with RunFolder(out, World()).alone():
            pass

    with pytest.raises(TrainingDiverged):
        diverging = replace(SETTINGS, lr=1e30, warmup_steps=0)
        pretrain.train(new_model(), corpus, diverging, out)
    must_be_free()
    stop_at(corpus, monkeypatch, 3, out)
    must_be_free()
    with pytest.raises(ValueError, match="another config"):
        other = new_model(CONFIG.with_(n_shared_experts=2))
        pretrain.train(other, corpus, SETTINGS, out)
    must_be_free()
    pretrain.train(new_model(), corpus, SETTINGS, out)
    must_be_free()


def test_a_finished_run_that_nobody_may_change_is_read(corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    code_is(monkeypatch, "before")
    first = pretrain.train(new_model(), corpus, SETTINGS, out)
    saved = newest(out)
    (tmp_path / ".run.lock").unlink()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    code_is(monkeypatch, "after")
    again = pretrain.train(new_model(), corpus, SETTINGS, out)
    assert again["loss"] == first["loss"]
    assert newest(out) == saved
    assert not (tmp_path / ".run.lock").exists()
    with pytest.raises(OSError, match="nothing can be written"):
        pretrain.train(new_model(), corpus, SETTINGS, tmp_path / "other")
