"""Recorded measurements: the numbers that figures draw, and whether they still hold.

    python -m helpers.evidence.results
    python -m helpers.evidence.results --record 02_latent_attention --seeds 0 1 2 3 4

The first lists each recorded seed and what it is worth under the code of today; with
--check it fails where a rewritten notebook rests on a stale one. The second records a
notebook anew.
"""

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from helpers.evidence import stored
from helpers.evidence.rerecord import RecordingFailed, rerecord
from helpers.evidence.stored import Judge, Result, results_dir
from helpers.training.runs import as_json

__all__ = ["REWRITTEN", "check", "listing", "main", "record", "recorded", "results_dir"]

# The notebooks of the second edition, such as "02_latent_attention": their results must
# not be stale.
REWRITTEN: tuple[str, ...] = (
    "02_latent_attention",
    "03_multi_token_prediction",
)
DIGITS = 6


class Line(NamedTuple):
    """One line of the listing: seeds of a result that are worth the same."""

    result: str
    seeds: list[int]
    edition: str
    verdict: stored.Verdict


def record(
    name: str,
    parameters: Mapping[str, Any],
    seed: int,
    data: Mapping[str, Any],
    runs: Mapping[str, Mapping[str, Any]] | None = None,
    keep_arms: bool = False,
) -> Path:
    """Put one seed's numbers into `results_dir()/NAME.json`; -> the file written.

    parameters: every size and step count, without seeds and arms. runs: {label:
    history} of all trainings that the numbers rest on ({} where nothing is trained);
    recorded is which code made them, and the code that made the numbers out of them.
    None: nothing of that is recorded, as in the notebooks of the first edition.

    A file with the same parameters keeps its other seeds. A file with other parameters
    is left alone, and the result goes to NAME.other.json (overwritten when its
    parameters differ too). keep_arms: `data["arms"]` holds only some of the arms; the
    seed's other arms stay as recorded where they are up to date.

    Floats in `data` are rounded to 6 significant digits. ValueError for NaN or
    infinity, TypeError for what is not JSON; the file on disk then stays as it was.
    """
    try:
        text = json.dumps(data, default=as_json, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"{name}, seed {seed}: only finite numbers can be recorded ({error})"
        ) from error
    rounded = json.loads(text, parse_float=_rounded)
    judge = Judge()
    provenance = None
    if runs is not None:
        provenance = judge.provenance(name, runs)

    path, result = _file_for(name, parameters)
    before = result.provenance.get(seed)
    if (
        keep_arms
        and provenance
        and before
        and judge.verdict(before) in stored.UP_TO_DATE
    ):
        known = result.seeds[seed].get("arms", {})
        rounded["arms"] = known | rounded.get("arms", {})
        provenance = judge.joined(before, provenance)
    result.seeds[seed] = rounded
    result.provenance.pop(seed, None)
    if provenance is not None:
        result.provenance[seed] = provenance
    result.versions = {
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    stored.write(path, result)
    return path


def _rounded(number: str) -> float:
    return float(f"{float(number):.{DIGITS}g}")


def _file_for(name: str, parameters: Mapping[str, Any]) -> tuple[Path, Result]:
    """Which file takes a result with these parameters, and what is in it already."""
    files = stored.files_of(name)
    main = stored.read(files.main)
    if main is None:
        return files.main, Result(name, dict(parameters))
    if main.made_with(parameters):
        return files.main, main
    other = stored.read(files.other)
    if other is not None and other.made_with(parameters):
        return files.other, other
    return files.other, Result(name, dict(parameters))


def recorded(name: str, parameters: Mapping[str, Any]) -> dict[int, Any]:
    """{seed: data} recorded with exactly these parameters; {} when there is none.

    It is NAME.json's, or else NAME.other.json's. Seeds that other code has evaluated
    are stale: they are left out, and one printed line says so. Seeds of the first
    edition, which do not know their code, are returned.
    """
    for path in stored.files_of(name):
        result = stored.read(path)
        if result is not None and result.made_with(parameters):
            return _without_stale(result)
    return {}


def _without_stale(result: Result) -> dict[int, Any]:
    judge = Judge()
    stale = []
    for seed, provenance in result.provenance.items():
        if not judge.same_evaluation(provenance):
            stale.append(seed)
    if stale:
        print(
            f"{result.name}: left out as stale, since the code that evaluates them has "
            f"changed: {_seeds(sorted(stale))}. `python -m helpers.evidence.results` "
            "lists such results"
        )
    return {seed: data for seed, data in result.seeds.items() if seed not in stale}


def listing() -> list[Line]:
    """All recorded results and what they are worth today.

    Runs with other parameters (NAME.other.json) are nobody's evidence and left out.
    """
    judge = Judge()
    lines = []
    for path in sorted(results_dir().glob("*.json")):
        result = stored.read(path)
        if result is None or path.name.endswith(".other.json"):
            continue
        by_verdict: dict[stored.Verdict, list[int]] = {}
        for seed in sorted(result.seeds):
            verdict = judge.verdict(result.provenance.get(seed))
            by_verdict.setdefault(verdict, []).append(seed)
        for verdict, seeds in by_verdict.items():
            edition = "first" if verdict == stored.FIRST_EDITION else "second"
            lines.append(Line(path.stem, seeds, edition, verdict))
    return lines


def check() -> int:
    """1 where a notebook in `REWRITTEN` rests on a stale result, which is printed."""
    found = 0
    for line in listing():
        notebook = stored.notebook_of(line.result)
        rewritten = notebook is not None and notebook.stem in REWRITTEN
        if rewritten and line.verdict in (stored.STALE, stored.FIRST_EDITION):
            print(f"{line.result}, {_seeds(line.seeds)}: {line.verdict}")
            found = 1
    return found


def _seeds(seeds: Sequence[int]) -> str:
    noun = "seed" if len(seeds) == 1 else "seeds"
    return f"{noun} {', '.join(map(str, seeds))}"


def _table(lines: Sequence[Line]) -> str:
    rows = [("result", "seeds", "edition", "verdict")]
    for line in lines:
        seeds = ", ".join(map(str, line.seeds))
        rows.append((line.result, seeds, line.edition, line.verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    printed = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        printed.append("  ".join(cells).rstrip())
    return "\n".join(printed)


def main(
    arguments: Sequence[str] | None = None, notebooks: Path = stored.NOTEBOOKS
) -> int:
    """The command line; -> its exit status. notebooks: the folder they lie in."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.evidence.results",
        description="List what was recorded and what it is worth under today's code.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail where a rewritten notebook rests on a stale result",
    )
    parser.add_argument(
        "--record",
        metavar="NOTEBOOK",
        help="record this notebook anew, one seed and arm at a time; the same command "
        "goes on where it was stopped",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arm", help="only this one of the notebook's `arms`")
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        help="further trainings, for the notebook's `also_train`, such as long",
    )
    chosen = parser.parse_args(arguments)
    if chosen.check:
        return check()
    if chosen.record is None:
        print(_table(listing()))
        return 0
    try:
        notebook = notebooks / f"{chosen.record.removesuffix('.ipynb')}.ipynb"
        rerecord(notebook, chosen.seeds, chosen.arm, chosen.also)
    except (RecordingFailed, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
