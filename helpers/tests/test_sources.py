"""What holds for every source: rooms and imports, one fact a line, named encodings.

    python -m helpers.tests.test_sources

reports what the rules for code leave to a person: the longest functions and where `Any`
stands.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from helpers.tests import reading
from helpers.tests.reading import HELPERS, NOTEBOOKS

import pytest

MODULES = reading.modules()
WITH_TESTS = reading.modules(tests=True)

# The rooms from the bottom up: a module imports from its own room and from rooms of a
# lower rank. The longest name that fits says which room a module is in.
RANK = {
    "helpers": 0,
    "helpers.checks": 0,
    # the facts, with the room's empty __init__, lie below everything
    "helpers.evidence": 1,
    "helpers.evidence.facts": 1,
    "helpers.v3": 2,
    "helpers.training": 3,
    "helpers.reasoning": 4,
    "helpers.cluster": 4,
    "helpers.evidence.": 4,
    "helpers.page": 5,
    "helpers.bench": 6,
}
LONGEST_LINE = 88
# what a person should have looked at; the rule is about 40 lines
LONGEST_FUNCTION = 60


class Import(NamedTuple):
    """One imported helper.

    name: what is taken from the module; "" for the module itself. bound: what it is
    called from there on.
    """

    line: int
    module: str
    name: str
    bound: str


def imports(tree: ast.Module) -> list[Import]:
    """The helpers that a source imports, at its top or inside a function."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name
                found.append(Import(node.lineno, alias.name, "", bound))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                found.append(taken_from(str(node.module), alias, node.lineno))
    return [entry for entry in found if entry.module.split(".")[0] == "helpers"]


def taken_from(module: str, alias: ast.alias, line: int) -> Import:
    """What `from module import name` imports: a module, or a name of one."""
    bound = alias.asname or alias.name
    whole = f"{module}.{alias.name}"
    if whole in WITH_TESTS:
        return Import(line, whole, "", bound)
    return Import(line, module, alias.name, bound)


def room(module: str) -> str:
    """The key of RANK that `module` belongs to; KeyError for a module of no room."""
    if module in RANK:
        return module
    above = module.rpartition(".")[0]
    while above.startswith("helpers."):
        for key in (f"{above}.", above):
            if key in RANK:
                return key
        above = above.rpartition(".")[0]
    raise KeyError(f"{module} lies in no room: move it, or give its room a RANK")


def ranked(module: str) -> int:
    return RANK[room(module)]


# -------------------------------------------------------------------- rooms and imports


def test_every_helper_lies_in_a_room():
    flat = {path.name for path in HELPERS.glob("*.py")}
    assert flat == {"__init__.py", "checks.py"}
    rooms = {path.parent for path in HELPERS.glob("*/*.py")}
    for folder in rooms:
        assert (folder / "__init__.py").is_file()


def test_the_rooms_of_known_modules():
    assert room("helpers.evidence") == "helpers.evidence"
    assert room("helpers.evidence.facts") == "helpers.evidence.facts"
    assert room("helpers.evidence.cost") == "helpers.evidence."
    assert room("helpers.v3.model") == "helpers.v3"
    with pytest.raises(KeyError, match="no room"):
        room("helpers.plots")


def test_imports_run_one_way():
    wrong = []
    for name, path in MODULES.items():
        for entry in imports(reading.parse(path)):
            other = entry.module
            own = room(other) == room(name)
            if not own and ranked(other) >= ranked(name):
                wrong.append(f"{name}:{entry.line} imports {other}")
    assert wrong == []


def test_nothing_but_notebooks_imports_what_pages_show():
    wrong = []
    for name, path in MODULES.items():
        for entry in imports(reading.parse(path)):
            of_a_page = room(entry.module) == "helpers.page"
            if of_a_page and room(name) != "helpers.page":
                wrong.append(f"{name}:{entry.line}")
    assert wrong == []


def test_no_import_runs_in_a_circle():
    graph = {}
    for name, path in MODULES.items():
        others = {entry.module for entry in imports(reading.parse(path))}
        graph[name] = others - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_of_others(tree: ast.Module) -> Iterator[str]:
    """Private names that a source imports, or takes from a helper that it imported."""
    known = set()
    for entry in imports(tree):
        if private(entry.name):
            yield f"line {entry.line}: {entry.module}.{entry.name}"
        if not entry.name:
            known.add(entry.bound)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            owner = ast.unparse(node.value)
            if owner in known:
                yield f"line {node.lineno}: {owner}.{node.attr}"


@pytest.mark.slow
def test_private_names_stay_in_their_module():
    wrong = []
    for name, path in MODULES.items():
        wrong += [
            (name, where) for where in private_names_of_others(reading.parse(path))
        ]
    for path in NOTEBOOKS:
        wrong += [(path.name, w) for w in private_names_of_others(reading.parse(path))]
    assert wrong == []


def test_a_private_name_is_found():
    source = (
        "from helpers.v3.fp8 import _scale\n"
        "from helpers.v3 import fp8 as eight\n"
        "eight._Product\n"
        "eight.__name__\n"
    )
    found = list(private_names_of_others(ast.parse(source)))
    assert found == ["line 1: helpers.v3.fp8._scale", "line 3: eight._Product"]


# ------------------------------------------------------------------------------ sources


def test_no_line_is_wider_than_a_page():
    wide = []
    for name, path in WITH_TESTS.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if len(line) > LONGEST_LINE:
                wide.append(f"{name}:{number}")
    assert wide == []


class Length(NamedTuple):
    """Lines of a function, its docstring left out."""

    lines: int
    where: str


def function_lengths() -> list[Length]:
    """All functions of the helpers, the longest first."""
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(reading.parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    docstring = node.body[0]
                    lines -= docstring.end_lineno - docstring.lineno + 1
                found.append(Length(lines, f"{name}.{node.name}"))
    return sorted(found, reverse=True)


def test_no_function_is_a_chapter():
    long = [entry for entry in function_lengths() if entry.lines > LONGEST_FUNCTION]
    assert long == []


def fused_assignments(tree: ast.Module) -> list[int]:
    """Lines of the assignments that set several names to several values at once.

    A swap sets the same places that it reads.
    """
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            for target in node.targets:
                if isinstance(target, ast.Tuple):
                    left = sorted(ast.unparse(place) for place in target.elts)
                    right = sorted(ast.unparse(value) for value in node.value.elts)
                    if left != right:
                        lines.append(node.lineno)
    return lines


def test_an_assignment_states_one_fact():
    assert fused_assignments(ast.parse("a, b = 1, 2\nc, d = d, c\ne, f = g")) == [1]
    fused = []
    for name, path in MODULES.items():
        lines = fused_assignments(reading.parse(path))
        fused += [f"{name}:{line}" for line in lines]
    assert fused == []


# {name: which positional argument is the mode}; a method's own object does not count
OPENS_AS_FUNCTION = {"open": 1}
OPENS_AS_METHOD = {"open": 0, "fdopen": 1}
# {name: which positional argument is the encoding}
READS = {"read_text": 0, "write_text": 1}


def text_without_encoding(tree: ast.Module) -> list[int]:
    """Lines that open, read or write text and leave the encoding to the machine."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or names_encoding(node):
            continue
        if opens_text(node) or name_of(node.func) in READS:
            lines.append(node.lineno)
    return lines


def names_encoding(call: ast.Call) -> bool:
    by_position = len(call.args) > READS.get(name_of(call.func), len(call.args))
    return by_position or any(word.arg == "encoding" for word in call.keywords)


def name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file, and not in binary mode."""
    as_method = isinstance(call.func, ast.Attribute)
    opens = OPENS_AS_METHOD if as_method else OPENS_AS_FUNCTION
    if name_of(call.func) not in opens or ast.unparse(call.func) == "os.open":
        return False
    position = opens[name_of(call.func)]
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    modes += call.args[position : position + 1]
    return not any("b" in ast.unparse(mode).strip("'\"") for mode in modes)


def test_text_without_encoding_is_found():
    source = (
        "open(path)\nopen(path, 'rb')\nopen(path, encoding='utf-8')\n"
        "path.open()\npath.open('wb')\npath.read_text()\n"
        "path.write_text(text, encoding='utf-8')\nos.open(path, 0)\n"
        "path.read_text('utf-8')\npath.write_text(text)\n"
    )
    assert text_without_encoding(ast.parse(source)) == [1, 4, 6, 10]


@pytest.mark.slow
def test_every_text_file_names_its_encoding():
    wrong = []
    for name, path in WITH_TESTS.items():
        lines = text_without_encoding(reading.parse(path))
        wrong += [f"{name}:{line}" for line in lines]
    for path in NOTEBOOKS:
        lines = text_without_encoding(reading.parse(path))
        wrong += [f"{path.name}:{line}" for line in lines]
    assert wrong == []


# --------------------------------------------------------------------------- the report


def any_by_module() -> dict[str, int]:
    """How often `Any` stands in each helper, its import left out."""
    counts = {}
    for name, path in MODULES.items():
        uses = 0
        for node in ast.walk(reading.parse(path)):
            if isinstance(node, ast.Name) and node.id == "Any":
                uses += 1
        if uses:
            counts[name] = uses
    return counts


def report() -> None:
    """Print what the rules for code leave to a person."""
    paths = list(MODULES.values())
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    print(f"{len(paths)} helpers, {lines} lines")
    print("\nlongest functions, docstrings left out:")
    for entry in function_lengths()[:15]:
        print(f"  {entry.lines:4d}  {entry.where}")
    print("\nAny:")
    for name, uses in any_by_module().items():
        print(f"  {uses:4d}  {name}")


if __name__ == "__main__":
    report()
