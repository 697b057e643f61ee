"""The steps of any training here: stopped, killed and resumed to the same bits.

A training is a `Trainer` (what a step does) and a `Plan` (how many steps, where they
are kept). A step draws its randomness from (seed, step) alone.
"""

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from helpers.checks import Count, check
from helpers.training import runs
from helpers.training.progress import Bar
from helpers.training.run_folder import RunFolder
from helpers.training.world import World

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

History = dict[str, Any]
SHOWN = ("loss", "accuracy", "length")  # beside the progress bar


class TrainingDiverged(RuntimeError):
    """The loss is not a finite number any more.

    The message has the step, the last good checkpoint and what to try.
    """


class Stopped(KeyboardInterrupt):
    """A training that was asked to stop; the message says how to go on.

    Jupyter shows the message and no traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class LossNotFinite(ArithmeticError):
    """What `must_be_finite` raises; the loop adds where the run stands."""

    def __init__(self, loss: float, after: bool) -> None:
        super().__init__(f"loss is {loss}")
        self.after = after


class AdamWSettings(Protocol):
    """What AdamW is built from."""

    @property
    def lr(self) -> float: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


class Trainer(Protocol):
    """What one step of a training does.

    All that a step changes is in `model`, `optimizer` and the plan's `keep`.
    """

    model: Any
    optimizer: torch.optim.AdamW

    def gradients(self, step: int) -> float:
        """Put the gradients of `step` in place, leave the weights; -> its loss."""

    def witness(self) -> float:
        """Of the step whose gradients are in place: a number that shows other code.

        Its loss, where that is more than rounding noise.
        """

    def update(self, step: int) -> dict[str, Any]:
        """Change the weights. -> what the history keeps of the step, by name."""


@dataclass
class Plan:
    """A training apart from what its steps do.

    identity: JSON that a resumed run must share. module: the module whose code decides
    the numbers. folder: where it is saved, or None. save_every: steps between
    checkpoints. keep: more tensors that belong to the state, by name. history: what
    there is before the first step.
    """

    steps: int
    identity: dict[str, Any]
    module: str
    tokenizer: Tokenizer
    label: str
    folder: Path | None = None
    save_every: int = 100
    keep: dict[str, Tensor] = field(default_factory=dict)
    history: History = field(default_factory=dict)

    def __post_init__(self) -> None:
        check("save_every", self.save_every, Count)


def train_in_steps(
    trainer: Trainer,
    rate: Callable[[int], float],
    plan: Plan,
    world: World | None = None,
) -> History:
    """Do the steps that `plan.folder` lacks, at the learning rate rate(step).

    The model must be as it was drawn, or where an earlier call for this folder left it.
    -> the history: for each name that `update` returns a list with an entry a step;
    "seconds"; "provenance", the code and the first witnesses. A second program that
    trains the same run waits. A run of other code, which gives other numbers, is moved
    aside.
    Ctrl-C or Jupyter's stop ends after the step at hand, saves, and raises `Stopped`; a
    second one ends at once. Raises TrainingDiverged for a loss that is not finite,
    ValueError for a folder of another run.
    """
    run = _Run(trainer, rate, plan, world or World())
    try:
        with run.folder.alone():
            run.begin()
            run.begun = True
            _do_steps(run)
    except LossNotFinite as found:
        raise TrainingDiverged(run.diverged(found)) from None
    except Stopped:
        raise
    except KeyboardInterrupt:
        raise Stopped(run.cut_off()) from None
    trainer.model.eval()
    return run.history


def _do_steps(run: "_Run") -> None:
    """Do the steps that are left, saving every `save_every` steps and at the end."""
    trainer = run.trainer
    plan = run.plan
    trainer.optimizer.zero_grad(set_to_none=True)  # of a step that was cut off
    bar = Bar(
        total=plan.steps,
        initial=run.done,
        desc=plan.label,
        unit="step",
        disable=run.done == plan.steps or not run.world.first,
    )
    with _stop_after_step() as asked, bar:
        for step in range(run.done, plan.steps):
            clock = _Clock(run.world)
            run.set_rate(step)
            loss = trainer.gradients(step)
            must_be_finite(loss)
            witness = trainer.witness()
            # only now is it known that the step before left good weights
            if step % plan.save_every == 0:
                run.save()
            kept = trainer.update(step)
            run.count(witness, kept)
            clock.add_to(run.history)
            bar.update()
            bar.set_postfix(_shown(run.history), refresh=False)

            # all processes stop where one was asked to
            stopped = any(run.world.mean(float(asked.is_set())))
            if stopped and run.done < plan.steps:
                run.save()
                raise Stopped(run.how_to_go_on())
        run.save()


def must_be_finite(loss: float, after: bool = False) -> None:
    """Stop a training whose loss is no number; `after` its weights were changed."""
    if not math.isfinite(loss):
        raise LossNotFinite(loss, after)


def adamw(model: nn.Module, settings: AdamWSettings) -> torch.optim.AdamW:
    """AdamW with the rate, betas and weight decay of `settings`.

    Vectors (norms) are not decayed.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, fused=True)


def descend(
    model: nn.Module, optimizer: torch.optim.Optimizer, grad_clip: float
) -> None:
    """One optimizer step on the gradients at hand; then there are none.

    They are clipped to the norm `grad_clip`.
    """
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------ where a run stands


class _Run:
    """A training as it goes: the steps done, those saved, the history so far."""

    def __init__(
        self,
        trainer: Trainer,
        rate: Callable[[int], float],
        plan: Plan,
        world: World,
    ) -> None:
        self.trainer = trainer
        self.rate = rate
        self.plan = plan
        self.world = world
        self.folder = RunFolder(plan.folder, world)
        self.begun = False
        self.done = 0
        self.saved = 0
        self.history = copy.deepcopy(plan.history)

    def begin(self) -> None:
        """Go on from what the folder holds, where today's code computes the same."""
        code = runs.code_hash(self.plan.module)
        self.history["provenance"] = asdict(runs.Provenance(code, []))
        found = self.folder.read()
        state = found.state if found is not None else {}
        self._check_that_all_see(code, state)
        if found is None:
            return
        self._check_identity(state)

        # the first edition kept no provenance
        kept = state["history"].get("provenance", {"code": "", "witness": []})
        made = runs.Provenance(**kept)
        now = runs.Provenance(code, [])
        if code not in (made.code, made.compared):
            now = runs.Provenance(code, self._witness_of(len(made.witness)))
        if made.verdict(now) == "stale":
            self.folder.move_aside()
            return

        plan = self.plan
        model = self.trainer.model
        self.folder.restore(found, model, self.trainer.optimizer, plan.keep)
        self.done = state["step"]
        self.saved = self.done
        self.history = state["history"]
        if now.witness:
            # code changed, numbers same: it need not be compared again
            self.history["provenance"]["compared"] = code
            self._write()

    def _check_that_all_see(self, code: str, state: dict[str, Any]) -> None:
        """ValueError where another process sees another run, or another code."""
        seen = runs.key(
            identity=self.plan.identity,
            code=code,
            step=state.get("step", 0),
            provenance=state.get("history", {}).get("provenance"),
        )
        if not self.world.agree(int(seen[:12], 16)):
            raise ValueError(
                "the processes do not see the same text or checkpoint: they need the "
                "same Python, --text and --out (a shared folder)"
            )

    def _check_identity(self, state: dict[str, Any]) -> None:
        for part, value in self.plan.identity.items():
            # through JSON, as the saved one went
            if state.get(part) != json.loads(json.dumps(value)):
                raise ValueError(
                    f"the checkpoint in {self.folder.name} was made with another "
                    f"{part}: go on with that one, or choose another folder"
                )

    def _witness_of(self, steps: int) -> list[float]:
        """The witness of the first steps, done anew; then all is as it was before."""
        model = self.trainer.model
        optimizer = self.trainer.optimizer
        weights = {name: x.clone() for name, x in model.state_dict().items()}
        kept = {name: x.clone() for name, x in self.plan.keep.items()}
        seen = []
        try:
            for step in range(steps):
                self.set_rate(step)
                must_be_finite(self.trainer.gradients(step))
                seen.append(self.trainer.witness())
                if step + 1 < steps:
                    self.trainer.update(step)
        except LossNotFinite:
            seen.append(math.nan)
        model.load_state_dict(weights)
        optimizer.state.clear()
        optimizer.zero_grad(set_to_none=True)
        for name, tensor in kept.items():
            self.plan.keep[name].copy_(tensor)
        return seen

    def set_rate(self, step: int) -> None:
        """Change the optimizer's learning rate to that of `step`."""
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self.rate(step)

    def count(self, witness: float, kept: dict[str, Any]) -> None:
        """Change the history: one more step is done, with what is kept of it."""
        witnesses = self.history["provenance"]["witness"]
        if len(witnesses) < runs.WITNESS_STEPS:
            witnesses.append(witness)
        for name, value in kept.items():
            self.history.setdefault(name, []).append(value)
        self.done += 1

    def save(self) -> None:
        """Write a checkpoint of the steps done, unless there is one."""
        if self.saved != self.done:
            self._write()

    def _write(self) -> None:
        plan = self.plan
        state = plan.identity | {"step": self.done, "history": self.history}
        files = {"tokenizer.json": plan.tokenizer.to_str()}
        model = self.trainer.model
        self.folder.save(model, self.trainer.optimizer, plan.keep, state, files)
        self.saved = self.done

    def diverged(self, found: LossNotFinite) -> str:
        """What to say of a loss that is no number."""
        at = self.done + 1 if found.after else self.done
        kept = "no checkpoint was saved before it"
        if self.plan.folder is not None and self.saved:
            kept = f"the checkpoint of step {self.saved} is in {self.plan.folder}"
        return (
            f"{found} at step {at}; {kept}. Try a lower lr (now "
            f"{self.rate(self.done):g}), more warmup_steps or a smaller "
            "initializer_range"
        )

    def how_to_go_on(self) -> str:
        """What to say of a training that was stopped between two steps."""
        kept = "the model keeps what it has learnt"
        if self.plan.folder is not None:
            kept = f"saved in {self.folder.name}; the same call goes on from there"
        return f"stopped after step {self.done} of {self.plan.steps}: {kept}"

    def cut_off(self) -> str:
        """What to say of a training that Ctrl-C ended at once."""
        if not self.begun:
            return "stopped before the first step"
        kept = "nothing was saved"
        if self.plan.folder is not None and self.saved:
            kept = f"{self.folder.name} holds step {self.saved}, the same call goes on"
        return f"cut off in step {self.done + 1} of {self.plan.steps}: {kept}"


# ---------------------------------------------------------------------- small matters


@contextmanager
def _stop_after_step() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C (or Jupyter's stop) into a flag that is read between steps.

    So no step is done by half. A second one acts at once.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class _Clock:
    """Seconds of one step, and of its all-to-alls where there are several processes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.began = time.perf_counter()
        self.exchanged = world.exchange_seconds

    def add_to(self, history: History) -> None:
        """Change `history`: its seconds grow."""
        seconds = time.perf_counter() - self.began
        history["seconds"] = history.get("seconds", 0.0) + seconds
        if self.world.size > 1:
            exchanged = self.world.exchange_seconds - self.exchanged
            before = history.get("all_to_all_seconds", 0.0)
            history["all_to_all_seconds"] = before + exchanged


def _shown(history: History) -> dict[str, str]:
    shown = {}
    for name in SHOWN:
        if history.get(name):
            shown[name] = f"{history[name][-1]:.3g}"
    return shown
