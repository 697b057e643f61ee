"""Every notebook runs with small parameters; those in git are whole and readable."""

import re
import subprocess
import sys
from pathlib import Path

from helpers.evidence.facts import FACTS
from helpers.evidence.results import REWRITTEN
from helpers.tests import reading
from helpers.tests.reading import NOTEBOOKS, RESULTS, ROOT

import nbformat
import papermill
import pytest

# What papermill puts in place of the `parameters` cell's values, so that each notebook
# runs in seconds.
SMALL: dict[str, dict] = {
    "00_start_here": {
        "num_hidden_layers": 2,
        "steps": 4,
        "batch_size": 4,
        "length": 64,
        "max_bytes": 1_000_000,
        "valid_sequences": 4,
    },
    "01_mixture_of_experts": {
        "vocab_size": 512,
        "steps": 6,
        "batch_size": 4,
        "length": 64,
        "valid_every": 3,
        "probe_sequences": 4,
        "probe_documents": 2,
    },
    "02_latent_attention": {
        "steps": 6,
        "batch_size": 2,
        "length": 32,
        "vocab_size": 300,
        "valid_tokens": 2048,
        "contexts": [64, 128],
        "repeats": 2,
        "also_train": ["sweep", "controls", "long"],
    },
    "03_multi_token_prediction": {
        "vocab_size": 512,
        "steps": 6,
        "batch_size": 4,
        "length": 64,
        "n_prompts": 3,
        "new_tokens": 8,
        "valid_tokens": 2048,
        "repeats": 2,
        "draws": 2000,
    },
    "04_pretraining": {
        "vocab_size": 512,
        "max_bytes": 1_000_000,
        "steps": 6,
        "batch_size": 4,
        "length": 64,
        "valid_every": 3,
        "valid_sequences": 4,
        "resume_steps": 4,
        "resume_hidden": 32,
        "samples": 4,
        "new_tokens": 12,
        "matmul_size": 256,
    },
    "05_fp8": {
        "vocab_size": 512,
        "max_bytes": 1_000_000,
        "steps": 4,
        "batch_size": 2,
        "length": 64,
        "valid_every": 2,
        "valid_sequences": 4,
        "side": 256,
        "inner": 512,
        "outlier_points": 4,
    },
    "06_long_context": {
        "vocab_size": 300,
        "max_bytes": 1_000_000,
        "hidden_size": 32,
        "names": 4,
        "values": 4,
        "window": 32,
        "base_steps": 4,
        "batch_size": 4,
        "ratios": [2, 2],
        "phase_steps": 2,
        "phase_tokens": 128,
        "map_lengths": [32, 64, 128],
        "map_documents": 2,
        "run_controls": True,
        "cache_contexts": [256, 512],
        "cache_megabytes": 4,
        "cache_seconds": 0.01,
    },
    "07_h800_cluster": {
        "train_steps": 4,
        "batch_size": 4,
        "length": 64,
        "vocab_size": 512,
        "probe_sequences": 4,
        "tokens": 2048,
        "random_cases": 3,
        "layers": 2,
        "real_steps": 3,
        "real_batch": 4,
        "real_length": 32,
    },
    "08_r1_zero": {
        "corpus_tokens": 20_000,
        "corpus_documents": 300,
        "base_steps": 8,
        "rl_steps": 2,
        "questions": 4,
        "group": 4,
        "max_new_tokens": 40,
        "control_steps": 2,
        "run_controls": True,
        "test_problems": 16,
        "passk_problems": 4,
        "passk_samples": 4,
        "sweep_problems": 8,
        "sample_steps": [0, 1],
    },
    "09_r1": {
        "corpus_tokens": 20_000,
        "base_steps": 8,
        "cold_traces": 24,
        "rl_steps": 2,
        "final_steps": 2,
        "questions": 4,
        "group": 4,
        "max_new_tokens": 40,
        "sample_questions": 4,
        "samples": 4,
        "fact_documents": 8,
        "v3_questions": 4,
        "v3_tokens": 2000,
        "test_problems": 16,
        "parity_prompts": 2,
    },
    "10_distillation": {
        "corpus_tokens": 20_000,
        "base_steps": 8,
        "cold_traces": 24,
        "teacher_steps": 2,
        "small": [32, 1],
        "large": [48, 2],
        "student_tokens": 20_000,
        "control_tokens": 10_000,
        "run_control": True,
        "trace_questions": 8,
        "trace_samples": 2,
        "rl_steps": 2,
        "questions": 4,
        "group": 4,
        "max_new_tokens": 40,
        "watch_every": 1,
        "watch_questions": 4,
        "test_problems": 16,
    },
    "11_training_cost": {"draws": 500},
    "12_claims_checked": {"longest": 160},
}


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


# ------------------------------------------------------------ run with small parameters


def recorded_files() -> dict[str, bytes]:
    """What lies in notebooks/results."""
    files = [path for path in RESULTS.iterdir() if path.is_file()]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.slow
@each_notebook
def test_runs_with_small_parameters(path, tmp_path, lab_home):
    known = reading.parameter_names(reading.read(path))
    unknown = set(SMALL[path.stem]) - known
    assert not unknown, f"the parameters cell of {path.stem} does not set {unknown}"
    before = recorded_files()
    out = tmp_path / path.name
    failure = None
    try:
        papermill.execute_notebook(
            path,
            out,
            SMALL[path.stem],
            kernel_name="python3",
            cwd=path.parent,
            progress_bar=False,
            start_timeout=120,
            execution_timeout=600,
        )
    except papermill.PapermillExecutionError as error:
        failure = error
    if failure is not None:
        pytest.fail(f"{path.name}: {failure}", pytrace=False)
    assert reading.failures(reading.read(out)) == []
    remedy = "a test run must not write into notebooks/results; ask results.record"
    assert recorded_files() == before, remedy


def test_every_notebook_is_known():
    names = {path.stem for path in NOTEBOOKS}
    assert names
    assert set(SMALL) == names, "SMALL has sizes and steps that run in seconds for each"
    assert set(REWRITTEN) <= names


# ------------------------------------------------------------------- as they lie in git


@pytest.mark.slow
@each_notebook
def test_was_run_from_top_to_bottom_without_problems(path):
    notebook = reading.read(path)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in reading.code_cells(notebook)]
    in_order = list(range(1, len(counts) + 1))
    assert counts == in_order, "restart the kernel and run all cells"
    assert reading.failures(notebook) == []
    assert notebook.metadata.kernelspec.name == "python3"
    size = len(nbformat.writes(notebook))
    assert size < 3e6, "too large for git: fewer or smaller figures"


@each_notebook
def test_begins_with_its_title_and_asks_for_a_prediction(path):
    cells = reading.read(path).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert any("Predict first" in source for source in prose)


@each_notebook
def test_has_exercises_whose_solutions_are_folded(path):
    cells = reading.code_cells(reading.read(path))
    solutions = [cell for cell in cells if "solution" in cell.metadata.get("tags", [])]
    assert len(solutions) >= 2, "two exercises at least, each with a solution that ran"
    for cell in solutions:
        folded = cell.metadata.get("jupyter", {}).get("source_hidden")
        assert folded is True, f"{cell.id}: fold the solution"


@each_notebook
def test_every_figure_has_its_text(path):
    notebook = reading.read(path)
    assert reading.figures(notebook), "no figure"
    for where, output in reading.all_outputs(notebook):
        for picture in reading.pictures(output):
            remedy = f"{where}: no alt text; show the figure by figures.show"
            assert picture.alt.strip(), remedy


@each_notebook
def test_cells_have_readable_ids_and_one_holds_the_parameters(path):
    notebook = reading.read(path)
    ids = [cell.id for cell in notebook.cells]
    slug = re.compile(r"\d{2,3}-(?=.*[A-Za-z])[A-Za-z0-9_-]+")
    assert [name for name in ids if not slug.fullmatch(name)] == []
    assert len(set(ids)) == len(ids)
    names = reading.parameter_names(notebook)
    assert names, "no cell tagged `parameters` that sets anything"


@each_notebook
def test_holds_no_path_of_a_machine(path):
    notebook = reading.read(path)
    seen = [cell.source for cell in notebook.cells]
    for _, output in reading.all_outputs(notebook):
        seen += [text for _, text in reading.texts(output)]
    matches = [reading.MACHINE_PATH.search(text) for text in seen]
    assert [match.group() for match in matches if match] == []


@each_notebook
def test_widgets_come_back_without_a_kernel(path):
    notebook = reading.read(path)
    state_type = "application/vnd.jupyter.widget-state+json"
    view_type = "application/vnd.jupyter.widget-view+json"
    kinds = notebook.metadata.get("widgets", {})
    assert set(kinds) <= {state_type}
    for saved in kinds.values():
        assert saved["version_major"] == 2
        assert isinstance(saved["version_minor"], int)
    models = reading.saved_widgets(notebook)
    for name, model in models.items():
        whole = {"model_name", "model_module", "state"} <= set(model)
        assert whole, f"widget model {name} is not whole"
    for output in reading.outputs(notebook):
        view = output.get("data", {}).get(view_type)
        assert view is None or view["model_id"] in models


# --------------------------------------------------------------------------- their code


def test_every_figure_that_is_quoted_has_its_fact():
    sources = {path.name: reading.code_of(reading.read(path)) for path in NOTEBOOKS}
    for name, path in reading.modules().items():
        sources[name] = path.read_text(encoding="utf-8")
    unknown = []
    for name, source in sources.items():
        quoted = re.findall(r"\b(?:fact\(|FACTS\[)\s*[\"']([^\"'{}]+)[\"']", source)
        if re.search(r"def value\(key\):\s+return fact\(key\)", source):
            quoted += re.findall(r"\bvalue\(\s*[\"']([^\"'{}]+)[\"']", source)
        unknown += [(name, key) for key in quoted if key not in FACTS]
    assert unknown == []


def ruff(*arguments: object) -> subprocess.CompletedProcess:
    """Run ruff in the repository."""
    command = [sys.executable, "-m", "ruff", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")


def rewritten() -> list[Path]:
    """The notebooks of the second edition."""
    return [path for path in NOTEBOOKS if path.stem in REWRITTEN]


def test_notebooks_of_the_second_edition_pass_the_linter():
    # without a path ruff would take the whole folder
    if rewritten():
        found = ruff("check", "--no-cache", *rewritten())
        assert found.returncode == 0, found.stdout


def test_notebooks_are_formatted():
    found = ruff("format", "--check", "--no-cache", *NOTEBOOKS)
    assert found.returncode == 0, found.stdout + found.stderr
