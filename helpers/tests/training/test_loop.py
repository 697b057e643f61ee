"""Stopped, killed, cut off or resumed: a run ends with the bits of one never stopped.

And a loss that is not a number stops it with the last good checkpoint kept.
"""

import _thread
import math
import random
import re
import signal
import time
from dataclasses import replace

from helpers.tests.builders import small
from helpers.tests.training.small_runs import (
    SETTINGS,
    TIMEOUT,
    Bits,
    counted,
    new_model,
    newest,
    step_of,
    wait_for_progress,
)
from helpers.training import corpus as text
from helpers.training import loop, pretrain
from helpers.training.loop import Stopped, TrainingDiverged
from helpers.v3 import DeepSeekV3, checkpoint

import pytest
import torch
from jupyter_client.manager import start_new_kernel

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------- killed and resumed, from a shell


@pytest.mark.slow
def test_killed_at_several_moments_and_resumed_it_ends_with_the_same_bits(
    shell, never_stopped
):
    out = shell.folder / "killed"
    rng = random.Random(0)
    killed = 0
    steps = []
    for attempt in range(4):
        process = shell.start(out, save_every=1 + attempt % 3)
        writing = attempt % 2 == 1
        if wait_for_progress(process, out, newest(out), writing):
            time.sleep(rng.uniform(0, 0.02 if writing else 0.1))
            process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        steps.append(step_of(out))
        checkpoint.load(out)
    code, printed = shell.finish(out)
    assert code == 0, printed
    assert killed >= 3
    assert steps == sorted(set(steps))
    assert steps[2] < 40
    Bits(out).must_be(never_stopped)


@pytest.mark.slow
def test_interrupted_from_a_shell_it_says_how_to_go_on_and_ends_with_the_same_bits(
    shell, never_stopped
):
    out = shell.folder / "interrupted"
    process = shell.start(out, save_every=3)
    assert wait_for_progress(process, out)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert printed == ""
    message = re.fullmatch(
        r"stopped after step (\d+) of 40: saved in interrupted; "
        r"the same call goes on from there",
        errors.splitlines()[-1],
    )
    assert message is not None
    assert step_of(out) == int(message[1]) < 40
    code, printed = shell.finish(out)
    assert code == 0, printed
    Bits(out).must_be(never_stopped)


# ------------------------------------------------------------ stopped, in this process


@pytest.mark.slow
@pytest.mark.parametrize("folder", [None, "run"])
def test_interrupted_the_step_is_finished_and_the_same_call_goes_on(
    corpus, tmp_path, monkeypatch, folder
):
    out = folder and tmp_path / folder
    asked = counted(corpus, monkeypatch, 5, _thread.interrupt_main)
    model = new_model()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        pretrain.train(model, corpus, SETTINGS, out)
    assert asked == [0, 1, 2, 3, 4, 5]
    assert signal.getsignal(signal.SIGINT) is handler
    kept = "saved in run; the same call goes on from there"
    if folder is None:
        kept = "the model keeps what it has learnt"
    assert str(stopped.value) == f"stopped after step 6 of 12: {kept}"
    if folder is None:
        return
    Bits(out).must_be(Bits(out, model))
    pretrain.train(model, corpus, SETTINGS, out)
    assert asked[6:] == [6, 7, 8, 9, 10, 11]
    whole = new_model()
    pretrain.train(whole, corpus, SETTINGS, tmp_path / "whole")
    Bits(out).must_be(Bits(tmp_path / "whole"))
    Bits(out, model).must_be(Bits(out, whole))


def interrupt_twice():
    _thread.interrupt_main()
    time.sleep(0.01)  # the first one is handled before the second one comes
    _thread.interrupt_main()


@pytest.mark.slow
def test_a_second_interrupt_ends_in_the_midst_of_a_step_with_a_message_too(
    corpus, tmp_path, monkeypatch
):
    counted(corpus, monkeypatch, 5, interrupt_twice)
    with pytest.raises(Stopped) as stopped:
        pretrain.train(new_model(), corpus, SETTINGS, tmp_path / "run", save_every=2)
    message = "cut off in step 6 of 12: run holds step 4, the same call goes on"
    assert str(stopped.value) == message
    pretrain.train(new_model(), corpus, SETTINGS, tmp_path / "run")
    pretrain.train(new_model(), corpus, SETTINGS, tmp_path / "whole")
    Bits(tmp_path / "run").must_be(Bits(tmp_path / "whole"))


IN_JUPYTER = """
import os
import signal
from pathlib import Path
from helpers.tests.training.small_runs import SETTINGS, new_model
from helpers.training import corpus as text, pretrain

corpus = text.load({texts!r}, 300)
batch = corpus.batch

def interrupted(step, *sizes):
    if step == 5:
        os.kill(os.getpid(), signal.SIGINT)
    return batch(step, *sizes)

corpus.batch = interrupted
pretrain.train(new_model(), corpus, SETTINGS, {out!r})
"""


@pytest.mark.slow
def test_jupyter_shows_the_message_of_an_interrupt_and_no_traceback(texts, tmp_path):
    manager, client = start_new_kernel(startup_timeout=TIMEOUT)
    shown = []
    code = IN_JUPYTER.format(texts=str(texts), out=str(tmp_path / "run"))
    try:
        reply = client.execute_interactive(
            code, timeout=TIMEOUT, output_hook=shown.append
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply["content"]["ename"] == "Stopped"
    [error] = [entry for entry in shown if entry["msg_type"] == "error"]
    assert error["content"]["traceback"] == [
        "stopped after step 6 of 12: saved in run; the same call goes on from there"
    ]


@pytest.mark.slow
def test_cut_off_in_the_midst_of_a_step_the_same_model_goes_on_to_the_same_bits(
    corpus, tmp_path, monkeypatch
):
    model = new_model()
    losses = pretrain.losses
    calls = []

    def cut(*args):
        result = losses(*args)
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(pretrain, "losses", cut)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(model, corpus, SETTINGS, tmp_path / "cut", save_every=2)
    assert step_of(tmp_path / "cut") == 4
    pretrain.train(model, corpus, SETTINGS, tmp_path / "cut", save_every=2)
    pretrain.train(new_model(), corpus, SETTINGS, tmp_path / "whole")
    Bits(tmp_path / "cut").must_be(Bits(tmp_path / "whole"))


@pytest.mark.slow
def test_a_finished_run_is_read_and_not_trained(corpus, tmp_path, monkeypatch):
    first = pretrain.train(new_model(), corpus, SETTINGS, tmp_path / "run")
    before = newest(tmp_path / "run")
    asked = counted(corpus, monkeypatch)
    model = new_model(seed=1)
    assert pretrain.train(model, corpus, SETTINGS, tmp_path / "run") == first
    assert asked == []
    assert not model.training
    assert newest(tmp_path / "run") == before
    Bits(tmp_path / "run").must_be(Bits(tmp_path / "run", model))


@pytest.mark.slow
def test_another_config_corpus_or_settings_in_the_folder_is_named(
    corpus, tmp_path, texts
):
    two_steps = replace(SETTINGS, steps=2)
    pretrain.train(new_model(), corpus, two_steps, tmp_path / "run")
    before = Bits(tmp_path / "run")
    smaller = small(vocab_size=300, initializer_range=0.05, num_hidden_layers=1)
    cases = (
        (DeepSeekV3(smaller), corpus, two_steps, "config"),
        (new_model(), text.load(texts, 299), two_steps, "corpus"),
        (new_model(), corpus, replace(SETTINGS, steps=3), "settings"),
    )
    for model, other, settings, name in cases:
        message = f"run was made with another {name}.*another folder"
        with pytest.raises(ValueError, match=message):
            pretrain.train(model, other, settings, tmp_path / "run")
    Bits(tmp_path / "run").must_be(before)


def test_save_every_is_a_count(corpus, tmp_path):
    with pytest.raises(ValueError, match="save_every=0 cannot work"):
        pretrain.train(new_model(), corpus, SETTINGS, tmp_path / "run", save_every=0)


@pytest.mark.slow
def test_a_run_in_the_working_directory_and_one_reached_by_a_link(
    corpus, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.chdir(run)
    first = pretrain.train(new_model(), corpus, replace(SETTINGS, steps=2), ".")
    (tmp_path / "link").symlink_to(run)
    again = pretrain.train(
        new_model(), corpus, replace(SETTINGS, steps=2), tmp_path / "link"
    )
    assert again == first
    assert (tmp_path / ".run.lock").exists()


# -------------------------------------------------------------------------- divergence


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [1, 2, 100])
def test_a_loss_that_is_not_finite_stops_with_advice_and_the_last_good_checkpoint(
    corpus, tmp_path, save_every
):
    settings = replace(SETTINGS, lr=1e30, warmup_steps=0)
    message = (
        r"loss is (nan|inf) at step \d+; .*"
        r"lr.*1e\+30.*warmup_steps.*initializer_range"
    )
    with pytest.raises(TrainingDiverged, match=message) as error:
        pretrain.train(new_model(), corpus, settings, tmp_path / "run", save_every)
    found = re.search(r"the checkpoint of step (\d+) is in", str(error.value))
    if found is None:
        assert "no checkpoint was saved" in str(error.value)
        assert not (tmp_path / "run").exists()
        return
    model = checkpoint.load(tmp_path / "run")
    assert step_of(tmp_path / "run") == int(found[1])
    assert math.isfinite(pretrain.evaluate(model, corpus.valid_batch(3, 17)))


@pytest.mark.slow
def test_weights_spoilt_in_the_midst_of_a_run_are_not_saved_over_the_good_ones(
    corpus, tmp_path, monkeypatch
):
    model = new_model()

    def spoil():
        model.norm.weight.data.fill_(float("inf"))

    counted(corpus, monkeypatch, 7, spoil)
    message = "at step 7; the checkpoint of step 6 is in"
    with pytest.raises(TrainingDiverged, match=message):
        pretrain.train(model, corpus, SETTINGS, tmp_path / "run", save_every=1)
    assert step_of(tmp_path / "run") == 6
    good = new_model()
    pretrain.train(good, corpus, SETTINGS, tmp_path / "run")
    whole = new_model()
    pretrain.train(whole, corpus, SETTINGS, tmp_path / "whole")
    Bits(tmp_path / "run", good).must_be(Bits(tmp_path / "whole", whole))


@pytest.mark.slow
def test_a_last_step_that_spoils_the_model_is_noticed(corpus, tmp_path, monkeypatch):
    model = new_model()
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def spoil(*args):
        calls.append(1)
        clip(*args)
        if len(calls) == 12:
            model.norm.weight.grad.fill_(float("nan"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    message = "at step 12; the checkpoint of step 10 is in"
    with pytest.raises(TrainingDiverged, match=message):
        pretrain.train(model, corpus, SETTINGS, tmp_path / "run", save_every=5)
    assert step_of(tmp_path / "run") == 10


def test_vectors_are_not_decayed(corpus):
    optimizer = loop.adamw(new_model(), SETTINGS)
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == SETTINGS.weight_decay
    assert vectors["weight_decay"] == 0
    assert {p.dim() for p in vectors["params"]} == {1}
    assert optimizer.defaults["betas"] == (SETTINGS.beta1, SETTINGS.beta2)
