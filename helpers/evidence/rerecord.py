"""Recording a notebook anew: each seed and arm in a fresh kernel of its own.

A seed or arm whose result is up to date is passed over, so the same command goes on
where an earlier one was stopped. What a stopped kernel had trained lies in the cache of
runs.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from helpers.checks import need
from helpers.evidence import stored
from helpers.evidence.stored import Judge
from helpers.training import runs

LAST_LINES = 12  # of an error that are shown


class RecordingFailed(RuntimeError):
    """A notebook that did not run to its end, or recorded nothing."""


class Part(NamedTuple):
    """What one kernel records. arm: None where the notebook has no `arms`."""

    seed: int
    arm: str | None

    def __str__(self) -> str:
        return f"seed {self.seed}" + (f", {self.arm}" if self.arm else "")


def rerecord(
    notebook: Path,
    seeds: Sequence[int],
    arm: str | None = None,
    also_train: Sequence[str] = (),
) -> None:
    """Run `notebook` for each seed, and each of its arms, that is not up to date.

    arm: only this one. also_train: what goes into the notebook's parameter of that name
    (longer runs and sweeps, that it records under other names); then no seed is passed
    over, since only the notebook knows whether those are up to date.

    The notebook's parameters cell has `seeds` and may have `arms` and `also_train`; it
    records each seed as `results.record(NOTEBOOK, ...)`, with `keep_arms` where it has
    arms. Progress is printed. InputError for a notebook, seed, arm or further training
    that does not exist; RecordingFailed at the first part that fails.
    """
    need(notebook.is_file(), "notebook", notebook.stem, "there is no such notebook")
    defaults = stored.defaults_of(notebook)
    parts = _parts(defaults, seeds, arm)
    values = {}
    if also_train:
        remedy = "this notebook has no further trainings"
        need("also_train" in defaults, "also_train", list(also_train), remedy)
        values["also_train"] = list(also_train)
    for number, part in enumerate(parts, start=1):
        where = f"[{number}/{len(parts)}] {notebook.stem}, {part}"
        missing = _missing(notebook.stem, part, defaults, Judge())
        if missing is None and not also_train:
            print(f"{where}: up to date", flush=True)
            continue
        print(f"{where}: running", flush=True)
        began = time.monotonic()
        _run(notebook, part, defaults, values)
        missing = _missing(notebook.stem, part, defaults, Judge())
        if missing:
            raise RecordingFailed(f"{where}: it ran to its end, but {missing}")
        print(f"{where}: done in {time.monotonic() - began:.0f} s", flush=True)
    _all_are_there(notebook.stem, parts, defaults)


def _parts(
    defaults: dict[str, Any], seeds: Sequence[int], arm: str | None
) -> list[Part]:
    """One part a seed, or one a seed and arm."""
    one_seed = list(seeds) == [0]
    need(
        "seeds" in defaults or one_seed, "seeds", seeds, "this notebook has no seeds: 0"
    )
    known = defaults.get("arms")
    if known is None:
        need(arm is None, "arm", arm, "this notebook has no arms")
        return [Part(seed, None) for seed in seeds]
    need(arm is None or arm in known, "arm", arm, f"use one of {', '.join(known)}")
    chosen = known if arm is None else [arm]
    return [Part(seed, name) for seed in seeds for name in chosen]


def _missing(
    name: str, part: Part, defaults: dict[str, Any], judge: Judge
) -> str | None:
    """What keeps the recorded part from being up to date; None: it is."""
    file = stored.files_of(name).main
    result = stored.read(file)
    if result is None or part.seed not in result.seeds:
        return f"{file.name} has no such seed"
    # A notebook may record some under other names: only those in common can differ.
    for shared in result.parameters.keys() & defaults.keys():
        if runs.key(x=result.parameters[shared]) != runs.key(x=defaults[shared]):
            return f"{file.name} was recorded with another {shared}"
    arms = result.seeds[part.seed].get("arms", {})
    if part.arm is not None and part.arm not in arms:
        return f"{file.name} has no such arm of this seed"
    verdict = judge.verdict(result.provenance.get(part.seed))
    return None if verdict in stored.UP_TO_DATE else f"{file.name} says: {verdict}"


def _run(
    notebook: Path, part: Part, defaults: dict[str, Any], more: dict[str, Any]
) -> None:
    """Execute the notebook in a fresh kernel, and drop the notebook that it gives.

    more: values of other parameters than seeds and arms.
    """
    # Here, since papermill takes seconds to import, and whoever only draws recorded
    # numbers does not need it.
    import papermill
    from nbclient.exceptions import DeadKernelError

    values = dict(more)
    if "seeds" in defaults:
        values["seeds"] = [part.seed]
    if part.arm is not None:
        values["arms"] = [part.arm]
    before = _other_files(notebook)
    try:
        papermill.execute_notebook(
            notebook,
            None,
            values,
            kernel_name="python3",
            cwd=notebook.parent,
            progress_bar=False,
            start_timeout=120,
        )
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        lines = str(error).strip().splitlines()[-LAST_LINES:]
        message = "\n".join([f"{notebook.stem}, {part}: it failed", *lines])
        raise RecordingFailed(message) from error
    _make_main(before, _other_files(notebook))


def _other_files(notebook: Path) -> dict[Path, int]:
    """{file: when it was written} of this notebook's runs with other parameters."""
    found = {}
    for path in stored.results_dir().glob("*.other.json"):
        name = path.name.removesuffix(".other.json")
        if stored.notebook_of(name, notebook.parent) == notebook:
            found[path] = path.stat().st_mtime_ns
    return found


def _make_main(before: dict[Path, int], after: dict[Path, int]) -> None:
    """Let NAME.other.json take the place of NAME.json where the run has written it.

    The notebook's own parameters have changed since NAME.json was recorded.
    """
    for path, written in after.items():
        if before.get(path) == written:
            continue
        name = path.name.removesuffix(".other.json")
        os.replace(path, stored.files_of(name).main)
        print(f"{name}: the parameters are others than those recorded, so it is new")


def _all_are_there(name: str, parts: Sequence[Part], defaults: dict[str, Any]) -> None:
    """A later arm must not have put an earlier one out."""
    judge = Judge()
    lost = [part for part in parts if _missing(name, part, defaults, judge)]
    if lost:
        raise RecordingFailed(
            f"{name}: {'; '.join(map(str, lost))}: recorded and lost again. A notebook "
            "with arms must call results.record(..., keep_arms=True)"
        )
