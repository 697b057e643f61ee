"""Which of our modules a piece of code rests on, and a hash of what they compute.

Everything is read from the source files: nothing is imported to compute it.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from helpers.checks import need

REPOSITORY = Path(__file__).resolve().parents[2]
# The rooms whose code decides a run's numbers ...
ROOMS = ("helpers.v3.", "helpers.training.", "helpers.reasoning.")
# ... but for these two, which name folders and compare code.
NOT_COUNTED = ("helpers.training.runs", "helpers.training.source")


def modules_of(module: str, root: Path = REPOSITORY) -> set[str]:
    """The modules of `ROOMS` that `module` imports, directly or not, and itself.

    A name that a package only passes on (`from helpers.v3 import V3Config`) leads to
    the module that defines it, not to all that the package holds. InputError where
    there is no such module.
    """
    need(_file(module, root) is not None, "module", module, "no file under helpers/")
    return _reached([module], root)


def modules_of_text(text: str, root: Path = REPOSITORY) -> set[str]:
    """As `modules_of`, for code that is not one of our modules: a notebook's cells."""
    return _reached(_imports(ast.parse(text), "", root), root)


def hash_of(modules: Iterable[str], root: Path = REPOSITORY) -> str:
    """12 hex digits of what these modules compute.

    Comments, docstrings, `pass` and formatting do not count; nor does the version of
    Python that reads the files.
    """
    digest = hashlib.sha256()
    for module in sorted(modules):
        digest.update(f"{module}\0{_normal_form(_tree(module, root))}\0".encode())
    return digest.hexdigest()[:12]


def _reached(starts: Iterable[str], root: Path) -> set[str]:
    waiting = list(starts)
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen or _file(module, root) is None:
            continue
        seen.add(module)
        waiting += _imports(_tree(module, root), module, root)
    return {module for module in seen if _counts(module)}


def _counts(module: str) -> bool:
    return f"{module}.".startswith(ROOMS) and module not in NOT_COUNTED


def _file(module: str, root: Path) -> Path | None:
    """The source file of a module or package of ours; None where there is none."""
    if module.split(".")[0] != "helpers":
        return None
    path = root.joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    return None


def _tree(module: str, root: Path) -> ast.Module:
    file = _file(module, root)
    return ast.parse(file.read_text(encoding="utf-8")) if file else ast.parse("")


def _imports(tree: ast.Module, module: str, root: Path) -> Iterator[str]:
    """What the code of `module` imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, module, root)
            for alias in node.names:
                yield _definer(source, alias.name, root)


def _absolute(node: ast.ImportFrom, module: str, root: Path) -> str:
    """The module that a `from ... import` names, with leading dots resolved."""
    if node.level == 0:
        return node.module or ""
    file = _file(module, root)
    parts = module.split(".")
    # one dot is the package that the module is in; a package is in itself
    up = node.level - 1 if file and file.name == "__init__.py" else node.level
    package = parts[: len(parts) - up]
    return ".".join(package + ([node.module] if node.module else []))


def _definer(source: str, name: str, root: Path) -> str:
    """The module that `from source import name` gets its object from."""
    if _file(f"{source}.{name}", root):
        return f"{source}.{name}"
    file = _file(source, root)
    if file and file.name == "__init__.py":
        for node in _tree(source, root).body:
            if not isinstance(node, ast.ImportFrom):
                continue
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _definer(_absolute(node, source, root), alias.name, root)
    return source


def _normal_form(value: object) -> str:
    """Text of a syntax tree that depends on what is computed only.

    `ast.dump` would do, but it writes empty fields in some versions of Python and
    leaves them out in others.
    """
    if isinstance(value, list):
        kept = [_normal_form(entry) for entry in value if not _computes_nothing(entry)]
        return f"[{','.join(kept)}]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = []
    for name, entry in ast.iter_fields(value):
        if entry is not None and entry != [] and name != "kind":
            fields.append(f"{name}={_normal_form(entry)}")
    return f"{type(value).__name__}({','.join(fields)})"


def _computes_nothing(node: object) -> bool:
    """A docstring, any other string that stands alone, or `pass`."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    return isinstance(node, ast.Pass)
