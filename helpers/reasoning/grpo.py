"""Group Relative Policy Optimization (arXiv:2402.03300; R1 v2 section 2.1).

A step: ask questions, draw a group of answers to each, reward them by rules, and push
each answer up or down by how much better than its group it is.

What is not published for R1 is decided here: the expert bias stays as pre-training left
it (gamma 0, as in V3's last 500B tokens), so that the sampler and the trainer route
alike. There is no balance loss and no MTP loss, and MTP modules are not changed. The
formulas are in `objective`.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from helpers.checks import Count, NonNegative, Whole, check_fields, need
from helpers.reasoning import countdown, posttraining
from helpers.reasoning.countdown import Problem
from helpers.reasoning.objective import Level, advantages, grpo_loss, row_weights
from helpers.reasoning.rewards import (
    accuracy,
    language_consistency,
    readable,
    well_formed,
)
from helpers.reasoning.rollout import (
    LanguageModel,
    Rollout,
    answer_log_probs,
    device_of,
    measure,
    micro_batches,
    rollout,
    token_log_probs,
)
from helpers.training.loop import (
    History,
    Plan,
    adamw,
    descend,
    must_be_finite,
    train_in_steps,
)

import torch
from torch import Tensor

SAVE_EVERY = 10  # steps between checkpoints
SEED_STRIDE = 1_000_003  # steps of one seed never meet those of another
Watch = Callable[[Any, int], Any]


@dataclass(frozen=True)
class GRPO:
    """One RL run. The values fit a small model on Countdown.

    R1-Zero had 32 questions with 16 answers each, lr 3e-6, KL 0.001, a new reference
    every 400 steps, temperature 1 (R1 v2). Raises InputError for what cannot be.
    """

    steps: Count = 30
    questions: Count = 64
    group: Count = 8  # answers to each question
    max_new_tokens: Count = 200
    lr: NonNegative = 6e-4
    warmup_steps: Count = 5
    updates: Count = 2  # optimizer steps on each batch of answers
    clip: NonNegative = 0.2
    kl: NonNegative = 0.0  # weight of the divergence from the reference; 0: none
    refresh: Count = 400  # steps between copies of the policy into the reference
    # "sequence": every answer weighs the same (GRPO); "token": every token of the batch
    # does (DAPO); "constant": every token, by no length that the model chose (Dr. GRPO)
    level: Level = "sequence"
    divide_by_std: bool = True  # False: Dr. GRPO
    weight_format: float = 0.2
    weight_language: float = 0.0
    weight_readable: float = 0.0
    operators: str = countdown.ALL_OPERATORS
    beta1: NonNegative = 0.9
    beta2: NonNegative = 0.95
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 1.0
    seed: Whole = 0

    def __post_init__(self) -> None:
        check_fields(self)
        countdown.check_operators(self.operators)
        need(
            self.group > 1,
            "group",
            self.group,
            "an answer's advantage is measured against the others of its group",
        )
        need(
            self.updates <= self.questions,
            "updates",
            self.updates,
            f"each needs a question of its own, and questions={self.questions}",
        )


def reward(settings: GRPO, problem: Problem, text: str) -> float:
    """What the rules pay for one answer.

    Accuracy, and format, language consistency and a readable last line at their
    weights.
    """
    return (
        accuracy(problem, text, settings.operators)
        + settings.weight_format * well_formed(text)
        + settings.weight_language * language_consistency(problem.language, text)
        + settings.weight_readable * readable(problem, text)
    )


# --------------------------------------------------------------------------- training


@dataclass
class Batch:
    """What one step asks, is answered and learns from: B = questions * group answers.

    The answers of a group stand together. mini_batches: for each optimizer step the
    rows of its questions.
    """

    problems: list[Problem]
    answers: Rollout
    rewards: Tensor  # [B]
    advantage: Tensor  # [B]
    mini_batches: list[Tensor]


class PartLoss(NamedTuple):
    """The loss of some rows, and two signs of how far the policy has moved."""

    loss: Tensor
    gap: float  # largest |log_prob of the trainer - log_prob of the sampler|
    clipped: float  # share of the tokens whose ratio lies outside the clip


@dataclass
class MiniBatch:
    """What is known of a mini-batch when its gradients are in place."""

    loss: float = 0.0
    gap: float = 0.0
    clipped: list[float] = field(default_factory=list)  # of each part


class GRPOTrainer:
    """The steps of GRPO, for `loop.train_in_steps`."""

    def __init__(
        self,
        model: Any,
        settings: GRPO,
        watch: Watch | None = None,
        watch_at: tuple[int, ...] = (),
    ) -> None:
        self.model = model
        self.settings = settings
        self.watch = watch
        self.watch_at = watch_at
        self.device = device_of(model)
        self.optimizer = adamw(model, settings)
        # dropout (transformers) is off: sampler and trainer are the same policy
        self.model.eval()
        self.reference = copy.deepcopy(model) if settings.kl > 0 else None
        self.batch: Batch
        self.seen: list[MiniBatch]

    def gradients(self, step: int) -> float:
        """Collect a batch, and put the gradients of its first mini-batch in place."""
        if self.reference is not None and step % self.settings.refresh == 0:
            self.reference.load_state_dict(self.model.state_dict())
        self.model.eval()
        self.batch = self.collect(step)
        self.seen = [self.backward(self.batch.mini_batches[0])]
        return self.seen[0].loss

    def witness(self) -> float:
        """The mean reward plus the mean surprise (-log p) of a token drawn.

        The loss will not do: before the first update the ratios are 1 and advantages
        sum to 0, so that it is nothing but rounding.
        """
        answers = self.batch.answers
        surprise = -answers.log_probs.sum() / answers.lengths.sum()
        return self.batch.rewards.mean().item() + surprise.item()

    def update(self, step: int) -> dict[str, Any]:
        """Descend, once for each mini-batch; -> what the history keeps of the step."""
        watched = []
        if self.watch is not None and step in self.watch_at:
            watched.append(self.watch(self.model, step))

        descend(self.model, self.optimizer, self.settings.grad_clip)
        for rows in self.batch.mini_batches[1:]:
            seen = self.backward(rows)
            must_be_finite(seen.loss)
            descend(self.model, self.optimizer, self.settings.grad_clip)
            self.seen.append(seen)

        kept = self.log()
        if self.watch is not None and step + 1 == self.settings.steps:
            watched.append(self.watch(self.model, step + 1))
        if watched:
            kept["watch"] = watched
        return kept

    def collect(self, step: int) -> Batch:
        """Questions, answers, rewards and advantages, from (seed, step) alone."""
        settings = self.settings
        seed = settings.seed * SEED_STRIDE + step
        asked = []
        questions = countdown.problems(
            "train", settings.questions, seed, settings.operators
        )
        for problem in questions:
            asked += [problem] * settings.group

        answers = self.draw(asked, seed)

        rewards = torch.zeros(len(asked))
        for i, text in enumerate(answers.texts):
            rewards[i] = self.reward_of(asked[i], text)
        by_group = rewards.view(-1, settings.group)
        advantage = advantages(by_group, settings.divide_by_std).flatten()

        # a group stays together; each update learns from questions of its own
        generator = torch.Generator().manual_seed(step)
        order = torch.randperm(settings.questions, generator=generator)
        of_group = torch.arange(settings.group)
        mini_batches = []
        for part in order.tensor_split(settings.updates):
            rows = part[:, None] * settings.group + of_group
            mini_batches.append(rows.flatten())
        return Batch(asked, answers, rewards, advantage, mini_batches)

    def reward_of(self, problem: Problem, text: str) -> float:
        """What the answer `text` is paid."""
        return reward(self.settings, problem, text)

    def draw(self, asked: list[Problem], seed: int) -> Rollout:
        """An answer to each problem, drawn by the model as it is now."""
        generator = torch.Generator(self.device).manual_seed(seed)
        length = self.settings.max_new_tokens
        try:
            return rollout(self.model, asked, length, generator)
        except ValueError:
            # Weights that diverged cannot be drawn from. Then their loss is no number
            # either, and the loop says what to do about it.
            words = countdown.tokenizer().encode(asked[0].prompt).ids
            with torch.no_grad():
                tokens = torch.tensor([words], device=self.device)
                must_be_finite(-token_log_probs(self.model, tokens, 1).mean().item())
            raise

    def backward(self, rows: Tensor) -> MiniBatch:
        """Add the gradients of a mini-batch's loss to those in place.

        rows: the answers of the mini-batch. -> its loss, and how far the policy moved.
        """
        settings = self.settings
        lengths = self.batch.answers.lengths.cpu()
        weight = torch.zeros(len(lengths))
        weight[rows] = row_weights(
            lengths[rows], settings.level, settings.max_new_tokens
        )
        if self.reference is None:
            # nothing to learn from an answer that is as good as its group
            rows = rows[self.batch.advantage[rows] != 0]

        seen = MiniBatch()
        for part in micro_batches(lengths[rows]):
            loss, gap, clipped = self.part_loss(rows[part], weight)
            loss.backward()
            seen.loss += loss.item()
            seen.gap = max(seen.gap, gap)
            seen.clipped.append(clipped)
        return seen

    def part_loss(self, rows: Tensor, weight: Tensor) -> PartLoss:
        """Forward pass of the answers `rows`; weight [B] of each answer's tokens."""
        settings = self.settings
        answers = self.batch.answers
        lengths = answers.lengths[rows]
        n = int(lengths.max())
        old = answers.log_probs[rows, :n]
        inside = torch.arange(n, device=self.device) < lengths[:, None]

        log_probs = answer_log_probs(self.model, answers, rows)
        reference = None
        with torch.no_grad():
            if self.reference is not None:
                reference = answer_log_probs(self.reference, answers, rows)
            moved = torch.where(inside, log_probs - old, 0.0)
            outside = (moved.exp() - 1).abs() > settings.clip

        loss = grpo_loss(
            log_probs,
            old,
            self.batch.advantage[rows].to(self.device),
            weight[rows].to(self.device)[:, None] * inside,
            settings.clip,
            settings.kl,
            reference,
        )
        share = outside.sum().item() / inside.sum().item()
        return PartLoss(loss, moved.abs().max().item(), share)

    def log(self) -> dict[str, Any]:
        """What the history keeps of a step; None where a number is not known."""
        batch = self.batch
        kept: dict[str, Any] = {}
        measured = measure(batch.problems, batch.answers, self.settings.operators)
        for name, value in measured.items():
            kept[name] = None if math.isnan(value) else value
        clipped = []
        for seen in self.seen:
            clipped += seen.clipped
        kept["reward"] = batch.rewards.mean().item()
        kept["loss"] = sum(seen.loss for seen in self.seen) / len(self.seen)
        # only the first mini-batch is seen by the very policy that drew the answers
        kept["gap"] = self.seen[0].gap
        kept["clipped"] = sum(clipped) / max(len(clipped), 1)
        return kept


def grpo(
    base: LanguageModel,
    settings: GRPO,
    label: str,
    watch: Watch | None = None,
    watch_at: tuple[int, ...] = (),
    folder: str | Path | None = None,
) -> tuple[Any, History]:
    """A copy of `base` trained by GRPO, and the history of it.

    Or the finished or half-finished one of exactly this base and settings. The history
    has per step `measure` of the answers (before the update), reward, loss, clipped and
    gap as in `PartLoss`. history["watch"] has the JSON that `watch(model, step)` gave,
    before the steps `watch_at` and after the last one. Raises ValueError for a folder
    of another run or a base of another vocabulary, TrainingDiverged.
    """
    need(
        watch is not None or not watch_at,
        "watch_at",
        watch_at,
        "nothing is watched without `watch`",
    )
    run = posttraining.begin(base, settings, label, folder, watch_at=list(watch_at))
    trainer = GRPOTrainer(run.model, settings, watch, watch_at)
    keep = {}
    if trainer.reference is not None:
        for name, tensor in trainer.reference.state_dict().items():
            keep[f"reference.{name}"] = tensor
    plan = Plan(
        steps=settings.steps,
        identity=run.identity,
        module=__name__,
        tokenizer=countdown.tokenizer(),
        label=label,
        folder=run.folder,
        save_every=SAVE_EVERY,
        keep=keep,
        history={"watch": []},
    )

    def rate(step: int) -> float:
        return settings.lr * min(1, (step + 1) / settings.warmup_steps)

    history = train_in_steps(trainer, rate, plan)
    # each step keeps a list: the last one may be watched before and after
    watched: list[Any] = []
    for entries in history["watch"]:
        watched += entries
    return run.model, history | {"watch": watched}
