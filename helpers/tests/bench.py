"""`python -m helpers.tests.bench`: our model beside transformers' DeepseekV3ForCausalLM, same weights and threads, interleaved runs, medians.

A benchmark, not a test: run it when nothing else runs. Ratios carry between machines, seconds do not.
"""
import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from helpers import checkpoint
from helpers.model import DeepSeekV3, MoE, V3Config

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")  # of transformers' experts


def interleaved(jobs: dict[Any, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[Any, float]:
    """Median seconds of each job, run in turns so that a slow moment of the machine hits all of them."""
    times: dict[Any, list[float]] = {name: [] for name in jobs}
    for turn in tqdm(range(warmup + repeats), leave=False, desc=" | ".join(map(str, jobs))):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: median(t) for name, t in times.items()}


def pair(config: V3Config, device: str) -> tuple[DeepSeekV3, torch.nn.Module]:
    """Our model and transformers' with the same weights, by way of a file."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    ours = DeepSeekV3(config.with_(num_nextn_predict_layers=0))
    with tempfile.TemporaryDirectory() as folder:
        theirs = DeepseekV3ForCausalLM.from_pretrained(checkpoint.save(ours, folder))
    return ours.to(device), theirs.to(device)


def training_step(model: torch.nn.Module, logits: Callable, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        model.train()
        loss = F.cross_entropy(logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def against_transformers(config: V3Config, repeats: int, new_tokens: int, device: str) -> list[tuple[str, float, float, str]]:
    """Rows (what, our tokens/s, their tokens/s with their fastest experts, which those were)."""
    ours, theirs = pair(config, device)

    def logits(x: torch.Tensor) -> torch.Tensor:
        return theirs(x, use_cache=False).logits

    def jobs_for(own: Callable, other: Callable, tokens: int) -> dict[str, Callable[[], object]]:
        jobs = {"ours": own}
        for implementation in IMPLEMENTATIONS:
            if implementation == "batched_mm" and tokens > 1024:
                continue  # it copies the weights of every token's experts: gigabytes for a long pass, and never the fastest there
            def run(implementation: str = implementation) -> None:
                theirs.set_experts_implementation(implementation)
                other()
            jobs[implementation] = run
        return jobs

    @torch.inference_mode()
    def prefill(model: torch.nn.Module, call: Callable, ids: torch.Tensor) -> None:
        model.eval()
        call(ids)

    def decode(model: torch.nn.Module, ids: torch.Tensor, tokens: int, **more: object) -> None:
        model.eval()
        model.generate(ids, max_new_tokens=tokens, **more)

    rows = []

    def row(name: str, tokens: int, seconds: dict[str, float]) -> None:
        best = min((i for i in IMPLEMENTATIONS if i in seconds), key=lambda i: seconds[i])
        rows.append((name, tokens / seconds["ours"], tokens / seconds[best], best))

    for size, length in ((16, 256), (4, 1024)):
        ids = torch.randint(1, config.vocab_size, (size, length + 1), device=device)
        jobs = jobs_for(training_step(ours, ours, ids), training_step(theirs, logits, ids), size * length)
        row(f"training (fwd+bwd+step), {size} x {length}", size * length, interleaved(jobs, repeats))
    ids = torch.randint(1, config.vocab_size, (4, 1024), device=device)
    jobs = jobs_for(lambda: prefill(ours, ours, ids), lambda: prefill(theirs, logits, ids), ids.numel())
    row("prefill, 4 x 1024", ids.numel(), interleaved(jobs, repeats))
    for size, prompt in ((1, 64), (1, 512), (64, 64), (64, 512)):
        ids = torch.randint(1, config.vocab_size, (size, prompt), device=device)
        more = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(ids))
        seconds = [interleaved(jobs_for(lambda n=n, ids=ids: decode(ours, ids, n), lambda n=n, ids=ids, more=more: decode(theirs, ids, n, **more),
                                        ids.numel()), max(3, repeats // 2)) for n in (1, new_tokens)]
        alone = {name: seconds[1][name] - seconds[0][name] for name in seconds[0]}  # without the prompt, which both runs pay
        row(f"decode, batch {size}, after {prompt} tokens", size * (new_tokens - 1), alone)
    return rows


def matmul_share(config: V3Config, rate: float, repeats: int, device: str) -> tuple[float, float]:
    """(matmul GFLOP/s measured now at 2048^3, share of it that `rate` training tokens/s use, at 6 FLOP per active weight)."""
    a, b = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    gflops = 2 * 2048**3 / interleaved({"matmul": lambda: a @ b}, repeats)["matmul"] / 1e9
    with torch.device("meta"):
        model = DeepSeekV3(config.with_(num_nextn_predict_layers=0))
    weights = sum(p.numel() for p in model.parameters()) - model.embed_tokens.weight.numel()
    idle = 1 - config.num_experts_per_tok / config.n_routed_experts
    weights -= sum(int(p.numel() * idle) for name, p in model.named_parameters() if ".experts." in name)
    return gflops, 6 * weights * rate / 1e9 / gflops


def layer_times(config: V3Config, tokens: int, repeats: int, device: str, counts: tuple[int, ...] = (8, 16, 32, 64, 128, 256)) -> dict[int, float]:
    """Seconds of one MoE layer, forward and backward, at `tokens` tokens for growing numbers of experts; top-k and width fixed."""
    x = torch.randn(1, tokens, config.hidden_size, device=device, requires_grad=True)
    jobs = {}
    for E in counts:
        groups = dict(n_group=8, topk_group=4) if E >= 64 else dict(n_group=1, topk_group=1)
        layer = MoE(config.with_(n_routed_experts=E, **groups)).to(device)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.05)

        def both(layer: MoE = layer) -> None:
            layer(x).square().mean().backward()
            layer.zero_grad()

        jobs[E] = both
    return interleaved(jobs, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each job (median is printed)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens through the single MoE layer")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = V3Config.tiny()
    print(f"{device}, {torch.get_num_threads()} threads, float32, V3Config.tiny() without MTP; medians of {args.repeats} interleaved runs")
    rows = against_transformers(config, args.repeats, args.new_tokens, device)
    print(f"\n{'tokens/s':44} {'ours':>10} {'transformers':>13} {'ratio':>7}   their fastest experts")
    for name, own, other, best in rows:
        print(f"{name:44} {own:10,.0f} {other:13,.0f} {own / other:6.2f}x   {best}")
    gflops, share = matmul_share(config, rows[0][1], args.repeats, device)
    print(f"\nmatmul 2048^3: {gflops:,.0f} GFLOP/s; training uses {share:.0%} of it (6 FLOP per active weight and token, attention left out)")
    times = layer_times(config, args.tokens, args.repeats, device)
    first = min(times)
    print(f"\none MoE layer, {args.tokens:,} tokens, top {config.num_experts_per_tok}, forward + backward")
    for E, seconds in times.items():
        print(f"{E:5} experts {seconds * 1e3:9.1f} ms   {seconds / times[first]:5.2f}x of {first} experts")


if __name__ == "__main__":
    main()
