"""Plain functions that read this repository: its notebooks, its sources, its README.

    python -c "from helpers.tests.reading import take_picture; take_picture('01', 0)"

makes the first figure of notebook 01 the one that the README shows of it.
"""

import ast
import base64
import html
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "helpers"
RESULTS = ROOT / "notebooks" / "results"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

FOLDERS = "home|root|Users|work|tmp|private|opt|mnt|var|usr/lib|usr/local"
MACHINE_PATH = re.compile(
    rf"(?<![\w.~])/(?:{FOLDERS})/\w|\b[A-Z]:\\+(?:Users|Windows|Program)"
)
IMAGE = re.compile(r'<img [^>]*alt="([^"]*)" src="data:image/png;base64,([^"]*)"')
# hidden files of the project, where there is no git to ask
HIDDEN = (
    ".ci",
    ".github",
    ".gitignore",
    ".mypy.ini",
    ".pre-commit-config.yaml",
    ".pytest.ini",
    ".ruff.toml",
)


# ---------------------------------------------------------------------------- notebooks


def read(path: Path) -> NotebookNode:
    """The notebook as it lies on disk."""
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Its cells of code, empty ones left out."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if cell.source.strip()]


def code_of(notebook: NotebookNode) -> str:
    """All its code, as one text."""
    return "\n".join(cell.source for cell in code_cells(notebook))


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    """The outputs of all cells, in order."""
    found = []
    for cell in code_cells(notebook):
        found += cell.outputs
    return found


def saved_widgets(notebook: NotebookNode) -> dict[str, dict]:
    """{id: model} of the widgets whose state the notebook keeps."""
    kinds = notebook.metadata.get("widgets", {})
    saved = kinds.get("application/vnd.jupyter.widget-state+json", {})
    return saved.get("state", {})


def all_outputs(notebook: NotebookNode) -> list[tuple[str, NotebookNode]]:
    """(where, output) of all cells, and of what stands inside output widgets."""
    found = []
    for cell in code_cells(notebook):
        found += [(cell.id, output) for output in cell.outputs]
    for model in saved_widgets(notebook).values():
        found += [("a widget", output) for output in model["state"].get("outputs", [])]
    return found


def texts(output: NotebookNode) -> Iterator[tuple[str, str]]:
    """(kind, text) of all that a reader sees of an output, pictures left out.

    kind: a stream's name or a MIME type.
    """
    if output.output_type == "stream":
        yield output.name, output.text
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str) and not kind.startswith("image/"):
            yield kind, value


def failures(notebook: NotebookNode) -> list[str]:
    """Errors and warnings in a notebook's outputs."""
    found = []
    for where, output in all_outputs(notebook):
        if output.output_type == "error":
            found.append(f"{where}: {output.ename}: {output.evalue}")
        for kind, text in texts(output):
            sign = "Warning" if kind == "stderr" else "Warning:"
            if sign in text:
                found.append(f"{where}: warning in {kind}: {text.strip()[:500]}")
    return found


def parameter_names(notebook: NotebookNode) -> set[str]:
    """The names that the cell tagged `parameters` sets."""
    tagged = []
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            tagged.append(cell)
    [cell] = tagged
    names = set()
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


class Picture(NamedTuple):
    """A picture in an output, and the text for those who do not see it."""

    png: bytes
    alt: str


def pictures(output: NotebookNode) -> list[Picture]:
    """The pictures of one output: HTML images, or a plain PNG as matplotlib shows it.

    The notebooks of the first edition have the latter, with the alt text as metadata.
    """
    data = output.get("data", {})
    found = []
    for alt, png in IMAGE.findall(data.get("text/html", "")):
        found.append(Picture(base64.b64decode(png), html.unescape(alt)))
    if "image/png" in data:
        alt = output.metadata.get("image/png", {}).get("alt", "")
        found.append(Picture(base64.b64decode(data["image/png"]), alt))
    return found


def figures(notebook: NotebookNode) -> list[bytes]:
    """The notebook's pictures, in order, as PNG files."""
    found = []
    for output in outputs(notebook):
        found += [picture.png for picture in pictures(output)]
    return found


def take_picture(number: str, n: int) -> None:
    """Make figure n of notebook `number` ("01") the README's picture of it."""
    [path] = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    (RESULTS / f"{number}.png").write_bytes(figures(read(path))[n])


# ------------------------------------------------------------------------------ sources


def modules(tests: bool = False) -> dict[str, Path]:
    """{dotted name: file} of all helpers; of the tests only with `tests`."""
    found = {}
    for path in sorted(HELPERS.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "tests" in parts and not tests:
            continue
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a source file, or of a notebook's code."""
    if path.suffix == ".ipynb":
        return ast.parse(code_of(read(path)))
    return ast.parse(path.read_text(encoding="utf-8"))


def project_files() -> list[Path]:
    """The files that belong to the project: those that git does not ignore.

    Outside a repository: those that are neither hidden nor made.
    """
    names = _known_to_git()
    if names is None:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
        names = [name for name in names if _is_source(Path(name))]
    paths = [ROOT / name for name in names if name]
    return [path for path in paths if path.is_file()]


def _known_to_git() -> list[str] | None:
    if not (ROOT / ".git").exists():
        return None
    git = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    return git.stdout.split("\0") if git.returncode == 0 else None


def _is_source(path: Path) -> bool:
    if "__pycache__" in path.parts:
        return False
    return all(not part.startswith(".") or part in HIDDEN for part in path.parts)
