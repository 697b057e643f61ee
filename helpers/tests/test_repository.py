"""What holds for the repository as a whole: its top level, requirements, README, CI."""

import importlib.metadata
import os
import re
import subprocess
from collections.abc import Iterator

from helpers.tests import reading
from helpers.tests.reading import HELPERS, NOTEBOOKS, RESULTS, ROOT

import pytest

README = (ROOT / "README.md").read_text(encoding="utf-8")

# ----------------------------------------------------------- top level and requirements


def test_top_level_shows_four_things():
    top = {path.relative_to(ROOT).parts[0] for path in reading.project_files()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible == {"README.md", "requirements.txt", "notebooks", "helpers"}


def project_texts() -> Iterator[tuple[str, str]]:
    """(path, text) of the project's text files; notebooks have tests of their own."""
    for path in reading.project_files():
        if path.suffix in (".ipynb", ".png"):
            continue
        name = path.relative_to(ROOT).as_posix()
        yield name, path.read_text(encoding="utf-8")


def test_no_file_names_a_place_on_a_machine():
    found = []
    for name, text in project_texts():
        for match in reading.MACHINE_PATH.finditer(text):
            found.append((name, match.group()))
    assert found == []


def test_packages_come_from_public_places():
    public = ("download.pytorch.org",)
    option = re.compile(
        r"(?:index-url|find-links|trusted-host)[ =]+(?:\w+://)?([^\s/]+)"
    )
    found = []
    for name, text in project_texts():
        for host in option.findall(text):
            if host not in public and not name.endswith("test_repository.py"):
                found.append((name, host))
    assert found == []


REQUIREMENTS = [ROOT / "requirements.txt", HELPERS / "tests" / "requirements.txt"]


@pytest.mark.parametrize("path", REQUIREMENTS, ids=["notebooks", "tests"])
def test_requirements_are_pinned_with_a_reason_and_installed(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith(("#", "-r "))]
    assert pins
    for line in pins:
        form = re.fullmatch(r"([\w-]+)==([\w.]+) +# .+", line)
        assert form, f"{line!r}: write name==version  # reason"
        name, version = form.groups()
        installed = importlib.metadata.version(name).split("+")[0]
        assert installed == version, f"{name} {installed} is installed"


def test_the_tests_need_what_the_notebooks_need_too():
    text = REQUIREMENTS[1].read_text(encoding="utf-8")
    assert "-r ../../requirements.txt" in text.splitlines()


# ------------------------------------------------------------------------------- README


def test_readme_is_finished_and_names_every_notebook():
    assert re.findall(r"\{\w+\}", README) == []
    names = [path.name for path in NOTEBOOKS]
    assert [name for name in names if f"(notebooks/{name})" not in README] == []


def test_readme_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    links += re.findall(r"(?:src|href)=\"([^\"]+)\"", README)
    anchors = set()
    for title in re.findall(r"^#+ (.+)$", README, re.M):
        words = re.sub(r"[^\w -]", "", title.lower())
        anchors.add("#" + words.replace(" ", "-"))
    local = {link for link in links if not link.startswith("https://")} - anchors
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_readme_picture_is_a_figure_of_the_notebook(path):
    number = path.stem[:2]
    file = RESULTS / f"{number}.png"
    remedy = (
        "the README must show a figure that the notebook has; this takes the first: "
        "python -c 'from helpers.tests.reading import take_picture; "
        f'take_picture("{number}", 0)\''
    )
    assert file.is_file(), remedy
    assert f"notebooks/results/{file.name}" in README, remedy
    assert file.read_bytes() in reading.figures(reading.read(path)), remedy
    assert file.stat().st_size < 150_000, f"{file.name} is too large for a page"


def readme_code() -> str:
    """Code blocks and inline code of the README."""
    blocks = re.findall(r"```\w*\n(.*?)```", README, re.S)
    inline = re.findall(r"`([^`\n]+)`", README)
    return "\n".join(blocks + inline)


def can_be_run(module: str) -> bool:
    """Whether `python -m module` finds something to run."""
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_readme_names_what_exists():
    code = readme_code()
    commands = re.findall(r"-m (helpers(?:\.\w+)+)", code)
    assert commands
    assert [module for module in commands if not can_be_run(module)] == []
    files = re.findall(r"(?:notebooks|helpers|\.github)/[\w/]*\.?\w+", code)
    generic = {"notebooks/results/NAME"}
    missing = [name for name in set(files) - generic if not (ROOT / name).exists()]
    assert missing == []


def readme_commands() -> list[str]:
    """The README's blocks that make an environment and do something in it."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.S | re.M)
    begin = "test -x .venv/bin/pip || python3 -m venv .venv && "
    return [block for block in blocks if block.startswith(begin)]


def test_readme_has_two_commands():
    [start, test] = readme_commands()
    assert " -r requirements.txt && " in start
    assert "--ServerApp.root_dir=." in start, "or links out of notebooks/ are dead"
    assert start.endswith("/lab/tree/notebooks/00_start_here.ipynb\n")
    assert " -r helpers/tests/requirements.txt && " in test
    assert test.endswith(" -m pytest\n")


def test_readme_commands_need_no_scrolling():
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.S | re.M)
    first = README.index("## Beyond one machine")
    before = [block for block in blocks if README.index(block) < first]
    lines = [line for block in before for line in block.splitlines()]
    assert [line for line in lines if len(line) > 90] == []


def test_readme_pictures_are_seen_on_a_narrow_page():
    # in a table of several columns a page of 900 px leaves them 31 px
    tables = [line for line in README.splitlines() if line.startswith("|")]
    assert [line for line in tables if "<img" in line] == []
    widths = [int(width) for width in re.findall(r'<img [^>]*width="(\d+)"', README)]
    assert len(widths) == len(NOTEBOOKS) and min(widths) >= 500


def test_readme_names_the_licence():
    assert "MIT" in README
    text = (ROOT / ".github" / "LICENSE").read_text(encoding="utf-8")
    assert text.startswith("MIT License\n")


# --------------------------------------------------------------- continuous integration


@pytest.mark.skipif(os.name == "nt", reason="the script is bash")
def test_continuous_integration_runs_the_readme_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    program = re.search(r"awk '([^']+)' README\.md", text).group(1)
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(
        encoding="utf-8"
    )
    assert program in workflow
    command = ["awk", program, "README.md"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    [_, test] = readme_commands()
    assert found == test


CHECKS = ("ruff format --check .", "ruff check helpers", "mypy")


def test_the_same_checks_run_everywhere():
    places = (".ci/run", ".github/workflows/tests.yml", ".github/CONTRIBUTING.md")
    for place in places:
        text = (ROOT / place).read_text(encoding="utf-8")
        assert [check for check in CHECKS if check not in text] == [], place
        assert "-m helpers.evidence.results --check" in text, place
