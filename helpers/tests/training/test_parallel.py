"""Several processes train what one trains; a killed worker changes nothing.

The processes are real: torchrun, gloo, four and two of them.
"""

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

from helpers.tests.builders import draw, ids
from helpers.tests.training.small_runs import (
    CONFIG,
    Bits,
    copy_of_helpers,
    counted,
    new_model,
    newest,
    step_of,
)
from helpers.training import parallel, pretrain
from helpers.training.parallel import World
from helpers.training.pretrain import Settings

import psutil
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")

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
# seconds that torchrun and what it starts may live; they need 15 on two free cores
LIMIT = 900


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return copy_of_helpers(tmp_path_factory.mktemp("repository"))


class Torchrun:
    """torchrun with everything that it started: leaving the block ends it all."""

    def __init__(
        self, root: Path, processes: int, *words: object, restarts: int = 0
    ) -> None:
        command: list[object] = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--standalone", "--nproc-per-node", processes]
        command += ["--max-restarts", restarts, *words]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.seen: dict[int, psutil.Process] = {}
        self.end = time.monotonic() + LIMIT

    def __enter__(self) -> "Torchrun":
        return self

    def workers(self) -> list[psutil.Process]:
        """Those alive now, oldest first."""
        assert time.monotonic() < self.end, f"not done after {LIMIT} s"
        now = []
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if child.status() != psutil.STATUS_ZOMBIE:
                    now.append(child)
        except psutil.NoSuchProcess:
            now = []
        for child in now:
            self.seen[child.pid] = child
        return sorted(now, key=lambda child: child.pid)

    def finish(self) -> str:
        """What it printed, once it has ended well."""
        self.workers()
        left = max(self.end - time.monotonic(), 0)
        out, errors = self.process.communicate(timeout=left)
        assert self.process.returncode == 0, errors[-5000:]
        return out

    def __exit__(self, *_: object) -> None:
        self.end = math.inf
        self.workers()
        if self.process.poll() is None:
            self.process.kill()
        for child in self.seen.values():
            if child.is_running():  # the same process, not another of the same number
                child.kill()
        self.process.communicate()
        _, alive = psutil.wait_procs(self.seen.values(), timeout=10)
        assert alive == []


@pytest.mark.slow
def test_four_processes_compute_what_one_computes_and_hand_their_run_over(
    repository, texts, corpus, tmp_path, monkeypatch
):
    job = {
        "config": CONFIG.to_hf(),
        "settings": asdict(SETTINGS),
        "texts": str(texts),
    }
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")

    def train(name):
        out = tmp_path / name
        return pretrain.train(new_model(), corpus, SETTINGS, out, save_every=7)

    def cut_off():
        raise KeyboardInterrupt

    one = train("one")
    # a process alone begins, four go on, one ends it
    with monkeypatch.context() as patch:
        counted(corpus, patch, 8, cut_off)
        with pytest.raises(KeyboardInterrupt):
            train("moved")
    assert step_of(tmp_path / "moved") == 7
    worker = "helpers.tests.training.parallel_worker"
    with Torchrun(repository, 4, "-m", worker, tmp_path) as run:
        printed = run.finish()
    assert printed == (
        "stopped after step 14 of 20: saved in moved; the same call goes on from "
        "there\n"
    )
    assert step_of(tmp_path / "moved") == 14
    train("moved")

    expected = Bits(tmp_path / "one")
    for name in ("spread", "moved"):
        found = Bits(tmp_path / name)
        assert found.step == 20
        assert found.tensors.keys() == expected.tensors.keys()
        for kind in ("loss", "mtp_loss", "valid_loss"):
            close = pytest.approx(one[kind], rel=1e-4)
            assert found.history[kind] == close, (name, kind)
        assert found.history["load"] == one["load"]
        assert found.history["bias"] == one["bias"]
        for tensor, theirs in zip(
            found.tensors.values(), expected.tensors.values(), strict=True
        ):
            assert tensor.shape == theirs.shape
            assert tensor.dtype == theirs.dtype


def test_one_process_hands_back_what_it_got(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    world = parallel.join_world()
    assert type(world) is World
    assert (world.rank, world.size, world.first) == (0, 1, True)
    model = draw(CONFIG)
    tokens = ids(CONFIG, 3, 5)
    assert world.mean(0.1, 2) == [0.1, 2.0]
    assert world.total(tokens) is tokens
    assert world.agree(7)
    assert torch.equal(world.rows(tokens, "batch_size"), tokens)
    assert world.shard(model) is model
    assert world.whole(tokens) is tokens
    assert world.part(tokens, model.norm.weight) is tokens
    assert world.leave() is None
    with pytest.raises(SystemExit, match="3"):
        world.leave(3)
    with pytest.raises(ValueError, match="ep=2 cannot work.*number of processes, 1"):
        world.shard(model, 2)


def test_rows_that_do_not_divide_are_named():
    world = World()
    world.size = 2
    world.rank = 1
    tokens = ids(CONFIG, 4, 5)
    assert torch.equal(world.rows(tokens, "batch_size"), tokens[2:])
    message = "batch_size=3 cannot work: .*multiple of the number of processes, 2"
    with pytest.raises(ValueError, match=message):
        world.rows(tokens[:3], "batch_size")


@pytest.mark.slow
def test_the_environment_of_torchrun_is_read_when_it_is_asked_for():
    """What was read at import would hold for the whole life of a notebook's kernel."""
    code = (
        "import sys\n"
        "from helpers.training import pretrain\n"
        "assert 'helpers.training.distributed' not in sys.modules\n"
    )
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# ------------------------------------------------------------------------------ killed


def start(root: Path, out: Path, texts: Path, restarts: int = 0) -> Torchrun:
    config = out.with_name("config.json")
    config.write_text(json.dumps(CONFIG.to_hf()), encoding="utf-8")
    words: list[object] = ["-m", "helpers.training.pretrain"]
    words += ["--out", out, "--text", texts, "--config", config]
    words += ["--steps", 40, "--batch-size", 4, "--length", 16, "--warmup-steps", 2]
    words += ["--valid-every", 9, "--valid-sequences", 4, "--save-every", 3]
    return Torchrun(root, 2, *words, restarts=restarts)


def saves_of(out: Path) -> int:
    """How many checkpoints the run has written."""
    return int(newest(out)[-6:] or 0)


def kill_and_finish(root: Path, out: Path, texts: Path, rng: random.Random) -> int:
    """Kill one of two workers once some checkpoints were written.

    -> the step of the newest one at that time.
    """
    with start(root, out, texts, restarts=2) as run:
        wanted = rng.randint(1, 8)  # of 14, one every three steps
        while saves_of(out) < wanted and run.process.poll() is None:
            run.workers()
            time.sleep(0.01)
        saved = saves_of(out)
        time.sleep(rng.uniform(0, 0.1))
        first = run.workers()
        rng.choice(first).kill()
        while run.process.poll() is None:  # to know all that it starts
            run.workers()
            time.sleep(0.05)
        run.finish()
        assert len(first) == 2
        assert len(run.seen) >= 4, "nothing was started again"
    return 3 * saved


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_the_run_ends_with_the_same_bits(
    repository, texts, tmp_path
):
    with start(repository, tmp_path / "whole", texts) as run:
        [line] = run.finish().splitlines()
    assert re.search(
        r"validation loss \d.* \d+ tokens/s; checkpoint in .*; "
        r"[1-9][\d.]*% of the time in all-to-all$",
        line,
    )
    whole = Bits(tmp_path / "whole")
    rng = random.Random(0)
    steps = []
    for k in range(KILLS):
        out = tmp_path / str(k)
        steps.append(kill_and_finish(repository, out, texts, rng))
        Bits(out).must_be(whole)
    assert max(steps) < 40


@pytest.mark.slow
def test_what_is_wrong_is_one_line_of_the_first_process(repository, texts, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG.to_hf()), encoding="utf-8")
    words: list[object] = ["-m", "helpers.training.pretrain", "--ep", 3]
    words += ["--out", tmp_path / "run", "--text", texts, "--config", config]
    with Torchrun(repository, 2, *words) as run:
        while run.process.poll() is None:
            run.workers()
            time.sleep(0.05)
        _, errors = run.process.communicate()
    assert run.process.returncode == 1
    assert errors.count("ep=3 cannot work") == 1
