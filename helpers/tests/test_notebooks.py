"""Every notebook runs with small parameters; the committed ones are whole and readable; the README says what is true."""

import ast
import base64
import importlib.metadata
import os
import re
import subprocess
from itertools import chain
from pathlib import Path

import nbformat
import papermill
import pytest

from helpers import facts

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What papermill puts in place of the `parameters` cell's values, so that each notebook runs in seconds.
SMALL: dict[str, dict] = {
    "00_start_here": {"num_hidden_layers": 2, "steps": 4, "batch_size": 4, "length": 64, "max_bytes": 1_000_000, "valid_sequences": 4},
    "01_mixture_of_experts": {"vocab_size": 512, "steps": 6, "batch_size": 4, "length": 64, "valid_every": 3, "probe_sequences": 4,
                              "probe_documents": 2},
    "02_latent_attention": {"hidden_size": 64, "heads": 4, "kv_rank": 16, "nope_dim": 16, "rope_dim": 8, "v_dim": 16,
                            "contexts": [32, 64, 128], "repeats": 2, "prefill_context": 64, "prefill_new": [1, 8, 64], "prefill_repeats": 2,
                            "ladder_tokens": 12, "distance_limit": 64, "distance_samples": 50},
    "03_multi_token_prediction": {"vocab_size": 512, "max_bytes": 1_000_000, "steps": 6, "batch_size": 4, "length": 64, "valid_every": 3,
                                  "valid_sequences": 4, "n_prompts": 3, "prompt_length": 12, "new_tokens": 8, "hf_prompts": 1,
                                  "wrong_prompts": 2, "class_windows": 4, "leak_steps": 4, "draws": 2000, "timing_repeats": 2},
    "04_pretraining": {"vocab_size": 512, "max_bytes": 1_000_000, "steps": 6, "batch_size": 4, "length": 64, "valid_every": 3,
                       "valid_sequences": 4, "resume_steps": 4, "resume_hidden": 32, "samples": 4, "new_tokens": 12, "matmul_size": 256},
    "06_long_context": {"vocab_size": 300, "max_bytes": 1_000_000, "hidden_size": 32, "names": 4, "values": 4, "window": 32, "base_steps": 4,
                        "batch_size": 4, "ratios": [2, 2], "phase_steps": 2, "phase_tokens": 128, "map_lengths": [32, 64, 128],
                        "map_documents": 2, "run_controls": True, "cache_contexts": [256, 512], "cache_megabytes": 4, "cache_seconds": 0.01},
    "07_h800_cluster": {"train_steps": 4, "batch_size": 4, "length": 64, "vocab_size": 512, "probe_sequences": 4, "tokens": 2048, "random_cases": 3,
                        "layers": 2},
    "08_r1_zero": {"corpus_tokens": 20_000, "corpus_documents": 300, "base_steps": 8, "rl_steps": 2, "questions": 4, "group": 4,
                   "max_new_tokens": 40, "control_steps": 2, "run_controls": True, "test_problems": 16, "passk_problems": 4,
                   "passk_samples": 4, "sweep_problems": 8, "sample_steps": [0, 1]},
    "09_r1": {"corpus_tokens": 20_000, "base_steps": 8, "cold_traces": 24, "rl_steps": 2, "final_steps": 2, "questions": 4, "group": 4,
              "max_new_tokens": 40, "sample_questions": 4, "samples": 4, "fact_documents": 8, "v3_questions": 4, "v3_tokens": 2000,
              "test_problems": 16, "parity_prompts": 2},
    "11_training_cost": {"draws": 500},
    "12_claims_checked": {"longest": 160},
}

# helpers from the bottom up: each may import those of lower rank. `plots` stands alone.
RANK = {"facts": 0, "store": 1, "data": 2, "model": 2, "checkpoint": 3, "cost": 3, "cluster": 1, "countdown": 3, "train": 4, "rl": 5, "plots": 0}
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|tmp|private|opt|mnt|var|usr/lib|usr/local)/\w"
                          r"|\b[A-Z]:\\+(?:Users|Windows|Program)")


def each_notebook(test):
    return pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)(test)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def outputs(notebook) -> list:
    return list(chain.from_iterable(cell.outputs for cell in code_cells(notebook)))


def all_outputs(notebook) -> list[tuple[str, nbformat.NotebookNode]]:
    """(where, output) of all cells, and of what stands inside output widgets (beside sliders)."""
    saved = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    inside = [("a widget", output) for model in saved.values() for output in model["state"].get("outputs", [])]
    return [(cell.id, output) for cell in code_cells(notebook) for output in cell.outputs] + inside


def texts(output):
    """(kind, text) of all that a reader sees of an output, pictures left out; kind is a stream's name or a MIME type."""
    if output.output_type == "stream":
        yield output.name, output.text
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str) and not kind.startswith("image/"):
            yield kind, value


def problems(notebook) -> list[str]:
    """Errors and warnings in a notebook's outputs."""
    found = []
    for where, output in all_outputs(notebook):
        if output.output_type == "error":
            found.append(f"{where}: {output.ename}: {output.evalue}")
        for kind, text in texts(output):
            if ("Warning" if kind == "stderr" else "Warning:") in text:
                found.append(f"{where}: warning in {kind}: {text.strip()[:500]}")
    return found


def parameter_names(notebook) -> set[str]:
    """The names that the cell tagged `parameters` sets."""
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    statements = ast.parse(cell.source).body
    targets = chain.from_iterable(s.targets if isinstance(s, ast.Assign) else [getattr(s, "target", None)] for s in statements)
    return {node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)}


def figures(notebook) -> list[bytes]:
    """The notebook's pictures, in order, as PNG files."""
    return [base64.b64decode(output.data["image/png"]) for output in outputs(notebook) if "image/png" in output.get("data", {})]


def picture(number: str, n: int) -> None:
    """Make figure n of notebook `number` ("01") the README's picture of it."""
    [path] = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    (ROOT / "notebooks" / "results" / f"{number}.png").write_bytes(figures(read(path))[n])


def project_files() -> list[Path]:
    """The files that belong to the project: those that git does not ignore or, outside a repository, those not hidden or made."""
    git = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True) \
        if (ROOT / ".git").exists() else None
    if git and git.returncode == 0:
        names = git.stdout.split("\0")
    else:
        kept = {".ci", ".gitignore", ".ruff.toml", ".pytest.ini"}
        relative = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        names = [path for path in relative if "__pycache__" not in path.parts
                 and all(part in kept or not part.startswith(".") for part in path.parts)]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


# ------------------------------------------------------------------------------------------------- run with small parameters


def results() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (ROOT / "notebooks" / "results").iterdir() if path.is_file()}


@each_notebook
def test_runs_with_small_parameters(path, tmp_path, lab_home):
    assert path.stem in SMALL, f"give {path.stem} an entry in SMALL: sizes and steps of its parameters cell that run in seconds"
    unknown = set(SMALL[path.stem]) - parameter_names(read(path))
    assert not unknown, f"SMALL sets what the parameters cell of {path.stem} does not have: {sorted(unknown)}"
    before, out, failure = results(), tmp_path / path.name, None
    try:
        papermill.execute_notebook(path, out, SMALL[path.stem], kernel_name="python3", cwd=path.parent, progress_bar=False,
                                   start_timeout=120, execution_timeout=600)
    except papermill.PapermillExecutionError as error:
        failure = error
    if failure:
        pytest.fail(f"{path.name}: {failure}", pytrace=False)
    assert problems(read(out)) == []
    assert results() == before, "a test run must not write into notebooks/results; use helpers.store"


def test_every_notebook_is_known():
    assert NOTEBOOKS and set(SMALL) == {path.stem for path in NOTEBOOKS}


# ------------------------------------------------------------------------------------------------- the notebooks as committed


@each_notebook
def test_was_run_from_top_to_bottom_without_problems(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1)), \
        "restart the kernel and run all cells"
    assert problems(notebook) == []
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(nbformat.writes(notebook)) < 3e6, "too large for git: fewer or smaller figures"


@each_notebook
def test_reads_well_without_a_kernel(path):
    notebook = read(path)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert any("Predict first" in source for source in prose), "no prompt to predict a result before it is shown"
    solutions = [cell for cell in code_cells(notebook) if "solution" in cell.metadata.get("tags", [])]
    assert len(solutions) >= 2, "two exercises at least, each with a solution that ran"
    for cell in solutions:
        assert cell.metadata.get("jupyter", {}).get("source_hidden") is True, f"{cell.id}: fold the solution"
    assert figures(notebook), "no figure"
    for where, output in all_outputs(notebook):
        if "image/png" in output.get("data", {}):
            assert output.metadata.get("image/png", {}).get("alt", "").strip(), f"{where}: no alt text; show the figure by plots.show"
    long = [cell.id for cell in code_cells(notebook) if len(cell.source.splitlines()) > 30]
    assert not long, f"over 30 lines: {long}"


@each_notebook
def test_cells_have_readable_ids_and_one_holds_the_parameters(path):
    notebook = read(path)
    ids = [cell.id for cell in notebook.cells]
    assert [name for name in ids if not re.fullmatch(r"\d{2,3}-(?=.*[A-Za-z])[A-Za-z0-9_-]+", name)] == []  # NN-slug
    assert len(set(ids)) == len(ids)
    assert parameter_names(notebook), "no cell tagged `parameters` that sets anything"


@each_notebook
def test_holds_no_path_of_a_machine(path):
    notebook = read(path)
    seen = [cell.source for cell in notebook.cells] + [text for _, output in all_outputs(notebook) for _, text in texts(output)]
    assert [match.group() for text in seen for match in MACHINE_PATH.finditer(text)] == []


@each_notebook
def test_widgets_come_back_without_a_kernel(path):
    notebook, mime = read(path), "application/vnd.jupyter.widget-{}+json"
    widgets = notebook.metadata.get("widgets", {})
    assert set(widgets) <= {mime.format("state")}
    saved = widgets.get(mime.format("state"), {"version_major": 2, "state": {}})
    assert saved["version_major"] == 2 and isinstance(saved["version_minor"] if widgets else 0, int)
    for name, model in saved["state"].items():
        assert {"model_name", "model_module", "state"} <= set(model), f"widget model {name} is not whole"
    views = [output.data[mime.format("view")] for output in outputs(notebook) if mime.format("view") in output.get("data", {})]
    assert [view["model_id"] for view in views if view["model_id"] not in saved["state"]] == []


def test_every_figure_that_is_quoted_has_its_fact():
    sources = {path.name: "\n".join(cell.source for cell in read(path).cells) for path in NOTEBOOKS}
    sources |= {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "helpers").glob("*.py")}
    used = {(name, key) for name, source in sources.items() for key in re.findall(r"\bfact\(\s*[\"']([^\"'{}]+)[\"']", source)}
    assert [(name, key) for name, key in sorted(used) if key not in facts.FACTS] == []


# ------------------------------------------------------------------------------------------------- helpers and the top level


def imported_helpers(path: Path) -> set[str]:
    """The helper modules that a helper imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("helpers.") for alias in node.names if alias.name.startswith("helpers.")}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "") if not node.level else "helpers" + (f".{node.module}" if node.module else "")
            if module == "helpers":
                names |= {alias.name for alias in node.names}
            elif module.startswith("helpers."):
                names.add(module.split(".")[1])
    return names


def test_helpers_import_one_way():
    modules = {path.stem: path for path in (ROOT / "helpers").glob("*.py") if path.stem != "__init__"}
    assert set(modules) == set(RANK), "give each module its place in RANK"
    wrong = [(name, other) for name, path in modules.items() for other in imported_helpers(path) if RANK[other] >= RANK[name]]
    assert wrong == []
    assert imported_helpers(modules["plots"]) == set()
    assert not any("plots" in imported_helpers(path) for path in modules.values())


def test_helpers_stay_small():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "helpers").glob("*.py")) < 3000


def test_top_level_shows_four_things():
    top = {path.relative_to(ROOT).parts[0] for path in project_files()}
    assert {name for name in top if not name.startswith(".")} == {"README.md", "requirements.txt", "notebooks", "helpers"}


def test_no_file_names_a_place_on_a_machine():
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8") if path.suffix != ".ipynb" else ""  # notebooks: above
        except UnicodeDecodeError:
            continue
        found += [(path.name, match.group()) for match in MACHINE_PATH.finditer(text)]
    assert found == []


def test_requirements_are_pinned_with_a_reason_and_installed():
    lines = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    for line in lines:
        name, version = re.fullmatch(r"([\w-]+)==([\w.]+) +# .+", line).groups()
        assert importlib.metadata.version(name).split("+")[0] == version, f"{name} is not the version that requirements.txt pins"


# ------------------------------------------------------------------------------------------------- README


def test_readme_is_finished_and_names_every_notebook():
    assert re.findall(r"\{\w+\}", README) == []
    assert [path.name for path in NOTEBOOKS if f"(notebooks/{path.name})" not in README] == []


def test_readme_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)\s]+)\)", README) + re.findall(r"(?:src|href)=\"([^\"]+)\"", README)
    anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", README, re.M)}
    local = [link for link in links if not link.startswith("https://")]
    assert [link for link in local if link not in anchors and not (ROOT / link).exists()] == []


@each_notebook
def test_readme_picture_is_a_figure_of_the_notebook(path):
    number = path.stem[:2]
    file = ROOT / "notebooks" / "results" / f"{number}.png"
    remedy = f"python -c 'from helpers.tests.test_notebooks import picture; picture(\"{number}\", 0)' takes the first one"
    assert file.is_file() and f"notebooks/results/{file.name}" in README, remedy
    assert file.read_bytes() in figures(read(path)), f"the README shows a figure that the notebook does not have any more; {remedy}"
    assert file.stat().st_size < 150_000, f"{file.name} is too large for a page: choose another figure"


def test_readme_commands_name_what_exists():
    commands = "\n".join(re.findall(r"```\w*\n(.*?)```", README, re.S)) + "\n".join(re.findall(r"`([^`\n]+)`", README))
    modules = [name.replace(".", "/") for name in re.findall(r"-m (helpers(?:\.\w+)+)", commands)]
    assert modules and [name for name in modules if not (ROOT / f"{name}.py").is_file()] == []
    assert [name for name in re.findall(r"(?:notebooks|helpers)/[\w/]*\.\w+", commands) if not (ROOT / name).exists()] == []
    for code in re.findall(r"-c \"([^\"]+)\"", commands):
        for module, name in re.findall(r"(\w+)\.(\w+)\(", code):
            assert f"def {name}(" in (ROOT / "helpers" / f"{module}.py").read_text(encoding="utf-8")
    unix = [line for line in commands.splitlines() if line.startswith("test -x .venv/bin/pip || python3 -m venv .venv && ")]
    assert len(unix) == 2 and unix[0].endswith(" notebooks/00_start_here.ipynb") and unix[1].endswith(" -m pytest")
    assert all(" -r requirements.txt && " in line for line in unix)


@pytest.mark.skipif(os.name == "nt", reason="the script is bash")
def test_continuous_integration_runs_the_readme_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    pattern = re.search(r"grep -m 1 -E '([^']+)' README\.md", script.read_text(encoding="utf-8")).group(1)
    assert len([line for line in README.splitlines() if re.search(pattern, line)]) == 1
