"""Our model beside transformers' DeepseekV3ForCausalLM with the same weights."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from helpers.bench.timing import Job, interleaved
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


class Row(NamedTuple):
    """Tokens per second of both, and which of their experts were the fastest."""

    name: str
    ours: float
    theirs: float
    implementation: str


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

    def jobs(self, ours: Job, theirs: Job, tokens: int) -> dict[str, Job]:
        """Our job, and theirs with each implementation of the experts."""
        jobs = {"ours": ours}
        for implementation in IMPLEMENTATIONS:
            if implementation == "batched_mm" and tokens > MOST_TOKENS_BATCHED:
                continue

            def run(implementation: str = implementation) -> None:
                their_model: Any = self.theirs
                their_model.set_experts_implementation(implementation)
                theirs()

            jobs[implementation] = run
        return jobs


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


def rows(pair: Pair, repeats: int, new_tokens: int) -> list[Row]:
    """Training, prefill and decoding."""
    found = []
    for batch, length in ((16, 256), (4, 1024)):
        found.append(training_row(pair, batch, length, repeats))
    found.append(prefill_row(pair, repeats))
    for batch, prompt in ((1, 64), (1, 512), (64, 64), (64, 512)):
        found.append(decoding_row(pair, batch, prompt, repeats, new_tokens))
    return found


def training_row(pair: Pair, batch: int, length: int, repeats: int) -> Row:
    """Forward, backward and optimizer step."""
    ids = pair.ids(batch, length + 1)
    tokens = batch * length
    jobs = pair.jobs(
        training_step(pair.ours, pair.ours, ids),
        training_step(pair.theirs, pair.their_logits, ids),
        tokens,
    )
    name = f"training (fwd+bwd+step), {batch} x {length}"
    return _row(name, tokens, interleaved(jobs, repeats))


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


def prefill_row(pair: Pair, repeats: int) -> Row:
    """A forward pass over 4 x 1024 tokens."""
    ids = pair.ids(4, 1024)

    @torch.inference_mode()
    def ours() -> None:
        pair.ours.eval()(ids)

    @torch.inference_mode()
    def theirs() -> None:
        pair.theirs.eval()
        pair.their_logits(ids)

    jobs = pair.jobs(ours, theirs, ids.numel())
    return _row("prefill, 4 x 1024", ids.numel(), interleaved(jobs, repeats))


def decoding_row(
    pair: Pair, batch: int, prompt: int, repeats: int, new_tokens: int
) -> Row:
    """Greedy decoding after a prompt, whose own cost is taken off."""
    ids = pair.ids(batch, prompt)
    seconds = []
    for n in (1, new_tokens):
        jobs = pair.jobs(_our_decoding(pair, ids, n), _their_decoding(pair, ids, n), 0)
        seconds.append(interleaved(jobs, max(3, repeats // 2)))
    one, all_of_them = seconds
    # without the prompt, which both runs pay
    alone = {name: all_of_them[name] - one[name] for name in one}
    name = f"decode, batch {batch}, after {prompt} tokens"
    return _row(name, batch * (new_tokens - 1), alone)


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


def _row(name: str, tokens: int, seconds: dict[str, float]) -> Row:
    theirs = {i: seconds[i] for i in IMPLEMENTATIONS if i in seconds}
    best = min(theirs, key=theirs.__getitem__)
    return Row(name, tokens / seconds["ours"], tokens / theirs[best], best)
