"""Fair timing of jobs that do the same in different ways."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

Job = Callable[[], object]


def seconds_of(job: Job) -> float:
    """Wall-clock seconds of one run, the work on a GPU included."""
    start = time.perf_counter()
    job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    jobs: dict[str, Job], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each job in each of `repeats` turns.

    They run in turns, so that a slow moment of the machine hits all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warmup + repeats):
        for name, job in jobs.items():
            seconds = seconds_of(job)
            if turn >= warmup:
                times[name].append(seconds)
    return times


@dataclass(frozen=True)
class Row:
    """One line of the table. `low` and `high`: the ratios of single turns."""

    what: str
    ours: str
    theirs: str
    ratio: float
    low: float
    high: float
    note: str = ""


def _three_digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def faster(
    what: str, amount: float, unit: str, ours: list[float], theirs: list[float]
) -> Row:
    """A row from the seconds of each turn: the ratio is theirs to ours.

    `amount` is what a run works through (tokens, steps), `unit` its name.
    """
    singles = [their / our for our, their in zip(ours, theirs, strict=True)]
    return Row(
        what,
        f"{_three_digits(amount / median(ours))} {unit}/s",
        f"{_three_digits(amount / median(theirs))} {unit}/s",
        median(theirs) / median(ours),
        min(singles),
        max(singles),
    )
