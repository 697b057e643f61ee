"""The files of recorded results, and what each recorded seed is worth today.

A file is JSON: "name", "parameters", "versions", "seeds" {seed: data} and "provenance":

    {seed: {"runs": {label: {"code", "witness", "compared"}},
            "evaluation": {"code", "modules"}}}

"runs" are the trainings that the seed's numbers rest on (`runs.Provenance`).
"evaluation" is the code that made the numbers out of them: the modules that the
notebook imports, without those that the runs answer for with their witness.
"""

import ast
import contextlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from helpers.checks import need
from helpers.training import runs
from helpers.training.source import REPOSITORY, Sources

NOTEBOOKS = REPOSITORY / "notebooks"

Verdict = Literal[
    "current",
    "code changed, numbers same",
    "code changed, not compared",
    "stale",
    "first edition: no provenance, stale",
]
CURRENT: Verdict = "current"
SAME_NUMBERS: Verdict = "code changed, numbers same"
NOT_COMPARED: Verdict = "code changed, not compared"
STALE: Verdict = "stale"
FIRST_EDITION: Verdict = "first edition: no provenance, stale"
UP_TO_DATE = (CURRENT, SAME_NUMBERS)


@dataclass
class Result:
    """The content of one file; seeds and provenance by seed."""

    name: str
    parameters: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    seeds: dict[int, Any] = field(default_factory=dict)
    provenance: dict[int, dict[str, Any]] = field(default_factory=dict)

    def made_with(self, parameters: Mapping[str, Any]) -> bool:
        """Whether these are the parameters of the file."""
        return runs.key(parameters=self.parameters) == runs.key(parameters=parameters)


class Files(NamedTuple):
    """Where a result may lie.

    main is the recorded one, which git keeps. other holds a run with other parameters
    than those of `main`; git ignores it.
    """

    main: Path
    other: Path


def results_dir() -> Path:
    """`home()/notebooks/results`: the recorded numbers that the figures draw."""
    return runs.home() / "notebooks" / "results"


def files_of(name: str) -> Files:
    """The files of the result `name`, whether or not they exist."""
    folder = results_dir()
    return Files(folder / f"{name}.json", folder / f"{name}.other.json")


def read(path: Path) -> Result | None:
    """The result at `path`, None where there is no file.

    ValueError with the file's name where it holds no result.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        provenance = found.get("provenance", {})
        return Result(
            found["name"],
            found["parameters"],
            found["versions"],
            {int(seed): data for seed, data in found["seeds"].items()},
            {int(seed): entry for seed, entry in provenance.items()},
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} holds no recorded result: {error}") from error


def write(path: Path, result: Result) -> None:
    """Put `result` at `path` in one step.

    ValueError for NaN or infinity, TypeError for what is not JSON; the file on disk
    then stays as it was.
    """
    content = {
        "name": result.name,
        "parameters": result.parameters,
        "versions": result.versions,
        "seeds": dict(sorted(result.seeds.items())),
        "provenance": dict(sorted(result.provenance.items())),
    }
    text = json.dumps(
        content, indent=1, default=runs.as_json, allow_nan=False, ensure_ascii=False
    )
    runs.writable(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def notebook_of(name: str, folder: Path = NOTEBOOKS) -> Path | None:
    """The notebook that records `name`: its own, or 09_r1 for 09_r1_ablations."""
    owners = []
    for path in folder.glob("*.ipynb"):
        if f"{name}_".startswith(f"{path.stem}_"):
            owners.append(path)
    return max(owners, key=lambda path: len(path.stem), default=None)


def code_of(notebook: Path) -> str:
    """The code cells of a notebook as one Python text, without IPython's commands."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    cells = []
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cells.append(_plain_python("".join(cell["source"])))
    return "\n".join(cells)


def _plain_python(cell: str) -> str:
    """The code of a cell; `pass` stands for each line that only IPython knows."""
    try:
        ast.parse(cell)
    except SyntaxError:
        return re.sub(r"^(\s*)[%!].*$", r"\1pass", cell, flags=re.MULTILINE)
    return cell


def defaults_of(notebook: Path) -> dict[str, Any]:
    """What the cell tagged `parameters` sets: the values that are written out."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    defaults = {}
    for cell in content["cells"]:
        if "parameters" not in cell["metadata"].get("tags", []):
            continue
        for statement in ast.parse("".join(cell["source"])).body:
            if isinstance(statement, ast.Assign):
                name = ast.unparse(statement.targets[0])
                with contextlib.suppress(ValueError):  # computed from others
                    defaults[name] = ast.literal_eval(statement.value)
    return defaults


class Judge:
    """Compares what was recorded with the code of today."""

    def __init__(self, sources: Sources | None = None) -> None:
        self.sources = sources or Sources()
        self._trainers: dict[str, str] | None = None

    def trainers(self) -> dict[str, str]:
        """{code hash of today: the module that it belongs to}."""
        if self._trainers is None:
            modules = self.sources.all_modules()
            self._trainers = {self.sources.code_hash(name): name for name in modules}
        return self._trainers

    def provenance(
        self,
        name: str,
        histories: Mapping[str, Mapping[str, Any]],
        notebooks: Path = NOTEBOOKS,
    ) -> dict[str, Any]:
        """What is recorded of the code behind a result that was made just now.

        histories: {label: history} of the runs. InputError for a history that does not
        say which code made it.
        """
        notebook = notebook_of(name, notebooks)
        modules = self.sources.all_modules()
        if notebook:
            modules = self.sources.modules_of_text(code_of(notebook))
        made = {}
        for label, history in histories.items():
            remedy = "the history of a run holds its provenance; record that one"
            need("provenance" in history, f"runs[{label!r}]", sorted(history), remedy)
            made[label] = dict(history["provenance"])
            kept = runs.Provenance(**made[label])
            for code in (kept.code, kept.compared):
                if code in self.trainers():
                    modules -= self.sources.modules_of(self.trainers()[code])
        return {"runs": made, "evaluation": self._evaluation(modules)}

    def joined(
        self, before: Mapping[str, Any], now: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The provenance of a seed that holds numbers of both; both are up to date."""
        modules = {*before["evaluation"]["modules"], *now["evaluation"]["modules"]}
        return {
            "runs": before["runs"] | now["runs"],
            "evaluation": self._evaluation(modules),
        }

    def _evaluation(self, modules: set[str]) -> dict[str, Any]:
        return {"code": self.sources.hash_of(modules), "modules": sorted(modules)}

    def verdict(self, provenance: Mapping[str, Any] | None) -> Verdict:
        """What a seed with this provenance is worth; None: it has none.

        It is worth what the worst of its runs is.
        """
        if provenance is None:
            return FIRST_EDITION
        if not self.same_evaluation(provenance):
            return STALE
        made = [runs.Provenance(**kept) for kept in provenance["runs"].values()]
        unknown = [run for run in made if run.code not in self.trainers()]
        if not unknown:
            return CURRENT
        if all(run.compared in self.trainers() for run in unknown):
            return SAME_NUMBERS
        return NOT_COMPARED

    def same_evaluation(self, provenance: Mapping[str, Any]) -> bool:
        """Whether the code that made the numbers out of the runs is that of today."""
        evaluation = provenance["evaluation"]
        return self.sources.hash_of(evaluation["modules"]) == evaluation["code"]
