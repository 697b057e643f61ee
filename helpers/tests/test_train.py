import _thread
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from helpers import checkpoint, data, facts, store, train
from helpers.model import DeepSeekV3, V3Config
from helpers.tests.test_data import write_texts
from helpers.tests.test_model import draw, ids, one_thread, same_random_numbers, small  # noqa: F401
from helpers.train import Settings, TrainingDiverged, learning_rate

CONFIG = small(vocab_size=300, initializer_range=0.05, num_hidden_layers=2)
SETTINGS = Settings(
    steps=12,
    batch_size=2,
    length=16,
    warmup_steps=2,
    valid_every=4,
    valid_sequences=3,
    gamma=0.01,
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture
def corpus(texts):
    """A corpus of its own for each test, so that its methods may be replaced."""
    return data.load(texts, 300)


def new_model(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return DeepSeekV3(config)


def bits(folder, model=None):
    """Everything that a run ends with: tensors of model and optimizer, step and history without the seconds."""
    model = checkpoint.load(folder) if model is None else model
    extra, state = checkpoint.load_training(folder)
    history = {
        name: value for name, value in state["history"].items() if name != "seconds"
    }
    return model.state_dict() | extra, (state["step"], history)


def assert_same_bits(a, b):
    assert a[0].keys() == b[0].keys() and a[1] == b[1]
    for name in a[0]:
        assert torch.equal(a[0][name], b[0][name]), name


# ------------------------------------------------------------------------------------------------- killed and resumed, from a shell


class Shell:
    """`python -m helpers.train` on the small corpus."""

    def __init__(self, folder, texts):
        self.folder, self.texts, self.config = folder, texts, folder / "config.json"
        self.config.write_text(json.dumps(CONFIG.to_hf()))

    def start(self, out, *more, steps=40, save_every=2):
        command = [
            sys.executable,
            "-m",
            "helpers.train",
            "--out",
            out,
            "--text",
            self.texts,
            "--config",
            self.config,
            "--steps",
            steps,
            "--batch-size",
            2,
            "--length",
            16,
            "--warmup-steps",
            2,
            "--valid-every",
            7,
            "--valid-sequences",
            3,
            "--save-every",
            save_every,
            *more,
        ]
        return subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(train.__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def finish(self, out, *more, **sizes):
        process = self.start(out, *more, **sizes)
        text, errors = process.communicate(timeout=60)
        return process.returncode, text, errors


@pytest.fixture(scope="module")
def shell(tmp_path_factory, texts):
    return Shell(tmp_path_factory.mktemp("shell"), texts)


@pytest.fixture(scope="module")
def never_stopped(shell):
    code, text, errors = shell.finish(shell.folder / "whole")
    assert code == 0, errors
    assert re.search(
        r"validation loss \d\.\d+ nats per token, \d\.\d+ bits per byte, .*checkpoint in ",
        text,
    )
    return bits(shell.folder / "whole")


def wait_for_progress(process, out, before, part):
    """Until a checkpoint is newer than `before`, and with `part` until one is being written. False when the run ended first."""
    while process.poll() is None:
        time.sleep(0.002)
        newest = os.readlink(out / "latest") if (out / "latest").is_symlink() else ""
        if newest != before and (not part or any(out.glob(".part-*"))):
            return True
    return False


def test_killed_at_several_moments_and_resumed_a_run_ends_with_the_same_bits(
    shell, never_stopped
):
    out, rng, killed, steps = shell.folder / "killed", random.Random(0), 0, []
    for attempt in range(4):
        before = os.readlink(out / "latest") if out.exists() else ""
        process = shell.start(out, save_every=1 + attempt % 3)
        if wait_for_progress(process, out, before, part=attempt % 2):
            time.sleep(rng.uniform(0, 0.02 if attempt % 2 else 0.1))
            process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        steps.append(checkpoint.load_training(out)[1]["step"])
        checkpoint.load(out)
    code, _, errors = shell.finish(out)
    assert code == 0, errors
    assert killed >= 3 and steps == sorted(set(steps)) and steps[2] < 40
    assert_same_bits(bits(out), never_stopped)


def test_interrupted_from_a_shell_it_says_how_to_go_on_and_ends_with_the_same_bits(
    shell, never_stopped
):
    out = shell.folder / "interrupted"
    process = shell.start(out, save_every=3)
    assert wait_for_progress(process, out, "", part=False)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    step = int(
        re.search(
            r"stopped after step (\d+) of 40: saved in interrupted; the same call goes on from there",
            text,
        )[1]
    )
    assert checkpoint.load_training(out)[1]["step"] == step < 40
    code, _, errors = shell.finish(out)
    assert code == 0, errors
    assert_same_bits(bits(out), never_stopped)


def test_what_is_wrong_is_one_line_in_the_shell(shell, never_stopped):
    code, _, errors = shell.finish(shell.folder / "whole", "--lr", 0.1)
    assert (
        code == 1
        and "Traceback" not in errors
        and "another settings" in errors.splitlines()[-1]
    )


# --------------------------------------------------------------------------------------------------------- stopped, in this process


def counted(corpus, monkeypatch, at, act):
    """Let `act` happen when the batch of step `at` is asked for, once; returns the list of steps asked for."""
    asked, batch = [], corpus.batch

    def hooked(step, *args):
        asked.append(step)
        if step == at and asked.count(at) == 1:
            act()
        return batch(step, *args)

    monkeypatch.setattr(corpus, "batch", hooked)
    return asked


@pytest.mark.parametrize("folder", [None, "run"])
def test_interrupted_in_jupyter_the_step_is_finished_and_the_same_call_goes_on(
    corpus, tmp_path, monkeypatch, capsys, folder
):
    out = folder and tmp_path / folder
    asked = counted(corpus, monkeypatch, 5, _thread.interrupt_main)
    model, handler = new_model(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.train(model, corpus, SETTINGS, out)
    assert asked == [0, 1, 2, 3, 4, 5] and signal.getsignal(signal.SIGINT) is handler
    message = capsys.readouterr().out
    assert (
        "stopped after step 6 of 12" in message
        and ("the same call goes on" if folder else "keeps what it has learnt")
        in message
    )
    if folder:
        assert_same_bits(bits(out), bits(out, model))
        train.train(model, corpus, SETTINGS, out)
        assert asked[6:] == [6, 7, 8, 9, 10, 11]
        train.train(whole := new_model(), corpus, SETTINGS, tmp_path / "whole")
        assert_same_bits(bits(out), bits(tmp_path / "whole"))
        assert_same_bits(bits(out, model), bits(out, whole))


def test_cut_off_in_the_midst_of_a_step_the_same_model_goes_on_to_the_same_bits(
    corpus, tmp_path, monkeypatch
):
    model, losses, calls = new_model(), train.losses, []

    def cut(*args):
        result = losses(*args)
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(train, "losses", cut)
    with pytest.raises(KeyboardInterrupt):
        train.train(model, corpus, SETTINGS, tmp_path / "cut", save_every=2)
    assert checkpoint.load_training(tmp_path / "cut")[1]["step"] in (4, 6)
    train.train(model, corpus, SETTINGS, tmp_path / "cut", save_every=2)
    train.train(new_model(), corpus, SETTINGS, tmp_path / "whole")
    assert_same_bits(bits(tmp_path / "cut"), bits(tmp_path / "whole"))


def test_a_finished_run_is_read_and_not_trained(corpus, tmp_path, monkeypatch):
    first = train.train(new_model(), corpus, SETTINGS, tmp_path / "run")
    asked = counted(corpus, monkeypatch, -1, None)
    model = new_model(seed=1)
    assert (
        train.train(model, corpus, SETTINGS, tmp_path / "run") == first
        and asked == []
        and not model.training
    )
    assert_same_bits(bits(tmp_path / "run"), bits(tmp_path / "run", model))


def test_run_caches_under_the_home_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path))
    state = torch.random.get_rng_state()
    asked = counted(corpus, monkeypatch, -1, None)
    first, history = train.run(CONFIG, corpus, SETTINGS, "My Run")
    assert len(asked) == 12 and [
        p.name.rsplit("-", 1)[0] for p in store.cache_dir().iterdir()
    ] == ["my-run"]
    again, same = train.run(CONFIG, corpus, SETTINGS, "My Run")
    assert len(asked) == 12 and same == history
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    train.run(CONFIG, corpus, replace(SETTINGS, steps=3, seed=1), "My Run")
    assert len(asked) == 15 and len(list(store.cache_dir().iterdir())) == 2
    assert torch.equal(state, torch.random.get_rng_state())


def test_another_config_corpus_or_settings_in_the_folder_is_named(
    corpus, tmp_path, texts
):
    train.train(new_model(), corpus, replace(SETTINGS, steps=2), tmp_path / "run")
    before = bits(tmp_path / "run")
    other = small(vocab_size=300, initializer_range=0.05, num_hidden_layers=1)
    for model, text, settings, name in (
        (DeepSeekV3(other), corpus, replace(SETTINGS, steps=2), "config"),
        (new_model(), data.load(texts, 299), replace(SETTINGS, steps=2), "corpus"),
        (new_model(), corpus, replace(SETTINGS, steps=3), "settings"),
    ):
        with pytest.raises(
            ValueError, match=f"run was made with another {name}.*another folder"
        ):
            train.train(model, text, settings, tmp_path / "run")
    assert_same_bits(bits(tmp_path / "run"), before)


def test_a_corpus_or_length_that_does_not_fit_is_named(corpus, tmp_path):
    for config, settings, message in (
        (CONFIG.with_(vocab_size=200), SETTINGS, "vocab_size=200.*300"),
        (CONFIG, replace(SETTINGS, length=1), "length=1.*num_nextn_predict_layers=1"),
        (CONFIG, replace(SETTINGS, length=65), "max_position_embeddings=64"),
        (
            CONFIG.with_(max_position_embeddings=10**6),
            replace(SETTINGS, length=10**6 - 1),
            "window of 1000000 tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train.train(DeepSeekV3(config), corpus, settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("save_every", [1, 2, 100])
def test_a_loss_that_is_not_finite_stops_with_step_and_advice_and_keeps_the_last_good_checkpoint(
    corpus, tmp_path, save_every
):
    settings = replace(SETTINGS, lr=1e30, warmup_steps=0)
    with pytest.raises(
        TrainingDiverged,
        match=r"loss is (nan|inf) at step \d+; .*lr.*1e\+30.*warmup_steps.*initializer_range",
    ) as error:
        train.train(new_model(), corpus, settings, tmp_path / "run", save_every)
    found = re.search(r"the checkpoint of step (\d+) is in", str(error.value))
    if found is None:
        assert (
            "no checkpoint was saved" in str(error.value)
            and not (tmp_path / "run").exists()
        )
    else:
        model = checkpoint.load(tmp_path / "run")
        assert checkpoint.load_training(tmp_path / "run")[1]["step"] == int(found[1])
        assert math.isfinite(train.evaluate(model, corpus.valid_batch(3, 17)))


def test_weights_spoilt_in_the_midst_of_a_run_are_not_saved_over_the_good_ones(
    corpus, tmp_path, monkeypatch
):
    model = new_model()
    counted(corpus, monkeypatch, 7, lambda: model.norm.weight.data.fill_(float("inf")))
    with pytest.raises(
        TrainingDiverged, match="at step 7; the checkpoint of step 6 is in"
    ):
        train.train(model, corpus, SETTINGS, tmp_path / "run", save_every=1)
    assert checkpoint.load_training(tmp_path / "run")[1]["step"] == 6
    train.train(good := new_model(), corpus, SETTINGS, tmp_path / "run")
    train.train(whole := new_model(), corpus, SETTINGS, tmp_path / "whole")
    assert_same_bits(bits(tmp_path / "run", good), bits(tmp_path / "whole", whole))


def test_a_last_step_that_spoils_the_model_is_noticed(corpus, tmp_path, monkeypatch):
    model, clip, calls = new_model(), torch.nn.utils.clip_grad_norm_, []

    def spoil(*args):
        calls.append(1)
        clip(*args)
        if len(calls) == 12:
            model.norm.weight.grad.fill_(float("nan"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    with pytest.raises(
        TrainingDiverged, match="at step 12; the checkpoint of step 10 is in"
    ):
        train.train(model, corpus, SETTINGS, tmp_path / "run", save_every=5)
    assert checkpoint.load_training(tmp_path / "run")[1]["step"] == 10


# ------------------------------------------------------------------------------------------------------- schedule, losses, history


def test_the_learning_rate_follows_the_papers_proportions():
    def fact(name):
        return facts.fact(f"v3.train.{name}").value

    settings = Settings(
        steps=14800, lr=fact("lr"), warmup_steps=20
    )  # one step is a billion tokens
    constant, cosine = fact("constant_until_tokens") / 1e9, fact("cosine_tokens") / 1e9
    ends = constant + cosine, constant + cosine + fact("final_tokens_1") / 1e9
    assert ends[1] + fact("final_tokens_2") / 1e9 == pytest.approx(14800)
    for step, rate in (
        (0, fact("lr") / 20),
        (9, fact("lr") / 2),
        (19, fact("lr")),
        (20, fact("lr")),
        (constant - 1, fact("lr")),
        (constant + cosine / 2, (fact("lr") + fact("final_lr_1")) / 2),
        (ends[0] + 1, fact("final_lr_1")),
        (ends[1] - 1, fact("final_lr_1")),
        (ends[1] + 1, fact("final_lr_2")),
        (14799, fact("final_lr_2")),
    ):
        assert learning_rate(int(step), settings) == pytest.approx(rate), step
    falling = [learning_rate(step, settings) for step in range(int(constant), 14800)]
    assert falling == sorted(falling, reverse=True)
    assert learning_rate(0, Settings(warmup_steps=0)) == Settings().lr


def test_losses_are_the_papers_means():
    model = draw(small(num_nextn_predict_layers=2)).train()
    tokens = ids(model.config, 2, 10)
    main, mtp, balance = train.losses(model, tokens)
    assert all(router.balance_loss == 0.0 for router in model.routers()), (
        "the model must not hold on to the graph"
    )
    text = tokens[:, :-1]
    model.predict_further(model.hidden(text), text)
    balances = [router.balance_loss.item() for router in model.routers()]
    model.eval()
    hidden = model.hidden(text)
    logits = [model.lm_head(hidden), *model.predict_further(hidden, text)]
    by_hand = []
    for k, scores in enumerate(logits):
        scores = scores.log_softmax(dim=-1)
        by_hand.append(
            -sum(
                scores[b, i, tokens[b, i + k + 1]]
                for b in range(2)
                for i in range(9 - k)
            ).item()
            / (2 * (9 - k))
        )
    assert main.item() == pytest.approx(
        by_hand[0], rel=1e-5
    ) and mtp.item() == pytest.approx(sum(by_hand[1:]) / 2, rel=1e-5)
    assert (
        len(balances) == 4
        and balance.item() == pytest.approx(sum(balances), rel=1e-5)
        and min(balances) > 0
    )
    assert train.evaluate(model, tokens, batch_size=1) == pytest.approx(
        main.item(), rel=1e-5
    )
    dense = DeepSeekV3(small(num_nextn_predict_layers=0, first_k_dense_replace=3))
    assert [x.item() for x in train.losses(dense, tokens)[1:]] == [0, 0]


def test_evaluate_leaves_mode_and_loads_as_they_are(corpus):
    model = new_model().train()
    train.losses(model, corpus.batch(0, 0, 2, 17))
    loads = [router.load.clone() for router in model.routers()]
    train.evaluate(model, corpus.valid_batch(3, 17))
    assert (
        model.training
        and all(
            torch.equal(a, r.load) for a, r in zip(loads, model.routers(), strict=True)
        )
        and loads[0].sum() > 0
    )


def test_max_violation_by_hand():
    assert train.max_violation(torch.tensor([4.0, 2, 1, 1])) == pytest.approx(1.0)
    assert (
        train.max_violation(torch.full((5,), 3.0)) == 0.0
        and train.max_violation(torch.zeros(4)) == -1.0
    )


def test_the_history_has_an_entry_per_step_and_snapshots(corpus):
    model = new_model()
    history = train.train(model, corpus, replace(SETTINGS, steps=10))
    assert {name: len(history[name]) for name in history if name != "seconds"} == {
        "loss": 10,
        "mtp_loss": 10,
        "lr": 10,
        "max_violation": 10,
        "valid_step": 3,
        "valid_loss": 3,
        "load": 3,
        "bias": 3,
    }
    assert history["valid_step"] == [4, 8, 10] and history["seconds"] > 0
    assert history["lr"] == [
        learning_rate(step, replace(SETTINGS, steps=10)) for step in range(10)
    ]
    last = torch.tensor(history["load"][-1])
    assert (
        last.shape == (2, 8)
        and last[0].sum() == 2 * 16 * 3
        and last[1].sum() == 2 * 15 * 3
    )  # the MTP layer sees one token less
    assert history["max_violation"][-1] == pytest.approx(
        sum(train.max_violation(load) for load in last) / 2
    )
    assert history["valid_loss"][-1] == train.evaluate(model, corpus.valid_batch(3, 17))


def test_the_bias_moves_by_gamma_until_the_cosine_ends(corpus):
    model = new_model()
    history = train.train(model, corpus, replace(SETTINGS, steps=60, valid_every=1))
    bias, load = torch.tensor(history["bias"]), torch.tensor(history["load"])
    for step in range(59):
        error = load[step].mean(dim=-1, keepdim=True) - load[step]
        gamma = 0.01 if step / 60 * 14.8 < 14.3 else 0.0
        assert torch.allclose(
            bias[step + 1], bias[step] + gamma * error.sign(), atol=1e-6
        ), step
    assert torch.equal(bias[59], bias[58]) and not torch.equal(bias[58], bias[57])


def test_the_mtp_weight_changes_where_the_constant_phase_ends(corpus):
    settings = replace(
        SETTINGS, steps=6, warmup_steps=0, valid_every=1
    )  # the steps before 6 * 10 / 14.8 = 4.05, so the first five
    plain, last = (
        train.train(new_model(), corpus, s)["valid_loss"]
        for s in (settings, replace(settings, mtp_lambda_last=50.0))
    )
    first = train.train(new_model(), corpus, replace(settings, mtp_lambda=50.0))[
        "valid_loss"
    ]
    assert plain[:5] == last[:5] and plain[5] != last[5] and first[0] != plain[0]


def test_the_loss_goes_down_on_a_small_text(corpus):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    model = new_model()
    after = torch.random.get_rng_state()
    history = train.train(
        model,
        corpus,
        replace(SETTINGS, steps=60, batch_size=4, valid_every=60, lr=1e-2),
    )
    assert torch.equal(after, torch.random.get_rng_state()) and not torch.equal(
        after, state
    )
    assert (
        history["loss"][0] > 5
        and sum(history["loss"][-5:]) / 5 < 3
        and history["valid_loss"][0] < 3.5
    )
    assert history["mtp_loss"][-1] < history["mtp_loss"][0] - 1 and not model.training


# ------------------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", [f.name for f in fields(Settings)])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", None, True])
def test_a_setting_that_cannot_work_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        Settings(**{name: value})


@pytest.mark.parametrize(
    "name", ["steps", "batch_size", "length", "valid_every", "valid_sequences"]
)
def test_a_count_of_zero_or_a_fraction_is_named(name):
    for value in (0, 1.5):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            Settings(**{name: value})


def test_the_defaults_are_the_papers_where_they_carry_over():
    for ours, theirs in (
        ("beta1", "beta1"),
        ("beta2", "beta2"),
        ("weight_decay", "weight_decay"),
        ("grad_clip", "grad_clip"),
        ("alpha", "alpha"),
        ("mtp_lambda", "lambda_first"),
        ("mtp_lambda_last", "lambda_last"),
    ):
        assert getattr(Settings(), ours) == facts.fact(f"v3.train.{theirs}").value
    assert (train.TOTAL, train.CONSTANT, train.COSINE) == tuple(
        facts.fact(f"v3.{name}").value / 1e12
        for name in ("tokens", "train.constant_until_tokens", "train.gamma_tokens")
    )
    assert V3Config.tiny().initializer_range == pytest.approx(
        0.006 * math.sqrt(7168 / 128), rel=0.01
    )
