"""The command: `python -m helpers.bench --help`."""

import argparse
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version

from helpers.bench import own_rows, transformers_rows, trl_row
from helpers.bench.timing import Row, seconds_of
from helpers.v3 import V3Config

import torch

SIDE = 2048  # of the matrices that measure this machine
TOKENS = 16384  # through the single MoE layer
NEW_TOKENS = 64  # to decode
HEAD = f"{'':56}{'ours':>18}{'theirs':>18}{'ratio':>8}   spread"


def jobs(device: str, repeats: int) -> dict[str, Callable[[], Row]]:
    """Each row's name, and what measures it."""
    config = V3Config.tiny()
    made: list[transformers_rows.Pair] = []

    def pair() -> transformers_rows.Pair:
        if not made:
            made.append(transformers_rows.make_pair(config, device))
        return made[0]

    def train(batch: int, length: int) -> Row:
        return transformers_rows.training_row(pair(), batch, length, repeats)

    def decode(batch: int, prompt: int) -> Row:
        return transformers_rows.decoding_row(
            pair(), batch, prompt, repeats, NEW_TOKENS
        )

    rows: dict[str, Callable[[], Row]] = {}
    for batch, length in ((16, 256), (4, 1024)):
        rows[f"train-{batch}-{length}"] = partial(train, batch, length)
    rows["prefill"] = lambda: transformers_rows.prefill_row(pair(), 4, 1024, repeats)
    for batch, prompt in ((1, 64), (1, 512), (64, 64), (64, 512)):
        rows[f"decode-{batch}-{prompt}"] = partial(decode, batch, prompt)
    rows["experts"] = lambda: own_rows.experts_row(config, TOKENS, repeats, device)
    rows["grpo"] = lambda: trl_row.grpo_row(repeats)
    rows["two"] = lambda: own_rows.two_notebooks_row(repeats)
    return rows


def main() -> None:
    """Print the rows that were asked for, or all."""
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m helpers.bench")
    parser.add_argument(
        "rows", nargs="*", help=f"which of {', '.join(jobs(device, 1))}; without: all"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of each row")
    args = parser.parse_args()
    rows = jobs(device, args.repeats)
    unknown = set(args.rows) - set(rows)
    if args.repeats < 1 or unknown:
        parser.error(f"--repeats of at least 1, and rows of {', '.join(rows)}")

    print(_machine(device, args.repeats))
    print(HEAD)
    for name in args.rows or rows:
        if name == "grpo" and not trl_row.installed():
            print(f"{name}: {trl_row.MISSING}")
            continue
        print(_line(rows[name]()), flush=True)


def _machine(device: str, repeats: int) -> str:
    """What the numbers belong to: date, versions, threads, speed of a product."""
    a = torch.randn(SIDE, SIDE, device=device)
    product = min(seconds_of(lambda: a @ a) for _ in range(5))
    versions = [f"torch {version('torch')}", f"transformers {version('transformers')}"]
    if trl_row.installed():
        versions.append(f"trl {version('trl')}")
    return (
        f"{date.today()}, {', '.join(versions)}; {device}, {torch.get_num_threads()} "
        f"threads, float32, matrix products at {2 * SIDE**3 / product / 1e9:,.0f} "
        f"GFLOP/s; medians of {repeats} turns"
    )


def _line(row: Row) -> str:
    spread = f"{row.low:.2f} to {row.high:.2f}"
    return (
        f"{row.what:56}{row.ours:>18}{row.theirs:>18}{row.ratio:>7.2f}x   {spread:16}"
        f"{row.note}"
    ).rstrip()


if __name__ == "__main__":
    main()
