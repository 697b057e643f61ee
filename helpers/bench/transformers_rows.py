"""Our model beside transformers' DeepseekV3ForCausalLM with the same weights."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from helpers.bench.timing import Job, Row, faster, interleaved, seconds_of
from helpers.v3 import DeepSeekV3, V3Config, checkpoint, generate

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3ForCausalLM
from transformers.utils import logging

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")  # of transformers' experts
# batched_mm copies the weights of every token's experts: gigabytes for a long pass,
# and never the fastest there
MOST_TOKENS_BATCHED = 1024
PROBE = 6  # tokens that each implementation decodes, to find the fastest


@dataclass
class Pair:
    """Our model and transformers' with the same weights."""

    ours: DeepSeekV3
    theirs: Any
    config: V3Config
    device: str

    def ids(self, batch: int, length: int) -> Tensor:
        """Random tokens [batch, length] without the end token."""
        shape = (batch, length)
        return torch.randint(1, self.config.vocab_size, shape, device=self.device)

    def their_logits(self, ids: Tensor) -> Tensor:
        """Logits of transformers' model without a cache."""
        return self.theirs(ids, use_cache=False).logits

    def choose_their_fastest(self, job: Job, tokens: int) -> str:
        """Set the implementation of their experts that does `job` fastest; -> it.

        tokens: how many the job passes through the model at once.
        """
        seconds = {}
        for implementation in IMPLEMENTATIONS:
            if implementation == "batched_mm" and tokens > MOST_TOKENS_BATCHED:
                continue
            self.theirs.set_experts_implementation(implementation)
            job()
            seconds[implementation] = min(seconds_of(job), seconds_of(job))
        best = min(seconds, key=seconds.__getitem__)
        self.theirs.set_experts_implementation(best)
        return best


def make_pair(config: V3Config, device: str) -> Pair:
    """Both models, by way of a file."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    ours = DeepSeekV3(config.with_(num_nextn_predict_layers=0))
    with tempfile.TemporaryDirectory() as folder:
        files = checkpoint.save(ours, folder)
        theirs: Any = DeepseekV3ForCausalLM.from_pretrained(files)
    return Pair(ours.to(device), theirs.to(device), config, device)


def training_row(pair: Pair, batch: int, length: int, repeats: int) -> Row:
    """Forward, backward and optimizer step."""
    ids = pair.ids(batch, length + 1)
    ours = training_step(pair.ours, pair.ours, ids)
    theirs = training_step(pair.theirs, pair.their_logits, ids)
    what = f"training step, {batch} x {length} tokens"
    return _row(pair, what, batch * length, ours, theirs, repeats)


def training_step(
    model: torch.nn.Module, logits_of: Callable[[Tensor], Tensor], ids: Tensor
) -> Job:
    """One step of next-token training on ids [B, T + 1], as a function."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> None:
        model.train()
        logits = logits_of(ids[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def prefill_row(pair: Pair, batch: int, length: int, repeats: int) -> Row:
    """A forward pass without gradients."""
    ids = pair.ids(batch, length)

    @torch.inference_mode()
    def ours() -> None:
        pair.ours.eval()(ids)

    @torch.inference_mode()
    def theirs() -> None:
        pair.theirs.eval()
        pair.their_logits(ids)

    what = f"prefill, {batch} x {length} tokens"
    return _row(pair, what, ids.numel(), ours, theirs, repeats)


def _row(
    pair: Pair, what: str, tokens: int, ours: Job, theirs: Job, repeats: int
) -> Row:
    best = pair.choose_their_fastest(theirs, tokens)
    times = interleaved({"ours": ours, "theirs": theirs}, repeats)
    row = faster(what, tokens, "tokens", times["ours"], times["theirs"])
    return replace(row, note=f"their fastest experts: {best}")


def decoding_row(
    pair: Pair, batch: int, prompt: int, repeats: int, new_tokens: int
) -> Row:
    """Greedy decoding after a prompt, whose own cost is taken off."""
    ids = pair.ids(batch, prompt)
    best = pair.choose_their_fastest(_their_decoding(pair, ids, PROBE), ids.numel())
    jobs = {
        "our prompt": _our_decoding(pair, ids, 1),
        "ours": _our_decoding(pair, ids, new_tokens),
        "their prompt": _their_decoding(pair, ids, 1),
        "theirs": _their_decoding(pair, ids, new_tokens),
    }
    times = interleaved(jobs, repeats)
    # both runs of a turn pay for the prompt and its first token
    alone = {}
    for side, before in (("ours", "our prompt"), ("theirs", "their prompt")):
        both = zip(times[side], times[before], strict=True)
        alone[side] = [whole - first for whole, first in both]
    row = faster(
        f"decoding, batch {batch}, after {prompt} tokens",
        batch * (new_tokens - 1),
        "tokens",
        alone["ours"],
        alone["theirs"],
    )
    return replace(row, note=f"their fastest experts: {best}")


def _our_decoding(pair: Pair, ids: Tensor, new_tokens: int) -> Job:
    return lambda: generate(pair.ours.eval(), ids, new_tokens)


def _their_decoding(pair: Pair, ids: Tensor, new_tokens: int) -> Job:
    def decode() -> None:
        pair.theirs.eval().generate(
            ids,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )

    return decode
