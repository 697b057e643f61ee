"""GRPO and fine-tuning stopped, killed, kept and read again."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from helpers.checks import InputError
from helpers.reasoning import grpo as grpo_module
from helpers.reasoning import sft as sft_module
from helpers.reasoning.countdown import problems, tokenizer
from helpers.reasoning.grpo import grpo
from helpers.reasoning.rollout import rollout
from helpers.reasoning.sft import sft
from helpers.tests.builders import draw
from helpers.tests.reasoning.small_models import (
    CONFIG,
    EXAMPLES,
    LESSON,
    SETTINGS,
    WAYS,
    assert_same_bits,
    bits,
    changed,
    dense,
    generator,
    interrupted,
    power_cut,
    train_some,
    without_seconds,
)
from helpers.training import runs
from helpers.v3 import DeepSeekV3, checkpoint

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PROMPT = 9  # tokens of a question


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path / "home"))


@pytest.fixture
def base():
    return draw(CONFIG)


@pytest.fixture
def save_often(monkeypatch):
    """A checkpoint every three steps."""
    monkeypatch.setattr(grpo_module, "SAVE_EVERY", 3)
    monkeypatch.setattr(sft_module, "SAVE_EVERY", 3)


def step_of(folder):
    return checkpoint.load_training(folder).state["step"]


def references_in(folder):
    tensors = checkpoint.load_training(folder).tensors
    return [name for name in tensors if name.startswith("reference.")]


# ------------------------------------------------------------ stopped, killed, gone on


@pytest.mark.slow
@WAYS
def test_stopped_by_ctrl_c_the_same_call_ends_in_the_same_bits(
    base, kind, tmp_path, monkeypatch
):
    whole, history = train_some(kind, base, tmp_path / "whole")
    updates = 1 if kind == "sft" else 2  # optimizer steps in a step
    steps = interrupted(
        monkeypatch, 5 * updates + 1, lambda: os.kill(os.getpid(), signal.SIGINT)
    )
    handler = signal.getsignal(signal.SIGINT)
    message = "stopped after step 6 of 10: saved in run; the same call goes on"
    with pytest.raises(KeyboardInterrupt, match=message):
        train_some(kind, base, tmp_path / "run")
    assert len(steps) == 6 * updates
    assert signal.getsignal(signal.SIGINT) is handler
    assert step_of(tmp_path / "run") == 6

    model, again = train_some(kind, base, tmp_path / "run")
    assert len(steps) == 10 * updates
    assert without_seconds(again) == without_seconds(history)
    assert_same_bits(bits(tmp_path / "run"), bits(tmp_path / "whole"))
    assert not changed(whole.state_dict(), model.state_dict())
    has_reference = kind == "grpo with a reference"
    assert bool(references_in(tmp_path / "run")) == has_reference


@pytest.mark.slow
@WAYS
def test_cut_off_in_the_midst_of_a_step_it_goes_on_from_the_last_checkpoint(
    base, kind, tmp_path, monkeypatch, save_often
):
    train_some(kind, base, tmp_path / "whole")
    # between the two updates of step 8 in GRPO
    interrupted(monkeypatch, 8 if kind == "sft" else 16, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train_some(kind, base, tmp_path / "run")
    assert step_of(tmp_path / "run") == 6
    train_some(kind, base, tmp_path / "run")
    assert_same_bits(bits(tmp_path / "run"), bits(tmp_path / "whole"))


@pytest.mark.slow
def test_cut_off_after_a_checkpoint_at_a_watched_step_nothing_is_watched_twice(
    base, tmp_path, monkeypatch, save_often
):
    watched = {
        "watch": lambda model, step: {"step": step},
        "watch_at": (0, 3, 6, 9),
    }
    _, whole = train_some("grpo", base, tmp_path / "whole", **watched)
    interrupted(monkeypatch, 16, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train_some("grpo", base, tmp_path / "run", **watched)
    _, history = train_some("grpo", base, tmp_path / "run", **watched)
    assert whole["watch"] == [{"step": step} for step in (0, 3, 6, 9, 10)]
    assert without_seconds(history) == without_seconds(whole)


@pytest.mark.slow
@WAYS
def test_reworded_code_goes_on_from_a_run_that_is_half_finished(
    base, kind, tmp_path, monkeypatch, save_often
):
    """Its first steps are computed once more; policy and reference stay untouched."""
    code = runs.code_hash(f"helpers.reasoning.{kind.split()[0]}")
    train_some(kind, base, tmp_path / "whole")
    interrupted(monkeypatch, 8 if kind == "sft" else 16, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train_some(kind, base, tmp_path / "run")
    monkeypatch.setattr(runs, "code_hash", lambda module: "0" * 12)
    train_some(kind, base, tmp_path / "run")
    assert len(list(tmp_path.glob("run*"))) == 1, "it was not taken for stale"
    found, (step, history) = bits(tmp_path / "run")
    expected, (same_step, same_history) = bits(tmp_path / "whole")
    assert not changed(found, expected)
    assert step == same_step
    assert history["provenance"]["code"] == code
    for name in set(history) - {"provenance"}:
        assert history[name] == same_history[name], name


@pytest.mark.slow
def test_a_run_in_which_nothing_could_be_learnt_can_be_read_again(
    base, monkeypatch, tmp_path
):
    monkeypatch.setattr(grpo_module, "reward", lambda *_: 1.2)
    settings = replace(SETTINGS, steps=2)
    _, first = grpo(base, settings, "nothing", folder=tmp_path / "run")
    again, second = grpo(base, settings, "nothing", folder=tmp_path / "run")
    assert first == second
    assert not changed(base.state_dict(), again.state_dict())


SCRIPT = """
import json
import sys

from helpers.reasoning import grpo, sft
from helpers.v3 import DeepSeekV3, V3Config

import torch

torch.set_num_threads(1)
torch.manual_seed(5)
folder, config, settings, lesson, examples = sys.argv[1:]
base = DeepSeekV3(V3Config(**json.loads(config)))
grpo.SAVE_EVERY = 3
sft.SAVE_EVERY = 3
settings = grpo.GRPO(**json.loads(settings))
model, _ = grpo.grpo(base, settings, "killed", folder=folder + "/grpo")
lesson = sft.SFT(**json.loads(lesson))
sft.sft(model, json.loads(examples), lesson, "killed", folder + "/sft")
"""


def start_script(folder, settings, lesson):
    words = [json.dumps(x) for x in (asdict(CONFIG), asdict(settings), asdict(lesson))]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, folder, *words, json.dumps(EXAMPLES)],
        cwd=Path(__file__).parents[3],
        text=True,
        encoding="utf-8",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_until(happens, process, seconds):
    """Until `happens()` or the process has ended."""
    while process.poll() is None and not happens():
        time.sleep(seconds)


@pytest.mark.slow
def test_killed_in_grpo_and_in_fine_tuning_and_run_again_they_end_in_the_same_bits(
    tmp_path,
):
    """RL with a reference that is refreshed, then fine-tuning of what came out.

    Killed once in each, the second time while it writes.
    """
    settings = replace(SETTINGS, steps=20, refresh=4, kl=0.1)
    lesson = replace(LESSON, epochs=6)
    run = tmp_path / "run"
    rng = random.Random(0)

    def saved():
        return (run / part / "latest").is_symlink()

    def writes():
        return any((run / part).glob(".part-*"))

    killed = []
    for part in ("grpo", "sft"):
        process = start_script(run, settings, lesson)
        wait_until(saved, process, 0.002)
        if part == "sft":
            wait_until(writes, process, 0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had ended before"
        killed.append(step_of(run / part))
    process = start_script(run, settings, lesson)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert 0 < killed[0] < 20
    assert 0 < killed[1] < 30

    torch.manual_seed(5)
    base = DeepSeekV3(CONFIG)
    model, _ = grpo(base, settings, "whole", folder=tmp_path / "grpo")
    sft(model, EXAMPLES, lesson, "whole", tmp_path / "sft")
    for part in ("grpo", "sft"):
        assert_same_bits(bits(run / part), bits(tmp_path / part))
    assert references_in(run / "grpo")
    assert not references_in(run / "sft")


# ---------------------------------------------------------------- kept and read again


@pytest.mark.slow
@WAYS
def test_a_finished_run_is_read_and_not_trained(base, kind, monkeypatch):
    model, history = train_some(kind, base)
    monkeypatch.setattr(grpo_module, "answer_log_probs", None)
    monkeypatch.setattr(sft_module, "token_log_probs", None)
    again, same = train_some(kind, base)
    assert same == history
    assert not changed(model.state_dict(), again.state_dict())
    assert not again.training


def folders():
    cache = runs.cache_dir()
    if not cache.exists():
        return set()
    return {path.name for path in cache.iterdir() if path.is_dir()}


@pytest.mark.slow
def test_another_base_settings_or_examples_is_another_run(base):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.layers[1].mlp.gate.e_score_correction_bias[0] += 0.25
    few = replace(SETTINGS, steps=1)
    calls = [
        lambda: grpo(base, few, "My Run"),
        lambda: grpo(other, few, "My Run"),
        lambda: grpo(base, replace(few, seed=1), "My Run"),
        lambda: grpo(base, few, "My Run", lambda model, step: step, (0,)),
        lambda: sft(base, EXAMPLES, LESSON, "My Run"),
        lambda: sft(other, EXAMPLES, LESSON, "My Run"),
        lambda: sft(base, EXAMPLES[1:], LESSON, "My Run"),
        lambda: sft(base, EXAMPLES, replace(LESSON, lr=1e-4), "My Run"),
    ]
    for n, call in enumerate(calls, start=1):
        call()
        assert len(folders()) == n
    assert all(name.startswith("my-run-") for name in folders())
    calls[0]()
    assert len(folders()) == len(calls)


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused(base, tmp_path):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.layers[1].mlp.gate.e_score_correction_bias[0] += 0.25
    few = replace(SETTINGS, steps=1)
    kept = tmp_path / "kept"
    grpo(base, few, "x", folder=kept)
    before = bits(kept)
    with pytest.raises(ValueError, match="was made with another base"):
        grpo(other, few, "x", folder=kept)
    with pytest.raises(ValueError, match="was made with another settings"):
        grpo(base, replace(few, lr=1e-5), "x", folder=kept)
    with pytest.raises(ValueError, match="was made with another"):
        sft(base, EXAMPLES, LESSON, "x", kept)
    assert_same_bits(bits(kept), before)


def test_a_transformers_model_takes_no_folder(tmp_path):
    with pytest.raises(InputError, match="folder=.*save_pretrained"):
        grpo(dense("llama"), SETTINGS, "x", folder=tmp_path / "run")
    with pytest.raises(InputError, match="folder=.*save_pretrained"):
        sft(dense("llama"), EXAMPLES, LESSON, "x", tmp_path / "run")


@pytest.mark.slow
def test_two_seeds_differ_and_one_seed_repeats(base, tmp_path):
    models = []
    for n, seed in enumerate((0, 0, 1)):
        settings = replace(SETTINGS, steps=2, seed=seed)
        model, _ = grpo(base, settings, "seeds", folder=tmp_path / str(n))
        models.append(model.state_dict())
    assert not changed(models[0], models[1])
    assert changed(models[0], models[2])


@pytest.mark.slow
@WAYS
def test_a_checkpoint_opens_in_transformers_and_writes_the_same_greedy_text(
    base, kind, tmp_path, ignore_mtp_layers
):
    ignore_mtp_layers(CONFIG)
    run = tmp_path / "run"
    model, _ = train_some(kind, base, run)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        run / "latest", dtype=torch.float32, output_loading_info=True
    )
    for kind_of_key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind_of_key]
    asked = problems("test", 12, 0)
    ours = rollout(model, asked, 40, generator(), 0.0)
    texts = rollout(theirs.eval(), asked, 40, generator(), 0.0).texts
    assert texts == ours.texts
    assert len(set(texts)) > 6

    file = str(run / "latest" / "tokenizer.json")
    words = PreTrainedTokenizerFast(tokenizer_file=file)
    encoded = tokenizer().encode(asked[0].prompt).ids
    assert words(asked[0].prompt)["input_ids"] == encoded
    answer = ours.tokens[0, PROMPT : PROMPT + ours.lengths[0]]
    assert words.decode(answer, skip_special_tokens=True) == texts[0]
    again = rollout(checkpoint.load(run), asked, 40, generator(), 0.0)
    assert torch.equal(again.tokens, ours.tokens)
