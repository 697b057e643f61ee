"""What a notebook of the second edition must be; each check gives the faults it found.

`test_second_edition` applies them to the notebooks in `results.REWRITTEN`, and to small
ones that have each fault.
"""

import html
import re

from helpers.tests import reading

from nbformat import NotebookNode

LONG = 25  # lines of a cell that are worth a look
TOO_LONG = 60
# Whole numbers up to this count things in the text itself.
COUNTED = 10
NUMBER = re.compile(r"(?<![\w.,])[-−+±]?\d[\d,]*(?:\.\d+)?(?![\w])")
# What has digits in it and is a name, or the label of a width or a depth.
NAMES = re.compile(
    r"`[^`]*`|\$[^$]*\$|\[[^\]]*\]\([^)]*\)|Llama 3(?:\.\d)?(?: \d+B)?"
    r"|Qwen2\.5(?: \d+B)?|Mixtral 8x\d+B|DeepSeek-V\d|\b[VR]\d(?:-Zero)?\b"
    r"|H[128]00|\bFP8\b|\bBF16\b|float32|\b\d+K\b|arXiv:[\d.]+|sections? [\d.]+"
    r"|Tables? \d+|95 %|equations? \d+"
)
# What a value was multiplied by, said by the word behind the number.
SCALES = {
    "%": 100,
    "thousand": 1e-3,
    "kB": 1e-3,
    "million": 1e-6,
    "MB": 1e-6,
    "billion": 1e-9,
    "GB": 1e-9,
}


def long_cells(notebook: NotebookNode, limit: int) -> list[str]:
    """Code cells of more than `limit` lines."""
    found = []
    for cell in reading.code_cells(notebook):
        lines = cell.source.strip().count("\n") + 1
        if lines > limit:
            found.append(f"{cell.id}: {lines} lines")
    return found


def assembled_sentences(notebook: NotebookNode) -> list[str]:
    """Code cells that write Markdown: prose is written by hand, in cells of its own."""
    found = []
    for cell in reading.code_cells(notebook):
        if re.search(r"\bMarkdown\(", cell.source):
            found.append(f"{cell.id}: Markdown made by code")
        if re.search(r"\*\*Found", cell.source):
            found.append(f"{cell.id}: a finding written by code")
    return found


def lost_pages(notebook: NotebookNode, following: str | None) -> list[str]:
    """Links that are missing: back to the map, and on to the `following` notebook."""
    prose = "\n".join(
        cell.source for cell in notebook.cells if cell.cell_type == "markdown"
    )
    wanted = ["00_start_here.ipynb", following]
    return [
        f"no link to {name}" for name in wanted if name and f"({name})" not in prose
    ]


def solutions_out_of_place(notebook: NotebookNode) -> list[str]:
    """Solutions that are not folded with their outputs, or do not stand last."""
    found = []
    is_solution = []
    for cell in notebook.cells:
        solution = "solution" in cell.metadata.get("tags", [])
        is_solution.append(solution)
        folds = cell.metadata.get("jupyter", {})
        folded = folds.get("source_hidden") and folds.get("outputs_hidden")
        if solution and not folded:
            found.append(f"{cell.id}: fold the solution and its output")
    first = is_solution.index(True) if True in is_solution else len(is_solution)
    for cell, solution in list(zip(notebook.cells, is_solution, strict=True))[first:]:
        if cell.cell_type == "code" and not solution:
            found.append(f"{cell.id}: code behind the first solution")
    return found


def moments(notebook: NotebookNode) -> list[str]:
    """Timestamps of cells, and bars that stand still."""
    found = []
    for cell in reading.code_cells(notebook):
        if "execution" in cell.metadata:
            found.append(f"{cell.id}: timestamps; run with record_timing=False")
        for output in cell.outputs:
            for _, text in reading.texts(output):
                if re.search(r"\d+%\|", text):
                    found.append(f"{cell.id}: a bar that stands still")
    return found


def raw_widgets(notebook: NotebookNode) -> list[str]:
    """Widgets that show their repr where there is no kernel."""
    found = []
    for cell in reading.code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            view = "application/vnd.jupyter.widget-view+json" in data
            if view and "text/html" not in data:
                found.append(f"{cell.id}: show it by widgets.show_widget")
    return found


# ----------------------------------------------------------------- numbers of findings


def numbers_in(text: str) -> list[tuple[str, str]]:
    """(number, the word behind it) as they are written; names with digits left out."""
    plain = NAMES.sub(" ", text)
    found = []
    for match in NUMBER.finditer(plain):
        behind = plain[match.end() :].split(maxsplit=1)
        found.append((match.group(), behind[0].strip(".,;:)") if behind else ""))
    return found


def findings(notebook: NotebookNode) -> list[tuple[str, str]]:
    """(cell id, text) of all **Found.** paragraphs."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        for paragraph in re.split(r"\n\s*\n", cell.source):
            if paragraph.lstrip().startswith("**Found"):
                found.append((cell.id, paragraph))
    return found


def known_values(notebook: NotebookNode) -> list[float]:
    """All numbers of the notebook's outputs, those of alt texts among them."""
    values = []
    for output in reading.outputs(notebook):
        for kind, text in reading.texts(output):
            if kind == "text/html":
                text = re.sub(
                    r"src=\"[^\"]*\"|<style.*?</style>|id=\"[^\"]*\"", " ", text
                )
                text = html.unescape(re.sub(r"<[^>]*>", " ", text) + _alts(text))
            values += [float(as_typed(number)) for number in _all_numbers(text)]
    return values


def _alts(text: str) -> str:
    return " ".join(re.findall(r"alt=\"([^\"]*)\"", text))


def _all_numbers(text: str) -> list[str]:
    return re.findall(r"[-−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", text)


def as_typed(number: str) -> str:
    """A number as Python reads it."""
    return number.replace(",", "").replace("−", "-").lstrip("+±")


def is_known(number: str, unit: str, values: list[float]) -> bool:
    """Whether some value, rounded as the number is written, is the number.

    unit: the word behind the number; "%" and "million" say how a value was scaled.
    """
    typed = as_typed(number)
    decimals = len(typed.partition(".")[2])
    wanted = abs(float(typed))
    if decimals == 0 and wanted <= COUNTED:
        return True
    reach = 0.5 * 10**-decimals * (1 + 1e-6)
    return any(
        abs(abs(value) * scale - wanted) <= reach
        for value in values
        for scale in (1, SCALES.get(unit, 1))
    )


def unknown_numbers(notebook: NotebookNode) -> list[str]:
    """Numbers of findings that are in none of the page's outputs.

    Recorded results do not count: among hundreds of values one always fits. What a
    finding says must stand on its page.
    """
    values = known_values(notebook)
    found = []
    for cell, text in findings(notebook):
        for number, unit in numbers_in(text):
            if not is_known(number, unit, values):
                found.append(f"{cell}: {number} is nowhere in the outputs")
    return found
