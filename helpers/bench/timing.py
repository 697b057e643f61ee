"""Fair timing of jobs that do the same in different ways."""

import time
from collections.abc import Callable
from statistics import median

import torch
from tqdm.auto import tqdm

Job = Callable[[], object]


def interleaved(
    jobs: dict[str, Job], repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each job.

    They run in turns, so that a slow moment of the machine hits all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    turns = tqdm(range(warmup + repeats), leave=False, desc=" | ".join(jobs))
    for turn in turns:
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in times.items()}
