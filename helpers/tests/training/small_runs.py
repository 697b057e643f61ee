"""Trainings of seconds that the tests of this folder start, stop and compare."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.tests.builders import small
from helpers.training.corpus import Corpus
from helpers.training.pretrain import Settings
from helpers.training.source import REPOSITORY
from helpers.v3 import DeepSeekV3, V3Config, checkpoint

import torch
from torch import Tensor

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
TIMEOUT = 240  # seconds that a program may take; it needs 7 on a free core


def new_model(config: V3Config = CONFIG, seed: int = 0) -> DeepSeekV3:
    """A model in training mode whose weights are drawn from `seed`."""
    torch.manual_seed(seed)
    return DeepSeekV3(config)


class Bits:
    """All that a run ends with, but for the seconds it took."""

    def __init__(self, folder: Path, model: DeepSeekV3 | None = None) -> None:
        """The newest checkpoint in `folder`; with `model`, that one's weights."""
        if model is None:
            model = checkpoint.load(folder)
        found = checkpoint.load_training(folder)
        self.tensors: dict[str, Tensor] = model.state_dict() | found.tensors
        self.step: int = found.state["step"]
        self.history: dict[str, Any] = {}
        for name, value in found.state["history"].items():
            if not name.endswith("seconds"):
                self.history[name] = value

    def must_be(self, other: "Bits") -> None:
        """Fail where anything differs."""
        assert self.step == other.step
        assert self.history == other.history
        assert self.tensors.keys() == other.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), name


def step_of(folder: Path) -> int:
    """Steps done when the newest checkpoint in `folder` was saved."""
    return checkpoint.load_training(folder).state["step"]


def newest(folder: Path) -> str:
    """What `latest` in `folder` points to, "" where there is none."""
    latest = folder / "latest"
    return os.readlink(latest) if latest.is_symlink() else ""


def counted(
    corpus: Corpus, monkeypatch, at: int = -1, act: Callable[[], Any] = lambda: None
) -> list[int]:
    """The steps whose batch is asked for, a list that grows.

    At the first time for step `at`, `act` happens.
    """
    asked: list[int] = []
    batch = corpus.batch

    def hooked(step: int, *args: int) -> Tensor:
        asked.append(step)
        if step == at and asked.count(at) == 1:
            act()
        return batch(step, *args)

    monkeypatch.setattr(corpus, "batch", hooked)
    return asked


def copy_of_helpers(folder: Path) -> Path:
    """A copy of the sources to run: nobody edits it meanwhile. -> `folder`."""
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "helpers", folder / "helpers", ignore=skipped)
    return folder


class Shell:
    """`python -m helpers.training.pretrain` on a small corpus, of a copy of helpers."""

    def __init__(self, folder: Path, texts: Path) -> None:
        self.folder = folder
        self.texts = texts
        self.root = copy_of_helpers(folder / "repository")
        self.config = folder / "config.json"
        config = json.dumps(CONFIG.to_hf())
        self.config.write_text(config, encoding="utf-8")

    def start(
        self, out: Path, *more: object, save_every: int = 2, **environment: str
    ) -> subprocess.Popen[str]:
        """The program, started; 40 steps."""
        words: list[object] = [sys.executable, "-m", "helpers.training.pretrain"]
        words += ["--out", out, "--text", self.texts, "--config", self.config]
        words += ["--steps", 40, "--batch-size", 2, "--length", 16]
        words += ["--warmup-steps", 2, "--valid-every", 7, "--valid-sequences", 3]
        words += ["--save-every", save_every, *more]
        return subprocess.Popen(
            [str(word) for word in words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=self.root,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )

    def finish(self, out: Path, *more: object, **environment: str) -> tuple[int, str]:
        """The program's exit code and what it printed, errors last."""
        process = self.start(out, *more, **environment)
        text, errors = process.communicate(timeout=TIMEOUT)
        return process.returncode, text + errors


def wait_for_progress(
    process: subprocess.Popen[str], out: Path, before: str = "", part: bool = False
) -> bool:
    """Wait until a checkpoint is newer than `before`; -> False when the run ended.

    With `part` also until one is being written.
    """
    while process.poll() is None:
        time.sleep(0.002)
        if newest(out) != before and (not part or any(out.glob(".part-*"))):
            return True
    return False
