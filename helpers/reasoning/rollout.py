"""Answers drawn from a model, and the log-probabilities of their tokens.

The model is a DeepSeekV3 or a causal model of transformers; its prompts have any
lengths. Shapes: B answers, P tokens of the longest prompt, n of the longest answer.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from helpers.checks import Count, NonNegative, check, need
from helpers.reasoning.countdown import (
    ALL_OPERATORS,
    LANGUAGES,
    Problem,
    tokenizer,
)
from helpers.reasoning.rewards import behaviour
from helpers.training.corpus import END
from helpers.training.progress import Bar
from helpers.v3 import DeepSeekV3, Step, sample
from helpers.v3.generate import decode as decode_v3
from helpers.v3.generate import threads_for

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LanguageModel: TypeAlias = "DeepSeekV3 | PreTrainedModel"
AT_ONCE = 512  # answers that `sampled` draws in one batch


class Rollout(NamedTuple):
    """Answers to B prompts. Every answer starts in column P of `tokens`.

    tokens [B, P + n]: shorter prompts stand right, behind end tokens, and an answer
    that is over is filled up with end tokens. log_probs [B, n]: of the tokens drawn, at
    temperature 1 whatever they were drawn at; 0 behind an answer. lengths [B]: tokens
    of each answer, with its end token if it was not cut off. texts: the answers without
    end token. prompt_lengths [B].
    """

    tokens: Tensor
    log_probs: Tensor
    lengths: Tensor
    texts: list[str]
    prompt_lengths: Tensor

    @property
    def prompt(self) -> int:
        """P, the tokens of the longest prompt: all answers start behind so many."""
        return self.tokens.shape[1] - self.log_probs.shape[1]


# ------------------------------------------------------------------- drawing answers


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt. END comes first, as before each document of the corpus."""
    return [END, *tokenizer.encode(prompt).ids]


def rollout(
    model: LanguageModel,
    problems: list[Problem],
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Rollout:
    """One answer to each problem of Countdown, drawn in one batch.

    A problem that is to have several answers stands in the list as often. Arguments
    and errors are those of `roll_out_prompts`.
    """
    words = tokenizer()
    prompts = [prompt_ids(words, problem.prompt) for problem in problems]
    return roll_out_prompts(
        model, prompts, max_new_tokens, END, words.decode, generator, temperature
    )


@torch.no_grad()
def roll_out_prompts(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    end: int,
    decode: Callable[[list[int]], str],
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Rollout:
    """One answer to each prompt (token ids), drawn in one batch through a cache.

    An answer is over when it has written the token `end`, or after `max_new_tokens`.
    `decode` makes the text of an answer from its ids. The model's mode stays as it is:
    one with dropout should be in eval mode. Raises InputError for no prompts, an empty
    one or settings that cannot be, ValueError for prompts that do not fit the context.
    """
    check("max_new_tokens", max_new_tokens, Count)
    check("temperature", temperature, NonNegative)
    input_ids, prompt_lengths = _left_padded(prompts, end, device_of(model))
    B, P = input_ids.shape
    pad = P - prompt_lengths
    # where no row has padding, nobody is told of any
    steps = _steps(
        model,
        input_ids,
        max_new_tokens,
        temperature,
        end,
        generator,
        pad if pad.any() else None,
    )

    tokens = F.pad(input_ids, (0, max_new_tokens), value=end)
    log_probs = torch.zeros(B, max_new_tokens, device=tokens.device)
    n = 0
    with threads_for(input_ids):
        for step in steps:
            tokens[step.rows, P + n] = step.tokens
            log_probs[step.rows, n] = _chosen(step.logits, step.tokens)
            n += 1
    tokens = tokens[:, : P + n]

    answers = tokens[:, P:]
    ended = answers == end
    lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, n)
    inside = torch.arange(n, device=tokens.device) < lengths[:, None]
    log_probs = torch.where(inside, log_probs[:, :n], 0.0)
    texts = []
    said = inside & ~ended
    for ids, known in zip(answers.cpu(), said.cpu(), strict=True):
        texts.append(decode(ids[known].tolist()))
    return Rollout(tokens, log_probs, lengths, texts, prompt_lengths)


def sampled(
    model: LanguageModel,
    problems: list[Problem],
    max_new_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    label: str | None = None,
) -> Rollout:
    """`rollout` of many problems, `AT_ONCE` at a time, with a bar if it has a label.

    All depends on `seed`. The answers are filled up to the longest allowed, so n is
    max_new_tokens.
    """
    need(len(problems) > 0, "problems", problems, "give at least one")
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    starts = range(0, len(problems), AT_ONCE)
    parts = []
    for start in Bar(starts, desc=label, unit="part", disable=label is None):
        asked = problems[start : start + AT_ONCE]
        parts.append(rollout(model, asked, max_new_tokens, generator, temperature))

    P = max(part.prompt for part in parts)
    tokens = []
    log_probs = []
    texts = []
    for part in parts:
        before = P - part.prompt
        behind = max_new_tokens - part.log_probs.shape[1]
        tokens.append(F.pad(part.tokens, (before, behind), value=END))
        log_probs.append(F.pad(part.log_probs, (0, behind)))
        texts += part.texts
    return Rollout(
        torch.cat(tokens),
        torch.cat(log_probs),
        torch.cat([part.lengths for part in parts]),
        texts,
        torch.cat([part.prompt_lengths for part in parts]),
    )


def device_of(model: LanguageModel) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def _left_padded(
    prompts: list[list[int]], fill: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts that all end in the last column [B, P], and how long each is [B]."""
    need(len(prompts) > 0, "prompts", prompts, "give at least one")
    lengths = [len(prompt) for prompt in prompts]
    need(min(lengths) > 0, "prompts", prompts, "each needs at least one token")
    P = max(lengths)
    rows = [[fill] * (P - len(prompt)) + prompt for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(lengths, device=device)


def _steps(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    end: int,
    generator: torch.Generator,
    pad: Tensor | None,
) -> Iterator[Step]:
    """The answers token by token: one `Step` for each."""
    if isinstance(model, DeepSeekV3):
        return decode_v3(
            model, input_ids, max_new_tokens, temperature, end, generator, pad
        )
    return _decode_transformers(
        model, input_ids, max_new_tokens, temperature, end, generator, pad
    )


def _decode_transformers(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    end: int,
    generator: torch.Generator,
    pad: Tensor | None,
) -> Iterator[Step]:
    """`helpers.v3.decode` of a transformers model, through its own cache.

    A row that has ended leaves the batch at once.
    """
    # transformers takes seconds to import, and a DeepSeekV3 does not need it
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    rows = torch.arange(input_ids.shape[0], device=input_ids.device)
    new = input_ids
    for n in range(max_new_tokens):
        places = _places(pad, new.shape[1], input_ids.shape[1] + n)
        output = model(new, past_key_values=cache, logits_to_keep=1, **places)
        logits = output.logits[:, -1].float()
        tokens = sample(logits, temperature, generator)
        yield Step(rows, tokens, logits)

        alive = (tokens != end).nonzero().squeeze(-1)
        if len(alive) == 0:
            return
        if len(alive) < len(rows):
            rows = rows[alive]
            cache.batch_select_indices(alive)
            pad = None if pad is None else pad[alive]
        new = tokens[alive, None]


def _places(pad: Tensor | None, new: int, seen: int) -> dict[str, Tensor]:
    """What a transformers model must know of left padding; nothing where there is none.

    pad [b]: leading tokens of each row that are padding; new: tokens that come now;
    seen: all columns so far, those of the new ones included.
    """
    if pad is None:
        return {}
    columns = torch.arange(seen, device=pad.device)
    real = columns >= pad[:, None]
    positions = (columns[-new:] - pad[:, None]).clamp(min=0)
    return {"attention_mask": real.long(), "position_ids": positions}


# ------------------------------------------------------------------ log-probabilities


def token_log_probs(model: LanguageModel, tokens: Tensor, prompt: int) -> Tensor:
    """Log-probability [B, T - prompt] of each token behind the first `prompt` ones.

    tokens [B, T], without padding on the left. With gradients.
    """
    if isinstance(model, DeepSeekV3):
        # the head is large: only where its logits are asked for
        hidden = model.hidden(tokens[:, :-1])[:, prompt - 1 :]
        logits = model.lm_head(hidden)
    else:
        logits = model(tokens[:, :-1]).logits[:, prompt - 1 :]
    return _chosen(logits, tokens[:, prompt:])


def answer_log_probs(model: LanguageModel, answers: Rollout, rows: Tensor) -> Tensor:
    """Log-probability [b, n] of the tokens of some answers, with gradients.

    rows [b]: which answers; n: the longest of them. Behind the end of an answer stands
    the log-probability of what fills the row, or of any token.
    """
    P = answers.prompt
    n = int(answers.lengths[rows].max())
    tokens = answers.tokens[rows, : P + n]
    prompt_lengths = answers.prompt_lengths[rows]
    shortest = int(prompt_lengths.min())
    if shortest == P:
        return token_log_probs(model, tokens, P)

    # Each row moves to the left end: causal attention then needs no mask, since all
    # padding comes after the text.
    columns = torch.arange(P + n, device=tokens.device)
    moved = columns + (P - prompt_lengths)[:, None]
    tokens = tokens.gather(1, moved.clamp(max=P + n - 1))
    log_probs = token_log_probs(model, tokens, shortest)
    first = prompt_lengths - shortest
    return log_probs.gather(1, first[:, None] + columns[:n])


def micro_batches(lengths: Tensor, tokens: int = 4096) -> list[Tensor]:
    """Row indices in parts of about `tokens` padded tokens, like lengths together."""
    rows = lengths.argsort(descending=True)
    parts = []
    start = 0
    while start < len(rows):
        longest = int(lengths[rows[start]])
        size = max(1, tokens // longest)
        parts.append(rows[start : start + size])
        start += size
    return parts


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [..., V], tokens [...] -> their log-probabilities [...], in float32."""
    log_probs = logits.float().log_softmax(dim=-1)
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


# ------------------------------------------------------------- what the answers show


def measure(
    problems: list[Problem], answers: Rollout, operators: str = ALL_OPERATORS
) -> dict[str, float]:
    """Means over the answers of all that `rewards.behaviour` tells of one.

    Also "consistency_en" and "consistency_es", over the questions asked in that
    language; "length" in tokens; "cut_off", the share of answers without an end.
    Consistency is a mean over those who spoke a language, NaN where nobody did.
    """
    columns: dict[str, list[float]] = {}
    for problem, text in zip(problems, answers.texts, strict=True):
        seen = behaviour(problem, text, operators)
        for language in LANGUAGES:
            asked_in_it = language == problem.language
            value = seen["consistency"] if asked_in_it else math.nan
            seen = seen | {f"consistency_{language}": value}
        for name, value in seen.items():
            columns.setdefault(name, []).append(value)

    means = {name: _mean_of_known(values) for name, values in columns.items()}
    last = answers.prompt - 1 + answers.lengths
    ended = answers.tokens.gather(1, last[:, None]) == END
    means["length"] = answers.lengths.float().mean().item()
    means["cut_off"] = 1 - ended.float().mean().item()
    return means


def _mean_of_known(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
