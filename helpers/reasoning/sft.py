"""Supervised fine-tuning on questions and answers (V3 section 5.1, R1 v2 section 2.3).

Only the answers are learnt. As in `grpo`, expert biases and MTP modules stay as they
are, and there is no balance loss.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from helpers.checks import Count, NonNegative, Whole, check_fields
from helpers.reasoning import countdown, posttraining
from helpers.reasoning.rollout import (
    LanguageModel,
    device_of,
    micro_batches,
    prompt_ids,
    token_log_probs,
)
from helpers.training.corpus import END
from helpers.training.loop import History, Plan, adamw, descend, train_in_steps
from helpers.training.runs import key

import torch
from torch import Tensor

SAVE_EVERY = 100  # steps between checkpoints
PART_TOKENS = 1024  # padded tokens of one forward pass where lengths differ
MIXING = 20  # tokens by which the lengths of a batch may differ, so that epochs do


@dataclass(frozen=True)
class SFT:
    """One fine-tuning: the rate falls along a cosine to a tenth.

    V3: 2 epochs, 5e-6 to 1e-6 (V3 section 5.1). Raises InputError for what cannot be.
    """

    epochs: Count = 2
    batch_size: Count = 32
    lr: NonNegative = 1e-3
    beta1: NonNegative = 0.9
    beta2: NonNegative = 0.95
    weight_decay: NonNegative = 0.1
    grad_clip: NonNegative = 1.0
    # texts of like length share a batch: faster, but where lengths differ much, a token
    # of a short text weighs more
    by_length: bool = True
    seed: Whole = 0

    def __post_init__(self) -> None:
        check_fields(self)


class Example(NamedTuple):
    """A question and its answer in token ids; the answer ends with END."""

    prompt: list[int]
    answer: list[int]

    @property
    def width(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.answer)


class SFTTrainer:
    """The steps of fine-tuning, for `loop.train_in_steps`."""

    def __init__(
        self, model: Any, examples: list[tuple[str, str]], settings: SFT
    ) -> None:
        self.model = model
        self.settings = settings
        self.device = device_of(model)
        self.optimizer = adamw(model, settings)
        self.examples = _encoded(examples)
        self.batches = math.ceil(len(examples) / settings.batch_size)
        self.steps = settings.epochs * self.batches
        self.loss: float
        # dropout (transformers) is off, as in GRPO
        self.model.eval()

    def gradients(self, step: int) -> float:
        """Put the gradients of a batch's loss in place; -> the loss.

        It is the mean cross-entropy of the tokens of its answers, ends included.
        """
        batch = self.collect(step)
        learnt = sum(len(example.answer) for example in batch)
        self.loss = 0.0
        for part in self._parts(batch):
            loss = self._summed_loss(part) / learnt
            loss.backward()
            self.loss += loss.item()
        return self.loss

    def witness(self) -> float:
        """The loss of the batch."""
        return self.loss

    def update(self, step: int) -> dict[str, Any]:
        """Optimizer step; -> what the history keeps."""
        descend(self.model, self.optimizer, self.settings.grad_clip)
        return {"loss": self.loss}

    def collect(self, step: int) -> list[Example]:
        """The examples of a step. Every epoch takes each once, in an order of its own.

        Drawn from (seed, step) alone.
        """
        epoch = step // self.batches
        rng = random.Random(f"{self.settings.seed} {epoch}")
        places = []
        for example in self.examples:
            length = len(example.answer) if self.settings.by_length else 0
            places.append(length + MIXING * rng.random())
        order = sorted(range(len(places)), key=places.__getitem__)
        batch = rng.sample(range(self.batches), self.batches)[step % self.batches]
        start = batch * self.settings.batch_size
        chosen = order[start : start + self.settings.batch_size]
        return [self.examples[i] for i in chosen]

    def _parts(self, batch: list[Example]) -> list[list[Example]]:
        """The batch in parts of like width: the same sum of losses, less padding."""
        if self.settings.by_length:
            return [batch]
        widths = torch.tensor([example.width for example in batch])
        parts = []
        for rows in micro_batches(widths, PART_TOKENS):
            parts.append([batch[i] for i in rows.tolist()])
        return parts

    def _summed_loss(self, part: list[Example]) -> Tensor:
        """Cross-entropy of the tokens of all answers of a part, added up."""
        tokens, learnt = right_padded(part)
        log_probs = token_log_probs(self.model, tokens.to(self.device), 1)
        return -torch.where(learnt.to(self.device), log_probs, 0.0).sum()


def _encoded(examples: list[tuple[str, str]]) -> list[Example]:
    words = countdown.tokenizer()
    encoded = []
    for prompt, answer in examples:
        ids = [*words.encode(answer).ids, END]
        encoded.append(Example(prompt_ids(words, prompt), ids))
    return encoded


def right_padded(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], filled up with END, and which are learnt: booleans [B, T - 1].

    The latter belong to the tokens behind the first one, as `token_log_probs` does.
    """
    T = max(example.width for example in examples)
    tokens = torch.full((len(examples), T), END)
    learnt = torch.zeros(len(examples), T - 1, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(examples):
        width = len(prompt) + len(answer)
        tokens[i, :width] = torch.tensor(prompt + answer)
        learnt[i, len(prompt) - 1 : width - 1] = True
    return tokens, learnt


def sft(
    base: LanguageModel,
    examples: list[tuple[str, str]],
    settings: SFT,
    label: str,
    folder: str | Path | None = None,
) -> tuple[Any, History]:
    """A copy of `base` fine-tuned on (prompt, answer) texts, and the history of it.

    Or the finished or half-finished one of exactly these. The history has the loss of
    each step. Without examples it is the base as it was, and a printed line says so.
    Raises ValueError for a folder of another run, TrainingDiverged.
    """
    if not examples:
        print(f"{label}: there are no examples, so nothing is learnt")
    examples_key = key(examples=examples)
    run = posttraining.begin(base, settings, label, folder, examples=examples_key)
    trainer = SFTTrainer(run.model, examples, settings)
    steps = trainer.steps
    plan = Plan(
        steps=steps,
        identity=run.identity,
        module=__name__,
        tokenizer=countdown.tokenizer(),
        label=label,
        folder=run.folder,
        save_every=SAVE_EVERY,
        history={"loss": []},
    )

    def rate(step: int) -> float:
        return settings.lr * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    return run.model, train_in_steps(trainer, rate, plan)
