"""V3's pre-training: AdamW, schedule, clipping, bias update and MTP weights.

All scaled to a short run (V3 section 4.2). `run` is what the notebooks call;
`python -m helpers.training.pretrain --help` runs it from a shell, torchrun on several
processes (helpers.training.parallel).
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from helpers.checks import Count, NonNegative, Whole, check_fields
from helpers.training import corpus as text
from helpers.training import runs
from helpers.training.loop import (
    History,
    Plan,
    TrainingDiverged,
    adamw,
    descend,
    must_be_finite,
    train_in_steps,
)
from helpers.training.parallel import join_world
from helpers.training.world import World
from helpers.v3 import DeepSeekV3, Routing, V3Config, checkpoint, fp8

import torch
import torch.nn.functional as F
from torch import Tensor

# V3 section 4.2, in trillions of tokens: the rate is constant to 10, falls along a
# cosine to a tenth at 14.3, is constant to 14.633, and 7.3e-6 / 2.2e-4 for the rest.
TOTAL = 14.8
CONSTANT = 10.0
COSINE = 14.3
LOW = 14.633
V3_PEAK = 2.2e-4
V3_LAST = 7.3e-6


@dataclass(frozen=True)
class Settings:
    """One run. Tokens = steps * batch_size * length.

    The values are V3's (section 4.2) where they carry over; lr and gamma fit short
    runs.
    """

    steps: Count = field(default=400, metadata={"help": "optimizer steps"})
    batch_size: Count = field(default=16, metadata={"help": "sequences a step"})
    length: Count = field(default=256, metadata={"help": "tokens a sequence"})
    lr: NonNegative = field(default=3e-3, metadata={"help": "peak learning rate"})
    warmup_steps: Whole = field(default=20, metadata={"help": "steps of rising rate"})
    beta1: NonNegative = field(default=0.9, metadata={"help": "AdamW"})
    beta2: NonNegative = field(default=0.95, metadata={"help": "AdamW"})
    weight_decay: NonNegative = field(default=0.1, metadata={"help": "of matrices"})
    grad_clip: NonNegative = field(default=1.0, metadata={"help": "largest norm"})
    # V3: 0.001 over 235,000 steps, 0 for the last 500B tokens
    gamma: NonNegative = field(default=0.003, metadata={"help": "bias update speed"})
    alpha: NonNegative = field(default=1e-4, metadata={"help": "balance loss weight"})
    mtp_lambda: NonNegative = field(
        default=0.3, metadata={"help": "MTP loss weight, while the rate is constant"}
    )
    mtp_lambda_last: NonNegative = field(
        default=0.1, metadata={"help": "MTP loss weight after that"}
    )
    valid_every: Count = field(default=50, metadata={"help": "steps to a validation"})
    valid_sequences: Count = field(default=32, metadata={"help": "sequences of one"})
    seed: Whole = field(default=0, metadata={"help": "of weights and batches"})

    def __post_init__(self) -> None:
        check_fields(self)


def tokens_done(step: int, settings: Settings) -> float:
    """How far V3 was at the same share of its run, in trillions of tokens."""
    return step / settings.steps * TOTAL


def learning_rate(step: int, settings: Settings) -> float:
    """Learning rate of `step`, counted from 0 (V3 section 4.2).

    A linear warm-up, a constant, a cosine to a tenth, then two constants.
    """
    peak = settings.lr
    low = peak / 10
    done = tokens_done(step, settings)
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if done < CONSTANT:
        return peak
    if done < COSINE:
        angle = math.pi * (done - CONSTANT) / (COSINE - CONSTANT)
        return low + (peak - low) * 0.5 * (1 + math.cos(angle))
    if done < LOW:
        return low
    return peak * V3_LAST / V3_PEAK


class Losses(NamedTuple):
    """The three losses of a batch, and how its tokens were routed."""

    main: Tensor  # cross-entropy of the next token
    mtp: Tensor  # mean cross-entropy of the MTP depths (V3 eq. 25)
    balance: Tensor  # sum of the layers' balance losses
    routings: list[Routing]  # of all MoE layers, those of MTP last


def losses(
    model: DeepSeekV3,
    tokens: Tensor,
    pool: Callable[[Tensor], Tensor] | None = None,
) -> Losses:
    """The losses of tokens [B, T + 1]. `pool`: as in `Routing.balance_loss`."""
    ids = tokens[:, :-1]
    targets = tokens[:, 1:]
    hidden, routings = model.trunk(ids)
    main = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())

    further, mtp_routings = model.predict_further(hidden, ids)
    depths = []
    for k, logits in enumerate(further, start=1):
        depth = F.cross_entropy(logits.flatten(0, 1), targets[:, k:].flatten())
        depths.append(depth)
    mtp = torch.stack(depths).mean() if depths else main.new_zeros(())

    balance = main.new_zeros(())
    routings = routings + mtp_routings
    for routing in routings:
        balance = balance + routing.balance_loss(model.config, pool)
    return Losses(main, mtp, balance, routings)


@torch.no_grad()
def evaluate(model: DeepSeekV3, tokens: Tensor, batch_size: int = 16) -> float:
    """Mean cross-entropy of the next token in nats, over tokens [n, T + 1].

    The model's mode stays as it was.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    for part in tokens.to(model.lm_head.weight.device).split(batch_size):
        logits = model(part[:, :-1]).flatten(0, 1).float()
        targets = part[:, 1:].flatten()
        total += F.cross_entropy(logits, targets, reduction="sum").item()
    model.train(was_training)
    return total / tokens[:, 1:].numel()


def max_violation(load: Tensor) -> float:
    """How far the busiest expert lies above the mean: max / mean - 1.

    load [E], tokens per expert (arXiv:2408.15664).
    """
    return (load.max() / load.mean().clamp(min=1e-9) - 1).item()


class Pretrainer:
    """The steps of pre-training, for `loop.train_in_steps`.

    Raises ValueError for a corpus or a length that does not fit the model.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        corpus: text.Corpus,
        settings: Settings,
        world: World,
    ) -> None:
        _check_that_they_fit(model.config, corpus, settings)
        self.model = model
        self.corpus = corpus
        self.settings = settings
        self.world = world
        self.optimizer = adamw(model, settings)
        self.routers = model.routers()
        self.recipe = fp8.recipe_of(model)
        self.device = model.lm_head.weight.device
        valid = corpus.valid_batch(settings.valid_sequences, settings.length + 1)
        self.valid = world.rows(valid, "valid_sequences")
        # of the step at hand, between `gradients` and `update`
        self.batch_losses: Losses
        self.means: list[float]
        model.train()

    def plan(self, label: str, folder: str | Path | None = None) -> Plan:
        """This run, to be followed, or changed first.

        A module that has built the model itself puts its own name into `Plan.module`,
        so that a run does not outlive a change of it.
        """
        return Plan(
            steps=self.settings.steps,
            identity={
                "config": asdict(self.model.config),
                "settings": asdict(self.settings),
                "corpus": self.corpus.hash,
                "precision": self.recipe and asdict(self.recipe),
            },
            module=__spec__.name,  # __name__ is "__main__" under `python -m`
            tokenizer=self.corpus.tokenizer,
            label=label,
            folder=Path(folder) if folder else None,
        )

    def follow(self, plan: Plan) -> History:
        """Do what is left of the plan; -> the history, as `train` describes it."""
        settings = self.settings
        return train_in_steps(
            self, lambda step: learning_rate(step, settings), plan, self.world
        )

    def gradients(self, step: int) -> float:
        """Forward and backward pass of the batch; -> its loss."""
        settings = self.settings
        batch = self.corpus.batch(
            step, settings.seed, settings.batch_size, settings.length + 1
        )
        tokens = self.world.rows(batch, "batch_size").to(self.device)
        mtp_weight = settings.mtp_lambda_last
        if tokens_done(step, settings) < CONSTANT:
            mtp_weight = settings.mtp_lambda
        bf16 = self.device.type == "cuda" and self.recipe is None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            self.batch_losses = losses(self.model, tokens, self._pool)
            main, mtp, balance, _ = self.batch_losses
            loss = main + mtp_weight * mtp + settings.alpha * balance
        loss.backward()
        self.means = self.world.mean(loss.item(), main.item(), mtp.item())
        return self.means[0]

    def witness(self) -> float:
        """The loss of the batch."""
        return self.means[0]

    def update(self, step: int) -> dict[str, Any]:
        """Optimizer step and bias update; -> what the history keeps."""
        settings = self.settings
        descend(self.model, self.optimizer, settings.grad_clip)
        if self.recipe is not None:
            fp8.round_moments(self.optimizer)

        # tokens that each expert got in the batch of all processes
        loads = []
        for routing in self.batch_losses.routings:
            loads.append(self.world.total(routing.load()))
        violations = [max_violation(load) for load in loads]
        kept: dict[str, Any] = {
            "loss": self.means[1],
            "mtp_loss": self.means[2],
            "lr": learning_rate(step, settings),
            "max_violation": sum(violations) / max(len(violations), 1),
        }
        last = step + 1 == settings.steps
        if last or (step + 1) % settings.valid_every == 0:
            kept["load"] = [load.tolist() for load in loads]
            kept["bias"] = [r.e_score_correction_bias.tolist() for r in self.routers]

        # V3 stops moving the bias for its last 500B tokens
        gamma = settings.gamma if tokens_done(step, settings) < COSINE else 0.0
        for router, load in zip(self.routers, loads, strict=True):
            router.update_bias(load, gamma)

        if "load" in kept:
            [valid_loss] = self.world.mean(evaluate(self.model, self.valid))
            must_be_finite(valid_loss, after=True)
            kept["valid_step"] = step + 1
            kept["valid_loss"] = valid_loss
        return kept

    def _pool(self, counts: Tensor) -> Tensor:
        """The mean of the counts over all processes."""
        return self.world.total(counts.clone()) / self.world.size


def _check_that_they_fit(
    config: V3Config, corpus: text.Corpus, settings: Settings
) -> None:
    """ValueError for a vocabulary or a length that the model cannot work with."""
    if corpus.vocab_size > config.vocab_size:
        raise ValueError(
            f"vocab_size={config.vocab_size} is too small for a corpus of "
            f"{corpus.vocab_size} tokens"
        )
    if settings.length <= config.num_nextn_predict_layers:
        raise ValueError(
            f"length={settings.length} is too short for "
            f"num_nextn_predict_layers={config.num_nextn_predict_layers}"
        )


def train(
    model: DeepSeekV3,
    corpus: text.Corpus,
    settings: Settings,
    folder: str | Path | None = None,
    save_every: int = 100,
    label: str = "training",
    world: World | None = None,
) -> History:
    """Pre-train `model` in place; with a `folder`, save there and resume from it.

    The history has one entry per step (loss, mtp_loss, lr, max_violation as the mean
    over MoE layers) and snapshots every `valid_every` steps and at the end (valid_step,
    valid_loss in nats per token, load and bias [layers][E]), and seconds of training.
    Raises ValueError for a folder of another run, a text too short, a vocabulary too
    large; TrainingDiverged for a loss that is not finite.
    """
    trainer = Pretrainer(model, corpus, settings, world or World())
    plan = replace(trainer.plan(label, folder), save_every=save_every)
    return trainer.follow(plan)


def run(
    config: V3Config,
    corpus: text.Corpus,
    settings: Settings,
    label: str,
    recipe: fp8.Recipe | None = None,
) -> tuple[DeepSeekV3, History]:
    """A model drawn from `settings.seed` and trained, with the history of it.

    Or the finished or half-finished one of exactly this config, corpus, settings and
    FP8 recipe.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = DeepSeekV3(config).to(World().device)
    parts: dict[str, object] = {
        "config": config,
        "settings": settings,
        "corpus": corpus.hash,
    }
    if recipe is not None:
        fp8.convert(model, recipe)
        parts["precision"] = recipe
    folder = runs.run_dir(label.replace(" ", "-").lower(), **parts)
    return model, train(model, corpus, settings, folder, label=label)


# ----------------------------------------------------------------------- command line


@dataclass
class CommandLine:
    """What the command line takes beside the settings."""

    out: str = field(
        metadata={"help": "folder for checkpoints; a run found there is gone on with"}
    )
    text: str | None = field(
        default=None,
        metadata={"help": "folder of text files; without it Python's standard library"},
    )
    config: str | None = field(
        default=None,
        metadata={"help": "a config.json of DeepSeek-V3's form; without it a tiny V3"},
    )
    max_bytes: Count | None = field(
        default=None, metadata={"help": "use only so much of the text"}
    )
    save_every: Count = field(
        default=100, metadata={"help": "steps between checkpoints"}
    )
    ep: int | None = field(
        default=None,
        metadata={
            "help": "processes that share one copy of the model; without it all that "
            "torchrun started"
        },
    )

    def __post_init__(self) -> None:
        check_fields(self)


def main() -> None:
    """Train from the command line; whatever it ends with is one line."""
    # transformers takes seconds to import, and no notebook needs it here
    from transformers import HfArgumentParser

    classes: Any = (CommandLine, Settings)  # its type for a dataclass fits none
    parser = HfArgumentParser(classes, description=__doc__)
    world = join_world()
    code = 0
    try:
        args, settings = parser.parse_args_into_dataclasses()
        line = _train_as_asked(args, settings, world)
    except (ValueError, OSError, TrainingDiverged) as error:
        line = f"{type(error).__name__}: {error}"
        code = 1
    except KeyboardInterrupt as stopped:
        line = str(stopped) or "stopped before the first step"
        code = 130
    if world.first:
        print(line, file=sys.stderr if code else sys.stdout, flush=True)
    world.leave(code)


def _train_as_asked(args: CommandLine, settings: Settings, world: World) -> str:
    """Train; -> the line that the run ends with."""
    config = _read_config(args.config)
    corpus = text.load(args.text, config.vocab_size, args.max_bytes)
    torch.manual_seed(settings.seed)
    model = world.shard(DeepSeekV3(config), args.ep).to(world.device)
    history = train(model, corpus, settings, args.out, args.save_every, world=world)
    return _summary(history, settings, corpus, world, args.out)


def _read_config(path: str | None) -> V3Config:
    if path is None:
        return V3Config.tiny()
    return V3Config.from_hf(json.loads(Path(path).read_text(encoding="utf-8")))


def _summary(
    history: History,
    settings: Settings,
    corpus: text.Corpus,
    world: World,
    out: str,
) -> str:
    """What a finished run has reached, and how fast."""
    loss = history["valid_loss"][-1]
    seconds = history["seconds"]
    bits = loss / math.log(2) / corpus.bytes_per_token
    tokens = settings.steps * settings.batch_size * settings.length
    line = (
        f"validation loss {loss:.4f} nats per token, {bits:.4f} bits per byte, "
        f"{seconds:.0f} s, {tokens / seconds:.0f} tokens/s; "
        f"checkpoint in {checkpoint.resolve(out)}"
    )
    if world.size > 1:
        share = history.get("all_to_all_seconds", 0) / seconds
        line += f"; {share:.1%} of the time in all-to-all"
    return line


if __name__ == "__main__":
    main()
