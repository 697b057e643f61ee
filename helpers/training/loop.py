"""The steps of any training here: stopped, killed and resumed to the same bits.

A training is a `Trainer` (what a step does) and a `Plan` (how many steps, where they
are kept). A step draws its randomness from (seed, step) alone.
"""

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from helpers.training import runs
from helpers.training.parallel import World
from helpers.v3 import checkpoint

import torch
from filelock import FileLock, Timeout
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm.auto import tqdm

History = dict[str, Any]
SHOWN = ("loss", "accuracy", "length")  # beside the progress bar


class TrainingDiverged(RuntimeError):
    """The loss is not a finite number any more.

    The message has the step, the last good checkpoint and what to try.
    """


class Stopped(KeyboardInterrupt):
    """A training that was asked to stop and has saved; the message says how to go on.

    Jupyter shows the message and no traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class LossNotFinite(ArithmeticError):
    """What `must_be_finite` raises; the loop adds where the run stands."""


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
    """What one step of a training does."""

    model: Any
    optimizer: torch.optim.AdamW

    def gradients(self, step: int) -> float:
        """Put the gradients of `step` in place, leave the weights; -> its loss."""

    def update(self, step: int) -> dict[str, Any]:
        """Change the weights. -> what the history keeps of the step, by name."""


@dataclass
class Plan:
    """A training apart from what its steps do.

    identity: JSON that a resumed run must share. module: the module whose code decides
    the numbers. folder: where it is saved, or None. keep: more tensors that belong to
    the state, by name. history: what there is before the first step.
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


def train_in_steps(
    trainer: Trainer,
    rate: Callable[[int], float],
    plan: Plan,
    world: World | None = None,
) -> History:
    """Do the steps that `plan.folder` lacks, at the learning rate rate(step).

    -> the history: for each name that `update` returns a list with an entry a step;
    "seconds"; "provenance", the code and the first losses. Ctrl-C or Jupyter's stop
    ends after the step at hand, saves, and raises `Stopped`. Raises TrainingDiverged
    for a loss that is not finite, ValueError for a folder of another run.
    """
    world = world or World()
    with _alone_in(plan, world):
        start, history = _begin(trainer, rate, plan, world)
        return _run(trainer, rate, plan, world, start, history)


def _run(
    trainer: Trainer,
    rate: Callable[[int], float],
    plan: Plan,
    world: World,
    start: int,
    history: History,
) -> History:
    saved = start
    trainer.optimizer.zero_grad(set_to_none=True)  # of a step that was cut off
    hidden = start == plan.steps or not world.first
    with (
        _stop_after_step() as stop,
        tqdm(
            total=plan.steps,
            initial=start,
            desc=plan.label,
            unit="step",
            disable=hidden,
        ) as bar,
    ):
        for step in range(start, plan.steps):
            _set_rate(trainer.optimizer, rate(step))
            clock = _Clock(world)
            try:
                loss = trainer.gradients(step)
                must_be_finite(loss)
                # only now is it known that the step before left good weights
                if step % plan.save_every == 0 and step != saved:
                    _save(trainer, plan, world, step, history)
                    saved = step
                kept = trainer.update(step)
            except LossNotFinite as error:
                message = _diverged(str(error), step, saved, rate(step), plan)
                raise TrainingDiverged(message) from None

            _witness(history, loss)
            for name, value in kept.items():
                history.setdefault(name, []).append(value)
            clock.add_to(history)
            bar.update()
            bar.set_postfix(_shown(history), refresh=False)

            stopped = any(world.mean(float(stop.is_set()))) and step + 1 < plan.steps
            if step + 1 == plan.steps or stopped:
                _save(trainer, plan, world, step + 1, history)
            if stopped:
                raise Stopped(_how_to_go_on(step + 1, plan))
    trainer.model.eval()
    return history


def must_be_finite(loss: float, after: bool = False) -> None:
    """Stop a training whose loss is no number; `after` its weights were changed."""
    if not math.isfinite(loss):
        raise LossNotFinite(f"loss is {loss}" + (" after" if after else ""))


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


# ---------------------------------------------------------------- begin, save, resume


def _begin(
    trainer: Trainer, rate: Callable[[int], float], plan: Plan, world: World
) -> tuple[int, History]:
    """Where to go on from: (steps done, history), with model and optimizer as then."""
    code = runs.code_hash(plan.module)
    fresh = dict(plan.history)
    fresh["provenance"] = {"code": code, "witness": []}
    start = 0
    history = fresh
    if plan.folder is not None and (plan.folder / "latest").exists():
        found = checkpoint.load_training(plan.folder)
        _check_identity(found.state, plan)
        if _still_valid(found, trainer, rate, plan, code):
            _restore(found, trainer, plan, world)
            start = found.state["step"]
            history = found.state["history"]
        elif world.first:
            _move_aside(plan.folder)
    mark = json.dumps([plan.identity, start, code], sort_keys=True)
    digest = int(hashlib.sha256(mark.encode()).hexdigest()[:12], 16)
    if not world.agree(digest):
        raise ValueError(
            "the processes do not see the same text or checkpoint: they need the same "
            "Python, --text and --out (a shared folder)"
        )
    return start, history


def _check_identity(state: dict[str, Any], plan: Plan) -> None:
    for part, value in plan.identity.items():
        # through JSON, as the saved one went
        if state.get(part) != json.loads(json.dumps(value)):
            name = plan.folder.name if plan.folder else ""
            raise ValueError(
                f"the checkpoint in {name} was made with another {part}: go on with "
                "that one, or choose another folder"
            )


def _still_valid(
    found: checkpoint.Training,
    trainer: Trainer,
    rate: Callable[[int], float],
    plan: Plan,
    code: str,
) -> bool:
    """Whether today's code computes what the run found was computed by."""
    kept = found.state["history"].get("provenance", {"code": "", "witness": []})
    made = runs.Provenance(**kept)
    now = runs.Provenance(code, [])
    if made.code != code:
        losses = first_losses(trainer, rate, plan, len(made.witness))
        now = runs.Provenance(code, losses)
    return made.verdict(now) != "stale"


def first_losses(
    trainer: Trainer, rate: Callable[[int], float], plan: Plan, steps: int
) -> list[float]:
    """The losses of the first steps of an untouched training, which stays untouched."""
    weights = {n: x.clone() for n, x in trainer.model.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in plan.keep.items()}
    losses = []
    for step in range(steps):
        _set_rate(trainer.optimizer, rate(step))
        losses.append(trainer.gradients(step))
        if step + 1 < steps:
            trainer.update(step)
    trainer.model.load_state_dict(weights)
    trainer.optimizer.state.clear()
    trainer.optimizer.zero_grad(set_to_none=True)
    for name, tensor in kept.items():
        plan.keep[name].copy_(tensor)
    return losses


def _restore(
    found: checkpoint.Training, trainer: Trainer, plan: Plan, world: World
) -> None:
    """Change model, optimizer and kept tensors to those of the checkpoint."""
    assert plan.folder is not None
    weights = checkpoint.load(plan.folder).state_dict()
    parts = {}
    for name, tensor in trainer.model.state_dict().items():
        parts[name] = world.part(weights[name], tensor)
    trainer.model.load_state_dict(parts)
    for name, parameter in trainer.model.named_parameters():
        if f"{name}.step" not in found.tensors:
            continue
        state = {}
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            state[kind] = world.part(found.tensors[f"{name}.{kind}"], parameter)
        trainer.optimizer.state[parameter] = state
    for name, tensor in plan.keep.items():
        tensor.copy_(found.tensors[name])


def _save(
    trainer: Trainer, plan: Plan, world: World, step: int, history: History
) -> None:
    """Write the checkpoint of `step` steps done, where there is a folder for it."""
    if plan.folder is None:
        return
    # all processes put the tensors together, the first one writes
    weights = {n: world.whole(x) for n, x in trainer.model.state_dict().items()}
    tensors = dict(plan.keep)
    for name, parameter in trainer.model.named_parameters():
        for kind, value in trainer.optimizer.state[parameter].items():
            tensors[f"{name}.{kind}"] = world.whole(value)
    if not world.first:
        return
    runs.writable(plan.folder)
    state = plan.identity | {"step": step, "history": history}
    checkpoint.save(
        trainer.model,
        plan.folder,
        checkpoint.Training(tensors, state),
        files={"tokenizer.json": plan.tokenizer.to_str()},
        weights=weights,
    )


def _move_aside(folder: Path) -> None:
    """Rename the folder of a run that other code has computed."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.stale-{number}")).exists():
        number += 1
    folder.rename(aside)
    print(
        f"{folder.name} was computed by other code, which gives other numbers: it is "
        f"moved to {aside.name} and trained again"
    )


@contextmanager
def _alone_in(plan: Plan, world: World) -> Iterator[None]:
    """Let one program at a time train the run in `plan.folder`; a second one waits."""
    if plan.folder is None or not world.first:
        yield
        return
    runs.writable(plan.folder.parent)
    lock = FileLock(plan.folder.with_name(f".{plan.folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another program trains {plan.folder.name}: waiting until it is done")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# --------------------------------------------------------------------- small matters


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

    def handler(number: int, frame: Any) -> None:
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


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _witness(history: History, loss: float) -> None:
    """Change `history`: it keeps the losses of the first steps."""
    witness = history["provenance"]["witness"]
    if len(witness) < runs.WITNESS_STEPS:
        witness.append(loss)


def _shown(history: History) -> dict[str, str]:
    shown = {}
    for name in SHOWN:
        if history.get(name):
            shown[name] = f"{history[name][-1]:.3g}"
    return shown


def _diverged(found: str, step: int, saved: int, rate: float, plan: Plan) -> str:
    at = step
    if found.endswith(" after"):
        found = found.removesuffix(" after")
        at = step + 1
    kept = "no checkpoint was saved before it"
    if plan.folder is not None and saved:
        kept = f"the checkpoint of step {saved} is in {plan.folder}"
    return (
        f"{found} at step {at}; {kept}. Try a lower lr (now {rate:g}), more "
        "warmup_steps or a smaller initializer_range"
    )


def _how_to_go_on(step: int, plan: Plan) -> str:
    kept = "the model keeps what it has learnt"
    if plan.folder is not None:
        kept = f"saved in {plan.folder.name}; the same call goes on from there"
    return f"stopped after step {step} of {plan.steps}: {kept}"
