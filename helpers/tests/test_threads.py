"""How threads wait and memory comes: `helpers` says so before torch is loaded."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAY = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"


def run(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter at the repository's root, without the variable."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | more,
        capture_output=True,
        text=True,
        check=True,
    )


def test_the_first_import_of_helpers_sets_the_spin_count_before_torch():
    code = "import helpers.checks, sys; assert 'torch' not in sys.modules; " + SAY
    assert run(code).stdout.strip() == "1000"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="large pages are Linux's")
def test_large_tensors_lie_in_large_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text(encoding="ascii"):
        pytest.skip("this kernel gives none")
    code = (
        "import helpers, torch; from resource import *; "
        "before = getrusage(RUSAGE_SELF).ru_minflt; x = torch.ones(2**26); "
        "print(getrusage(RUSAGE_SELF).ru_minflt - before)"
    )
    # 256 MB are 65,536 small pages
    assert int(run(code).stdout) < 10_000
    assert int(run(code, THP_MEM_ALLOC_ENABLE="0").stdout) > 30_000


def test_a_value_that_somebody_chose_stays():
    assert run("import helpers; " + SAY, GOMP_SPINCOUNT="7").stdout.strip() == "7"


@pytest.mark.slow
def test_helpers_warns_when_torch_was_there_first():
    assert "Import from helpers first" in run("import torch, helpers").stderr
    assert run("import helpers, torch").stderr == ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_helpers_before_anything_that_loads_torch(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    names = []
    for node in ast.parse(code[0]).body:
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module.split(".")[0])
    loads_torch = [names.index(n) for n in ("torch", "transformers") if n in names]
    assert "helpers" in names
    assert all(names.index("helpers") < place for place in loads_torch)
