"""Several processes train what one trains; a killed worker changes nothing. The processes are real: torchrun, gloo, four and two of them."""

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch

from helpers import checkpoint, data, parallel, train
from helpers.model import DeepSeekV3
from helpers.tests.test_data import write_texts
from helpers.tests.test_model import draw, ids, one_thread, same_random_numbers, small  # noqa: F401
from helpers.train import Settings

CONFIG = small(vocab_size=300, initializer_range=0.05, num_hidden_layers=2)
SETTINGS = Settings(
    steps=20,
    batch_size=8,
    length=16,
    warmup_steps=20,
    valid_every=7,
    valid_sequences=4,
    gamma=0.01,
)
KILLS = 2
LIMIT = 900  # seconds that torchrun and what it starts may live; they need 15 of them on two free cores


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts")


class Torchrun:
    """torchrun with everything that it started: leaving the block ends it all."""

    def __init__(self, n, *words, restarts=0):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            n,
            "--max-restarts",
            restarts,
            *words,
        ]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(train.__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.seen: dict[int, psutil.Process] = {}
        self.end = time.monotonic() + LIMIT

    def __enter__(self):
        return self

    def workers(self):
        """Those alive now, oldest first."""
        assert time.monotonic() < self.end, f"not done after {LIMIT} s"
        try:
            now = [
                p
                for p in psutil.Process(self.process.pid).children(recursive=True)
                if p.status() != psutil.STATUS_ZOMBIE
            ]
        except psutil.NoSuchProcess:
            now = []
        self.seen |= {p.pid: p for p in now}
        return sorted(now, key=lambda p: p.pid)

    def finish(self):
        self.workers()
        out, errors = self.process.communicate(
            timeout=max(self.end - time.monotonic(), 0)
        )
        assert self.process.returncode == 0, errors[-5000:]
        return out

    def __exit__(self, *_):
        self.end = math.inf
        self.workers()
        if self.process.poll() is None:
            self.process.kill()
        for p in self.seen.values():
            if p.is_running():  # the same process, not another of the same number
                p.kill()
        self.process.communicate()
        assert psutil.wait_procs(self.seen.values(), timeout=10)[1] == []


def final(folder):
    """All that a run ends with, but for the seconds."""
    extra, state = checkpoint.load_training(folder)
    return checkpoint.load(folder).state_dict() | extra, {
        k: v for k, v in state["history"].items() if "seconds" not in k
    } | {"step": state["step"]}


def test_four_processes_compute_what_one_computes_and_hand_their_run_over(
    texts, tmp_path, monkeypatch
):
    (tmp_path / "job.json").write_text(
        json.dumps(
            {
                "config": CONFIG.to_hf(),
                "settings": asdict(SETTINGS),
                "texts": str(texts),
            }
        )
    )
    corpus = data.load(texts, 300)
    batch, stop = corpus.batch, iter([7])

    def hooked(step, *args):
        if step == 7 and next(stop, None):
            raise KeyboardInterrupt
        return batch(step, *args)

    def trained(name):
        torch.manual_seed(0)
        return train.train(
            DeepSeekV3(CONFIG), corpus, SETTINGS, tmp_path / name, save_every=7
        )

    one = trained("one") if not monkeypatch.setattr(corpus, "batch", batch) else None
    monkeypatch.setattr(corpus, "batch", hooked)
    with pytest.raises(KeyboardInterrupt):
        trained("moved")
    with Torchrun(4, "-m", "helpers.tests.parallel_worker", tmp_path) as run:
        assert "stopped after step 14 of 20" in run.finish()
    assert checkpoint.load_training(tmp_path / "moved")[1]["step"] == 14
    trained("moved")
    for name in ("spread", "moved"):
        tensors, history = final(tmp_path / name)
        assert (
            tensors.keys() == final(tmp_path / "one")[0].keys()
            and history["step"] == 20
        )
        for kind in ("loss", "mtp_loss", "valid_loss"):
            assert history[kind] == pytest.approx(one[kind], rel=1e-4), (name, kind)
        assert history["load"] == one["load"] and history["bias"] == one["bias"]
    for a, b in zip(
        final(tmp_path / "spread")[0].values(),
        final(tmp_path / "one")[0].values(),
        strict=True,
    ):
        assert a.shape == b.shape and a.dtype == b.dtype


def test_one_process_hands_back_what_it_got():
    model, tokens = draw(CONFIG), ids(CONFIG, 3, 5)
    assert (
        (parallel.RANK, parallel.N) == (0, 1)
        and parallel.mean(0.1, 2.0) == [0.1, 2.0]
        and parallel.total(tokens) is tokens
    )
    assert torch.equal(parallel.rows(tokens, "batch_size"), tokens)
    assert (
        parallel.shard(model) is model
        and parallel.whole(tokens) is tokens
        and parallel.part(tokens, model.norm.weight) is tokens
    )
    with pytest.raises(ValueError, match="ep=2 cannot work.*number of processes, 1"):
        parallel.shard(model, 2)


# ------------------------------------------------------------------------------------------------------------------------- killed


def start(out, texts, restarts=0):
    config = out.with_name("config.json")
    config.write_text(json.dumps(CONFIG.to_hf()))
    return Torchrun(
        2,
        "-m",
        "helpers.train",
        "--out",
        out,
        "--text",
        texts,
        "--config",
        config,
        "--steps",
        40,
        "--batch-size",
        4,
        "--length",
        16,
        "--warmup-steps",
        2,
        "--valid-every",
        9,
        "--valid-sequences",
        4,
        "--save-every",
        3,
        restarts=restarts,
    )


def kill_and_finish(out, texts, rng):
    """Kill one of two workers once some checkpoints were written; -> the step of the newest one at that time."""
    with start(out, texts, restarts=2) as run:
        saves, newest = rng.randint(1, 8), 0  # of 14, one every three steps
        while newest < saves and run.process.poll() is None:
            run.workers()
            time.sleep(0.01)
            newest = (
                int(os.readlink(out / "latest")[-6:])
                if (out / "latest").is_symlink()
                else 0
            )
        time.sleep(rng.uniform(0, 0.1))
        first = run.workers()
        rng.choice(first).kill()
        while run.process.poll() is None:  # to know all that it starts
            run.workers()
            time.sleep(0.05)
        run.finish()
        assert len(first) == 2 and len(run.seen) >= 4, "nothing was started again"
    return 3 * newest


def test_a_killed_worker_is_started_again_and_the_run_ends_with_the_same_bits(
    texts, tmp_path
):
    with start(tmp_path / "whole", texts) as run:
        text = run.finish()
        [line] = text.splitlines()
        assert re.search(
            r"validation loss \d.* \d+ tokens/s; checkpoint in .*; [1-9][\d.]*% of the time in all-to-all$",
            line,
        )
    tensors, history = final(tmp_path / "whole")
    rng, steps = random.Random(0), []
    for k in range(KILLS):
        steps.append(kill_and_finish(tmp_path / str(k), texts, rng))
        again, same = final(tmp_path / str(k))
        assert (
            same == history
            and again.keys() == tensors.keys()
            and all(torch.equal(again[name], tensors[name]) for name in tensors)
        )
    assert max(steps) < 40
