"""Ours beside ours: a layer with more experts, and two trainings at once."""

import subprocess
import sys
from pathlib import Path
from statistics import median

from helpers.bench.timing import Job, Row, interleaved
from helpers.v3 import MoE, V3Config

import torch

EXPERT_COUNTS = (8, 256)
ROOT = Path(__file__).resolve().parents[2]


def experts_row(config: V3Config, tokens: int, repeats: int, device: str) -> Row:
    """One MoE layer, forward and backward, with few experts and with many.

    Top-k and width are fixed, so the work of the products is. The ratio is seconds with
    many to seconds with few: 1 would be best.
    """
    few, many = EXPERT_COUNTS
    x = torch.randn(1, tokens, config.hidden_size, device=device, requires_grad=True)
    jobs = {str(count): _layer_pass(config, count, x) for count in EXPERT_COUNTS}
    times = interleaved(jobs, repeats)
    pairs = zip(times[str(few)], times[str(many)], strict=True)
    singles = [slow / fast for fast, slow in pairs]
    with_few = median(times[str(few)])
    with_many = median(times[str(many)])
    return Row(
        f"MoE layer, {tokens:,} tokens, {many} experts beside {few}",
        f"{with_many * 1e3:,.0f} ms",
        f"{with_few * 1e3:,.0f} ms",
        with_many / with_few,
        min(singles),
        max(singles),
        "lower is better; both are ours",
    )


def _layer_pass(config: V3Config, experts: int, x: torch.Tensor) -> Job:
    n_group = 8 if experts >= 64 else 1
    topk_group = 4 if experts >= 64 else 1
    layer = MoE(
        config.with_(n_routed_experts=experts, n_group=n_group, topk_group=topk_group)
    ).to(x.device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)

    def both() -> None:
        out, _ = layer(x)
        out.square().mean().backward()
        layer.zero_grad()

    return both


def two_notebooks_row(repeats: int, seconds: float = 6.0) -> Row:
    """Training steps of one process alone, and of each of two at once.

    The ratio is the slower one's speed at once to its speed alone; half would be fair.
    """
    workers = [_start_worker() for _ in range(2)]
    try:
        singles = []
        together = []
        alone = []
        for _ in range(repeats):
            [single] = _steps_per_second(workers[:1], seconds)
            slower = min(_steps_per_second(workers, seconds))
            alone.append(single)
            together.append(slower)
            singles.append(slower / single)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return Row(
        "training, the slower of two at once beside one alone",
        f"{median(together):.2f} steps/s",
        f"{median(alone):.2f} steps/s",
        median(singles),
        min(singles),
        max(singles),
        "0.5 is a fair half; both are ours",
    )


def _start_worker() -> subprocess.Popen[str]:
    worker = subprocess.Popen(
        [sys.executable, "-m", "helpers.bench.worker"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    worker.stdout.readline()  # it is ready
    return worker


def _steps_per_second(
    workers: list[subprocess.Popen[str]], seconds: float
) -> list[float]:
    """Let them train at the same time; -> what each of them reached."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{seconds}\n")
        worker.stdin.flush()
    reached = []
    for worker in workers:
        assert worker.stdout is not None
        reached.append(float(worker.stdout.readline()))
    return reached
