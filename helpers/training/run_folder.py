"""The folder of one run: one program at a time works in it, checkpoints are whole.

Tensors may be split among the processes of a `World`. All of them put a tensor together
or take it apart at once; only the first one writes.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from helpers.training import runs
from helpers.training.world import World
from helpers.v3 import DeepSeekV3, checkpoint

import torch
from filelock import FileLock, Timeout
from torch import Tensor

POLL_SECONDS = 0.2  # between two looks at whether another program is done


class RunFolder:
    """Where a run is saved. With `path` None nothing is: all methods do nothing."""

    def __init__(self, path: Path | None, world: World) -> None:
        self.path = path.resolve() if path is not None else None
        self.world = world

    @property
    def name(self) -> str:
        """The folder's own name, to speak of it."""
        return self.path.name if self.path is not None else ""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one program at a time work here; a second one waits and says so.

        The lock is a file beside the folder. The system opens it when its holder ends,
        however that happens. Raises OSError where nothing can be written.
        """
        if self.path is None or self._is_read_only():
            yield
            return
        runs.writable(self.path.parent)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        waits = False
        while not self._is_ours(lock):
            if self.world.first and not waits:
                print(f"another program trains {self.name}: waiting until it is done")
            waits = True
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            lock.release()

    def _is_ours(self, lock: FileLock) -> bool:
        """Try to take the lock, which the first process does for all.

        A question to all processes each time, since one that waited in silence would
        make the others run into a timeout.
        """
        if self.world.first:
            with suppress(Timeout):
                lock.acquire(timeout=0)
        return any(self.world.mean(float(lock.is_locked)))

    def _is_read_only(self) -> bool:
        """Whether a run is here that nobody can change, as in a read-only copy."""
        if self.path is None or not (self.path / "latest").exists():
            return False
        return not os.access(self.path.parent, os.W_OK)

    def read(self) -> checkpoint.Training | None:
        """Optimizer tensors and state of the newest checkpoint, None without one."""
        if self.path is None or not (self.path / "latest").exists():
            return None
        return checkpoint.load_training(self.path)

    def restore(
        self,
        found: checkpoint.Training,
        model: DeepSeekV3,
        optimizer: torch.optim.Optimizer,
        keep: Mapping[str, Tensor],
    ) -> None:
        """Change model, optimizer and kept tensors to those of the checkpoint."""
        if self.path is None:
            return
        # of several processes each holds only parts of the model
        like = model if self.world.size == 1 else None
        weights = checkpoint.load(self.path, like).state_dict()
        parts = {}
        for name, tensor in model.state_dict().items():
            parts[name] = self.world.part(weights[name], tensor)
        model.load_state_dict(parts)
        for name, parameter in model.named_parameters():
            # MTP modules have no gradient in post-training, and so no moments
            if f"{name}.step" not in found.tensors:
                continue
            state = {}
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                whole = found.tensors[f"{name}.{kind}"]
                state[kind] = self.world.part(whole, parameter)
            optimizer.state[parameter] = state
        for name, tensor in keep.items():
            tensor.copy_(found.tensors[name])

    def save(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        keep: Mapping[str, Tensor],
        state: dict[str, Any],
        files: Mapping[str, str],
    ) -> None:
        """Write a checkpoint (see `helpers.v3.checkpoint.save`)."""
        if self.path is None or self._is_read_only():
            return
        weights = {}
        for name, tensor in model.state_dict().items():
            weights[name] = self.world.whole(tensor)
        tensors = dict(keep)
        for name, parameter in model.named_parameters():
            for kind, value in optimizer.state[parameter].items():
                tensors[f"{name}.{kind}"] = self.world.whole(value)
        if self.world.first:
            training = checkpoint.Training(tensors, state)
            runs.writable(self.path)
            checkpoint.save(model, self.path, training, files, weights=weights)

    def move_aside(self) -> None:
        """Rename the folder, so that the run can start anew."""
        if self.path is None or not self.world.first:
            return
        number = 1
        aside = self.path.with_name(f"{self.name}.stale-{number}")
        while aside.exists():
            number += 1
            aside = self.path.with_name(f"{self.name}.stale-{number}")
        self.path.rename(aside)
        print(
            f"{self.name} was computed by other code, which gives other numbers: it is "
            f"moved to {aside.name} and trained again"
        )
