"""What the tests of pages share: a shell that displays, and kernels that run cells."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nbclient
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """An IPython shell in this process: without one, nothing displayed is caught."""
    config = Config()
    config.HistoryManager.enabled = False
    yield InteractiveShell.instance(config=config)
    InteractiveShell.clear_instance()


@pytest.fixture
def run_cells():
    """Run cells in a real kernel, as Jupyter does; -> the outputs of the last one.

    A cell that fails ends the run.
    """

    def run(*sources: str) -> list[nbformat.NotebookNode]:
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        notebook = nbformat.v4.new_notebook(cells=cells)
        resources = {"metadata": {"path": str(ROOT)}}
        client = nbclient.NotebookClient(
            notebook, kernel_name="python3", timeout=120, resources=resources
        )
        # the outputs hold what the reader sees of it
        with suppress(CellExecutionError):
            client.execute()
        return cells[-1].outputs

    return run
