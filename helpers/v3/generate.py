"""Writing text: sampling, decoding through the latent cache, drafting with MTP.

Shapes: B sequences, T tokens of the prompts, V vocab_size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from helpers.checks import need
from helpers.v3 import fast_decode
from helpers.v3.attention import LatentCache
from helpers.v3.model import DeepSeekV3, check_input_ids

import torch
from torch import Tensor

# Rows that have ended are taken out of the batch once so few are left: copying the
# cache costs about as much as decoding for the others a few times.
COMPACT_BELOW = 0.8


def sample(
    logits: Tensor, temperature: float, generator: torch.Generator | None = None
) -> Tensor:
    """logits [B, V] -> token ids [B], drawn from softmax(logits / temperature).

    At temperature 0 the token of the largest logit. Draws go by the inverse of the
    cumulative distribution. Raises ValueError where logits are not numbers.
    """
    largest, token = logits.max(dim=-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError(
            "logits hold NaN or infinity: the model's weights are damaged, or its "
            "training diverged; take an earlier checkpoint"
        )
    if temperature == 0:
        return token.squeeze(-1)
    # the maximum goes first: no temperature is so small that the rest overflows
    divisor = max(temperature, torch.finfo(torch.float32).tiny)
    scaled = (logits.float() - largest.float()) / divisor
    cdf = torch.softmax(scaled, dim=-1).cumsum(dim=-1)
    uniform = torch.rand(logits.shape[0], 1, generator=generator, device=logits.device)
    drawn = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).squeeze(-1)
    return drawn.clamp_(max=logits.shape[-1] - 1)


class Step(NamedTuple):
    """One token for each row that is still being written."""

    rows: Tensor  # [b] which rows of the batch
    tokens: Tensor  # [b] what each of them writes
    logits: Tensor  # [b, V] what it was drawn from


@torch.inference_mode()
def decode(
    model: DeepSeekV3,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
    pad: Tensor | None = None,
) -> Iterator[Step]:
    """Continue B prompts input_ids [B, T] token by token: one `Step` for each.

    The latent cache is allocated once. A row that has written `eos_token_id` writes it
    again until it leaves the batch; when all have ended there are no more steps. `pad`
    [B] is how many leading tokens of each row are padding and not to be seen (prompts
    of different lengths end in the same column). Raises ValueError when prompt and
    answer do not fit the context.
    """
    _check_request(model, input_ids, max_new_tokens, temperature, pad)
    if max_new_tokens == 0:
        return
    B, T = input_ids.shape
    length = T + max_new_tokens - 1
    cache = LatentCache(
        model.config, len(model.layers), B, length, model.lm_head.weight, pad
    )
    read = _reader(model, cache, length)
    rows = torch.arange(B, device=input_ids.device)
    open_rows = torch.ones_like(rows, dtype=torch.bool)
    logits = model.lm_head(model.hidden(input_ids, cache)[:, -1])
    for n in range(max_new_tokens):
        tokens = sample(logits, temperature, generator)
        if eos_token_id is not None:
            tokens = torch.where(open_rows, tokens, eos_token_id)
        yield Step(rows, tokens, logits)

        if eos_token_id is not None:
            open_rows = tokens != eos_token_id
            left = int(open_rows.sum())
            if left == 0:
                return
            if left <= COMPACT_BELOW * len(rows):
                alive = open_rows.nonzero().squeeze(-1)
                rows = rows[alive]
                tokens = tokens[alive]
                open_rows = open_rows[alive]
                cache.keep(alive)
        if n + 1 < max_new_tokens:
            logits = read(tokens)


def _reader(
    model: DeepSeekV3, cache: LatentCache, length: int
) -> Callable[[Tensor], Tensor]:
    """A function from the next tokens [b] to logits [b, V]; the cache grows by them."""
    if fast_decode.fits(model):
        decoder = fast_decode.Decoder(model, length)
        return lambda tokens: decoder.read(tokens, cache)
    return lambda tokens: model(tokens.unsqueeze(1), cache)[:, -1]


def generate(
    model: DeepSeekV3,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
    pad: Tensor | None = None,
) -> Tensor:
    """Continue B prompts: input_ids [B, T] -> [B, T + new], new <= max_new_tokens.

    Greedy at temperature 0. Rows that end early are filled up with `eos_token_id`.
    Arguments and errors are those of `decode`.
    """
    columns = [input_ids]
    with threads_for(input_ids):
        for step in decode(
            model, input_ids, max_new_tokens, temperature, eos_token_id, generator, pad
        ):
            fill = 0 if eos_token_id is None else eos_token_id
            column = input_ids.new_full((input_ids.shape[0], 1), fill)
            column[step.rows, 0] = step.tokens.to(column.dtype)
            columns.append(column)
    return torch.cat(columns, dim=1)


class Speculation(NamedTuple):
    """What `generate_with_mtp` counted."""

    forwards: int  # passes of the main model
    drafted: int  # tokens that MTP proposed
    accepted: int  # of them those that the main model would have written too


@torch.inference_mode()
def generate_with_mtp(
    model: DeepSeekV3,
    input_ids: Tensor,
    max_new_tokens: int,
    eos_token_id: int | None = None,
) -> tuple[Tensor, Speculation]:
    """Greedy decoding of one row [1, T] where MTP drafts and the main model checks.

    The first MTP module drafts the token after next (V3 section 5.4.3). A draft is kept
    only where the main model would have written the same, so the text is that of
    `generate`. -> ids [1, T + new], what was counted. Raises ValueError for more than
    one row and for a model without MTP.
    """
    _check_request(model, input_ids, max_new_tokens, temperature=0.0)
    if input_ids.shape[0] != 1 or not model.mtp:
        raise ValueError(
            "drafting needs one row and a model with num_nextn_predict_layers of at "
            "least 1"
        )
    if max_new_tokens == 0:
        return input_ids, Speculation(0, 0, 0)
    with threads_for(input_ids):
        text, counted = _draft_and_check(model, input_ids, max_new_tokens, eos_token_id)
    ids = torch.tensor([text], device=input_ids.device, dtype=input_ids.dtype)
    return ids, counted


def _draft_and_check(
    model: DeepSeekV3, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None
) -> tuple[list[int], Speculation]:
    device = input_ids.device
    like = model.lm_head.weight
    end = input_ids.shape[1] + max_new_tokens
    main = LatentCache(model.config, len(model.layers), 1, end + 1, like)
    side = LatentCache(model.config, 1, 1, end + 1, like)

    text = input_ids[0].tolist()
    hidden = model.hidden(input_ids, main)
    text.append(int(model.lm_head(hidden[:, -1]).argmax()))
    forwards = 1
    drafted = 0
    accepted = 0
    while len(text) < end and text[-1] != eos_token_id:
        # MTP: each checked state meets the embedding of the token after it
        seen = hidden.shape[1]
        after = torch.tensor([text[-seen:]], device=device)
        turns = model.rope(side.length, seen)
        state, _ = model.mtp[0](hidden, model.embed_tokens(after), turns, side)
        side.length += seen
        draft = int(model.lm_head(state[:, -1]).argmax())
        drafted += 1

        # the main model reads the last token and the draft in one pass
        two = torch.tensor([[text[-1], draft]], device=device)
        hidden = model.hidden(two, main)
        forwards += 1
        first, second = model.lm_head(hidden[0]).argmax(dim=-1).tolist()
        written = [first]
        if first == draft and first != eos_token_id:
            written.append(second)
        written = written[: end - len(text)]
        accepted += len(written) - 1
        text += written

        # forget the state of a draft that was wrong
        main.length -= 2 - len(written)
        hidden = hidden[:, : len(written)]
    return text, Speculation(forwards, drafted, accepted)


@contextmanager
def threads_for(input_ids: Tensor) -> Iterator[None]:
    """One thread where there is one row: it decodes as fast as two do.

    Its products are too small to share, and a second thread only waits, all the longer
    when other programs run.
    """
    before = torch.get_num_threads()
    if input_ids.shape[0] > 1 or input_ids.device.type != "cpu":
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_request(
    model: DeepSeekV3,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    pad: Tensor | None = None,
) -> None:
    T = check_input_ids(model.config, input_ids, max_new_tokens)
    largest_id = model.config.vocab_size - 1
    beyond = (input_ids < 0) | (input_ids > largest_id)
    if beyond.any():
        raise ValueError(
            f"input_ids must lie in 0..{largest_id} "
            f"(vocab_size={model.config.vocab_size})"
        )
    need(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "it must be at least 0")
    good = math.isfinite(temperature) and temperature >= 0
    need(good, "temperature", temperature, "it must be a finite number of at least 0")
    if pad is not None:
        right = pad.shape == input_ids.shape[:1] and bool(
            ((pad >= 0) & (pad < T)).all()
        )
        need(right, "pad", pad.tolist(), f"one number from 0 to {T - 1} for each row")
