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
ROOMS = ("helpers.v3", "helpers.training", "helpers.reasoning")
# ... but for these two modules, which name folders and compare code.
NOT_COUNTED = ("helpers.training.runs", "helpers.training.source")


class Sources:
    """The modules of helpers under `root`, each file read and parsed once at most."""

    def __init__(self, root: Path = REPOSITORY) -> None:
        self.root = root
        self._trees: dict[str, ast.Module] = {}
        self._imported: dict[str, list[str]] = {}
        self._forms: dict[str, str] = {}

    def modules_of(self, module: str) -> set[str]:
        """The modules of `ROOMS` that `module` imports, directly or not, and itself.

        A name that a package only passes on (`from helpers.v3 import V3Config`) leads
        to the module that defines it, not to all that the package holds. InputError
        where there is no such module.
        """
        known = self._file(module) is not None
        need(known, "module", module, "it must be a module of helpers")
        return self._reached([module])

    def modules_of_text(self, text: str) -> set[str]:
        """As `modules_of`, for code outside of helpers, such as a notebook's cells."""
        return self._reached(self._imports(ast.parse(text), ""))

    def all_modules(self) -> set[str]:
        """Every module of `ROOMS`."""
        found = set()
        for room in ROOMS:
            for file in self.root.joinpath(*room.split(".")).glob("*.py"):
                found.add(f"{room}.{file.stem}".removesuffix(".__init__"))
        return found - set(NOT_COUNTED)

    def hash_of(self, modules: Iterable[str]) -> str:
        """12 hex digits of what these modules compute.

        Comments, docstrings, `pass` and formatting do not count; nor does the version
        of Python that reads the files. A module that is missing counts as empty.
        """
        digest = hashlib.sha256()
        for module in sorted(modules):
            if module not in self._forms:
                self._forms[module] = normal_form(self._tree(module))
            digest.update(f"{module}\0{self._forms[module]}\0".encode())
        return digest.hexdigest()[:12]

    def code_hash(self, module: str) -> str:
        """`hash_of` all that `module` rests on."""
        return self.hash_of(self.modules_of(module))

    def _reached(self, starts: Iterable[str]) -> set[str]:
        waiting = list(starts)
        seen: set[str] = set()
        while waiting:
            module = waiting.pop()
            if module in seen or self._file(module) is None:
                continue
            seen.add(module)
            if module not in self._imported:
                self._imported[module] = [*self._imports(self._tree(module), module)]
            waiting += self._imported[module]
        return {module for module in seen if _counts(module)}

    def _file(self, module: str) -> Path | None:
        """The file of a module or package of helpers; None where there is none."""
        if module.split(".")[0] != "helpers":
            return None
        path = self.root.joinpath(*module.split("."))
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if file.is_file():
                return file
        return None

    def _is_package(self, module: str) -> bool:
        file = self._file(module)
        return file is not None and file.name == "__init__.py"

    def _tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            file = self._file(module)
            text = file.read_text(encoding="utf-8") if file else ""
            self._trees[module] = ast.parse(text)
        return self._trees[module]

    def _imports(self, tree: ast.Module, module: str) -> Iterator[str]:
        """What the code of `module` imports, wherever in it the import stands."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                source = self._absolute(node, module)
                for alias in node.names:
                    yield self._definer(source, alias.name)

    def _absolute(self, node: ast.ImportFrom, module: str) -> str:
        """The module that a `from ... import` names, with leading dots resolved."""
        if node.level == 0:
            return node.module or ""
        # One dot is the package that the module is in; a package is in itself.
        up = node.level - 1 if self._is_package(module) else node.level
        parts = module.split(".")
        package = parts[: len(parts) - up]
        return ".".join([*package, node.module] if node.module else package)

    def _definer(self, source: str, name: str) -> str:
        """The module that `from source import name` gets its object from."""
        if self._file(f"{source}.{name}"):
            return f"{source}.{name}"
        if not self._is_package(source):
            return source
        for node in self._tree(source).body:
            if not isinstance(node, ast.ImportFrom):
                continue
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return self._definer(self._absolute(node, source), alias.name)
        return source


def _counts(module: str) -> bool:
    in_room = any(f"{module}.".startswith(f"{room}.") for room in ROOMS)
    return in_room and module not in NOT_COUNTED


def normal_form(value: object) -> str:
    """Text of a syntax tree that depends only on what is computed.

    `ast.dump` would do, but some versions of Python write empty fields and others leave
    them out.
    """
    if isinstance(value, list):
        kept = [normal_form(entry) for entry in value if not _computes_nothing(entry)]
        return f"[{','.join(kept)}]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = []
    for name, entry in ast.iter_fields(value):
        # `kind` is the u of u"..."
        if entry is not None and entry != [] and name != "kind":
            fields.append(f"{name}={normal_form(entry)}")
    return f"{type(value).__name__}({','.join(fields)})"


def _computes_nothing(node: object) -> bool:
    """Whether it is `pass` or a string that stands alone, such as a docstring."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    return isinstance(node, ast.Pass)
