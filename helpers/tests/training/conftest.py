"""A small text, its corpus, and trainings from a shell."""

from pathlib import Path

from helpers.tests.builders import write_texts
from helpers.tests.training.small_runs import Bits, Shell
from helpers.training import corpus as text

import pytest


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder of 40 small text files."""
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture
def corpus(texts) -> text.Corpus:
    """A corpus of its own for each test, so that its methods may be replaced."""
    return text.load(texts, 300)


@pytest.fixture(scope="session")
def shell(tmp_path_factory, texts) -> Shell:
    """Trainings from a shell."""
    return Shell(tmp_path_factory.mktemp("shell"), texts)


@pytest.fixture(scope="session")
def never_stopped(shell) -> Bits:
    """What the shell's run ends with when nothing happens to it."""
    out = shell.folder / "whole"
    code, printed = shell.finish(out)
    assert code == 0, printed
    return Bits(out)
