"""Where runs are kept, and how a run knows the code that computed it.

A run's folder is named by a hash of all that decides its numbers: configuration,
settings, corpus, seed. The code decides them too, but a hash of it would throw runs
away for a reworded error message. So a run keeps, when it is made, the hash of the code
and a witness: the losses of its first three steps. Other code with the same witness
computes the same numbers.
"""

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

PACKAGE = Path(__file__).resolve().parent.parent
# the rooms whose code decides the numbers of a run
COMPUTING = ("helpers.v3", "helpers.training", "helpers.reasoning")
WITNESS_STEPS = 3


def home() -> Path:
    """The repository root, or the folder that the variable V3LAB_HOME names."""
    named = os.environ.get("V3LAB_HOME")
    return Path(named).expanduser() if named else PACKAGE.parent


def cache_dir() -> Path:
    """`home()/.lab`: checkpoints and the tokenized corpus.

    All of it can be made again, so it may be removed at any time.
    """
    return home() / ".lab"


def make_folder(folder: Path) -> Path:
    """Create `folder` and those above it; -> the folder.

    Raises OSError that names V3LAB_HOME when nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{folder} cannot be created ({error.strerror}): set the environment "
            "variable V3LAB_HOME to a folder that you may write to"
        ) from None
    return folder


def key(**parts: object) -> str:
    """16 hex digits, the same for the same parts in any order on any machine.

    Raises TypeError with the part's name for one that is not JSON (NaN included) nor a
    dataclass of it.
    """
    for name, part in parts.items():
        try:
            json.dumps(part, sort_keys=True, default=as_json, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"key part {name!r}: {error}") from error
    text = json.dumps(parts, sort_keys=True, default=as_json, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_json(value: object) -> dict[str, Any]:
    """For json.dumps: a dataclass as a dict of its fields; others are a TypeError."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(
        f"{type(value).__name__} cannot be written as JSON; use numbers, strings, "
        "lists, dicts or a dataclass of these"
    )


def run_dir(label: str, /, **parts: object) -> Path:
    """The folder for what `label` makes from exactly these parts; not created here.

    Raises TypeError as `key` does.
    """
    return cache_dir() / f"{label}-{key(**parts)}"


def fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits of a model's config and weights, to key what is made from them."""
    digest = hashlib.sha256(str(model.config).encode())
    for name, tensor in model.state_dict().items():
        content = tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        digest.update(name.encode() + content)
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------ provenance


def code_hash(module: str, root: Path = REPOSITORY) -> str:
    """12 hex digits of the code that `module` rests on, itself included.

    Over all modules of `helpers.v3`, `helpers.training` and `helpers.reasoning` that it
    imports, directly or not (`source.modules_of`). Formatting, comments and docstrings
    do not count. Nothing is imported. InputError where there is no such module.
    """
    return hash_of(modules_of(module, root), root)


@dataclass(frozen=True)
class Provenance:
    """The code that made a run, and the losses of the run's first three steps."""

    code: str
    witness: list[float]

    def verdict(
        self, now: "Provenance"
    ) -> Literal["same code", "code changed, numbers same", "stale"]:
        """What the run is worth under the code of today.

        Losses agree within 1e-5 of their size: other processors round otherwise.
        """
        if self.code == now.code:
            return "same code"
        pairs = zip(self.witness, now.witness, strict=False)
        agree = all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9) for a, b in pairs)
        if agree and len(self.witness) == len(now.witness) > 0:
            return "code changed, numbers same"
        return "stale"


@cache
def code_hash(module: str) -> str:
    """12 hex digits of `module` and all that it imports from the computing rooms.

    Formatting, comments and docstrings do not count. Nothing is imported: the sources
    are read. Raises ValueError for a module that is not of helpers.
    """
    digest = hashlib.sha256()
    for name in sorted(_reachable(module)):
        tree = ast.parse(_source(name).read_text(encoding="utf-8"))
        digest.update(f"{name}\0{ast.dump(_without_docstrings(tree))}\0".encode())
    return digest.hexdigest()[:12]


def _reachable(module: str) -> set[str]:
    """`module` and the modules of the computing rooms that it leads to."""
    found = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        tree = ast.parse(_source(name).read_text(encoding="utf-8"))
        for imported in _imports(tree):
            if imported.startswith(COMPUTING) and _is_module(imported):
                waiting.append(imported)
    return found


def _imports(tree: ast.Module) -> Iterator[str]:
    """The modules that a source may import; names of a package's members too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def _source(module: str) -> Path:
    """The file of a module of helpers."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if module.startswith("helpers.") and file.is_file():
            return file
    raise ValueError(f"module={module!r} cannot work: it must be a module of helpers")


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """Change `tree`: no docstring stays; -> the same tree."""
    for node in ast.walk(tree):
        if not isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree
