"""What is recorded, what it is worth today, and how it is recorded anew."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass

from helpers.evidence import rerecord, results, stored
from helpers.evidence.stored import Judge
from helpers.training import runs
from helpers.training.source import REPOSITORY, Sources

import nbformat
import pytest


@dataclass
class Size:
    layers: int
    rate: float = 0.1


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path))


# Our sources are read once for all tests, not at each record.
SOURCES = Sources()


@pytest.fixture(autouse=True)
def sources_are_read_once(monkeypatch):
    monkeypatch.setattr(stored, "Sources", lambda: SOURCES)


def a_history(code=None, **more):
    """What a training leaves behind, as made by today's code."""
    code = code or SOURCES.code_hash("helpers.training.pretrain")
    provenance = {"code": code, "witness": [7.6, 7.5, 7.4]} | more
    return {"loss": [7.6, 7.5, 7.4, 7.0], "provenance": provenance}


def change(name, **changes):
    """Rewrite parts of a recorded seed's provenance, as if other code had made it."""
    path = stored.files_of(name).main
    content = json.loads(path.read_text(encoding="utf-8"))
    for seed, parts in changes.items():
        content["provenance"][seed.removeprefix("seed")] |= parts
    path.write_text(json.dumps(content), encoding="utf-8")


OTHER_EVALUATION = {
    "evaluation": {"code": "0" * 12, "modules": ["helpers.v3.generate"]}
}


def first_edition(name, seeds):
    """A result file as the first edition wrote it."""
    path = stored.files_of(name).main
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "parameters": {"steps": 10},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "code": "5ec02d74d26b"},
        "seeds": {str(seed): {"loss": seed} for seed in seeds},
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# -------------------------------------------------------------------- record, recorded


def test_results_are_not_in_the_cache(tmp_path):
    path = results.record("kept", {}, 0, {"loss": 1})
    assert path == tmp_path / "notebooks" / "results" / "kept.json"
    assert results.results_dir() == path.parent
    assert not path.is_relative_to(runs.cache_dir())


def test_record_keeps_other_seeds_and_replaces_its_own():
    parameters = {"steps": 10, "size": Size(2), "arms": ("a", "b")}
    assert results.recorded("run", parameters) == {}
    for seed in (10, 2, 0):
        data = {"loss": [seed, 1.0]}
        path = results.record("run", parameters, seed, data, runs={})
    results.record("run", parameters, 2, {"loss": [7]}, runs={})
    assert results.recorded("run", parameters) == {
        0: {"loss": [0, 1.0]},
        2: {"loss": [7]},
        10: {"loss": [10, 1.0]},
    }
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(found) == ["name", "parameters", "versions", "seeds", "provenance"]
    assert list(found["seeds"]) == list(found["provenance"]) == ["0", "2", "10"]
    size = {"layers": 2, "rate": 0.1}
    assert found["parameters"] == {"steps": 10, "size": size, "arms": ["a", "b"]}
    assert set(found["versions"]) == {"python", "torch"}


def test_record_is_stable_and_rounds_results_but_not_parameters():
    parameters = {"rate": 0.123456789}
    losses = [1.23456789, 1.23456789e-9, 123456789, 2.0]
    path = results.record("run", parameters, 0, {"loss": losses, "note": "é"})
    first = path.read_bytes()
    rounded = {"loss": [1.23457, 1.23457e-9, 123456789, 2.0], "note": "é"}
    assert results.recorded("run", parameters) == {0: rounded}
    results.record("run", parameters, 0, rounded)
    assert path.read_bytes() == first
    assert first.endswith(b"}\n")
    assert b'\n "name"' in first
    # no temporary file is left
    assert [found.name for found in path.parent.iterdir()] == ["run.json"]


def test_other_parameters_never_touch_the_recorded_file():
    path = results.record("run", {"steps": 1000}, 0, {"loss": 1})
    first = path.read_bytes()
    other = results.record("run", {"steps": 10}, 0, {"loss": 2})
    results.record("run", {"steps": 10}, 1, {"loss": 3})
    assert other.name == "run.other.json"
    assert path.read_bytes() == first
    assert results.recorded("run", {"steps": 10}) == {0: {"loss": 2}, 1: {"loss": 3}}
    assert results.recorded("run", {"steps": 1000}) == {0: {"loss": 1}}
    results.record("run", {"steps": 20}, 5, {"loss": 4})
    assert path.read_bytes() == first
    assert results.recorded("run", {"steps": 10}) == {}
    assert results.recorded("run", {"steps": 20}) == {5: {"loss": 4}}


CANNOT_BE_RECORDED = [
    (math.nan, ValueError),
    (-math.inf, ValueError),
    (object(), TypeError),
]


@pytest.mark.parametrize(("bad", "error"), CANNOT_BE_RECORDED)
def test_a_result_that_cannot_be_recorded_leaves_the_file_alone(bad, error):
    path = results.record("run", {}, 0, {"loss": 1})
    first = path.read_bytes()
    with pytest.raises(error):
        results.record("run", {}, 1, {"loss": [1, bad]})
    assert path.read_bytes() == first
    assert [found.name for found in path.parent.iterdir()] == ["run.json"]


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="V3LAB_HOME"):
        results.record("run", {}, 0, {"loss": 1})


def test_a_file_that_holds_no_result_is_named():
    path = results.record("run", {}, 0, {"loss": 1})
    for text in ("{", "[]", "{}", '{"name": "run"}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="run.json holds no recorded result"):
            results.recorded("run", {})


def test_recording_does_not_wait_for_torch_or_papermill():
    code = (
        "import sys, helpers.evidence.results\n"
        "print({'torch', 'papermill', 'nbformat', 'pandas'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert found.stdout.strip() == "set()"


# ------------------------------------------------------------------------- provenance


def provenance_of(name, seed=0):
    return stored.read(stored.files_of(name).main).provenance[seed]


def test_a_seed_keeps_the_code_of_its_runs_and_of_its_evaluation():
    results.record("run", {}, 0, {"loss": 1}, runs={"MLA": a_history()})
    found = provenance_of("run")
    assert found["runs"] == {"MLA": a_history()["provenance"]}
    modules = found["evaluation"]["modules"]
    assert found["evaluation"]["code"] == SOURCES.hash_of(modules)
    # what trained answers with its witness; the rest evaluated
    assert "helpers.training.pretrain" not in modules
    assert "helpers.v3.model" not in modules
    assert "helpers.v3.generate" in modules


def test_a_first_edition_notebook_records_nothing_of_its_code():
    results.record("run", {}, 0, {"loss": 1}, runs={})
    results.record("run", {}, 0, {"loss": 2})
    assert stored.read(stored.files_of("run").main).provenance == {}
    assert results.recorded("run", {}) == {0: {"loss": 2}}


def test_without_runs_all_code_is_evaluation():
    results.record("run", {}, 0, {"loss": 1}, runs={})
    modules = provenance_of("run")["evaluation"]["modules"]
    assert {"helpers.v3.model", "helpers.training.pretrain"} <= set(modules)
    assert not [name for name in modules if not name.startswith("helpers.")]
    assert "helpers.evidence.results" not in modules


def test_a_notebooks_own_imports_decide_what_evaluates(tmp_path):
    cells = [
        "%matplotlib inline\nimport sys",
        "if sys:\n    !ls\nfrom helpers import v3",
    ]
    cells.append("from helpers.v3.rope import rotate\nfrom helpers.page import figures")
    write_notebook(tmp_path / "02_rope.ipynb", cells=cells)
    found = Judge().provenance("02_rope_ablations", {}, notebooks=tmp_path)
    modules = found["evaluation"]["modules"]
    assert "helpers.v3.rope" in modules
    assert "helpers.training.pretrain" not in modules


def test_a_result_belongs_to_the_notebook_that_it_is_named_after(tmp_path):
    for name in ("09_r1", "09_r1_more", "08_r1_zero"):
        write_notebook(tmp_path / f"{name}.ipynb")
    owner = {
        "09_r1": "09_r1",
        "09_r1_ablations": "09_r1",
        "09_r1_more_of_it": "09_r1_more",
        "09_r10": None,
    }
    for name, notebook in owner.items():
        found = stored.notebook_of(name, tmp_path)
        assert (found.stem if found else None) == notebook


def test_a_history_without_provenance_is_refused():
    with pytest.raises(ValueError, match=r"runs\['MLA'\].*provenance"):
        results.record("run", {}, 0, {}, runs={"MLA": {"loss": [1]}})
    assert results.recorded("run", {}) == {}


def verdicts():
    return {line.result: (line.seeds, line.verdict) for line in results.listing()}


def test_every_verdict_is_listed():
    old = a_history("0" * 12)
    compared = a_history("0" * 12, compared=a_history()["provenance"]["code"])
    results.record("a", {}, 0, {}, runs={"x": a_history()})
    results.record("b", {}, 0, {}, runs={"x": a_history(), "y": compared})
    results.record("c", {}, 0, {}, runs={"x": compared, "y": old})
    results.record("d", {}, 0, {}, runs={"x": a_history()})
    change("d", seed0=OTHER_EVALUATION)
    first_edition("e", seeds=[2, 1])
    results.record("d", {"steps": 1}, 0, {})  # d.other.json is nobody's evidence
    assert verdicts() == {
        "a": ([0], "current"),
        "b": ([0], "code changed, numbers same"),
        "c": ([0], "code changed, not compared"),
        "d": ([0], "stale"),
        "e": ([1, 2], "first edition: no provenance, stale"),
    }
    assert [line.edition for line in results.listing()] == ["second"] * 4 + ["first"]


@pytest.mark.slow
def test_changed_training_code_is_not_stale_but_changed_evaluation_is(monkeypatch):
    """The same file judged with sources in which one module differs."""
    results.record("run", {}, 0, {}, runs={"x": a_history()})
    provenance = provenance_of("run")

    def verdict_with(module):
        sources = Sources()
        monkeypatch.setitem(sources._forms, module, "changed")
        return Judge(sources).verdict(provenance)

    assert Judge().verdict(provenance) == "current"
    assert verdict_with("helpers.training.loop") == "code changed, not compared"
    assert verdict_with("helpers.v3.rope") == "code changed, not compared"
    assert verdict_with("helpers.v3.generate") == "stale"


def test_seeds_of_one_file_are_listed_by_what_they_are_worth(capsys):
    for seed in (0, 1, 2):
        results.record("run", {}, seed, {"loss": seed}, runs={})
    change("run", seed1=OTHER_EVALUATION)
    assert results.main([]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed] == [
        ["result", "seeds", "edition", "verdict"],
        ["run", "0,", "2", "second", "current"],
        ["run", "1", "second", "stale"],
    ]


def test_stale_seeds_are_left_out_with_one_line(capsys):
    for seed in (0, 1, 2):
        results.record("run", {}, seed, {"loss": seed}, runs={})
    assert len(results.recorded("run", {})) == 3
    assert capsys.readouterr().out == ""
    change("run", seed1=OTHER_EVALUATION, seed2=OTHER_EVALUATION)
    assert results.recorded("run", {}) == {0: {"loss": 0}}
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "run: left out as stale" in printed and "seeds 1, 2" in printed


def test_runs_that_were_not_compared_are_still_drawn(capsys):
    results.record("run", {}, 0, {"loss": 1}, runs={"x": a_history("0" * 12)})
    assert results.recorded("run", {}) == {0: {"loss": 1}}
    assert capsys.readouterr().out == ""


def test_results_of_the_first_edition_are_drawn_and_listed_as_stale(capsys):
    path = first_edition("run", seeds=[0, 1])
    before = path.read_bytes()
    assert results.recorded("run", {"steps": 10}) == {0: {"loss": 0}, 1: {"loss": 1}}
    assert capsys.readouterr().out == ""
    assert path.read_bytes() == before
    results.record("run", {"steps": 10}, 1, {"loss": 5}, runs={})
    assert results.recorded("run", {"steps": 10}) == {0: {"loss": 0}, 1: {"loss": 5}}
    assert [line[1:] for line in results.listing()] == [
        ([0], "first", "first edition: no provenance, stale"),
        ([1], "second", "current"),
    ]


def test_check_fails_for_rewritten_notebooks_only(monkeypatch, capsys):
    first_edition("00_start_here", seeds=[0])
    first_edition("08_r1_zero_controls", seeds=[0])
    results.record("01_mixture_of_experts", {}, 0, {}, runs={})
    assert results.check() == results.main(["--check"]) == 0
    monkeypatch.setattr(results, "REWRITTEN", ("01_mixture_of_experts",))
    assert results.check() == 0
    assert capsys.readouterr().out == ""
    rewritten = ("01_mixture_of_experts", "08_r1_zero")
    monkeypatch.setattr(results, "REWRITTEN", rewritten)
    assert results.main(["--check"]) == 1
    assert "08_r1_zero_controls, seed 0: first edition" in capsys.readouterr().out
    change("01_mixture_of_experts", seed0=OTHER_EVALUATION)
    assert results.check() == 1
    assert "01_mixture_of_experts, seed 0: stale" in capsys.readouterr().out


def test_no_rewritten_notebook_rests_on_a_stale_result(monkeypatch):
    """The committed results. What fails: `--record` the notebook that is printed."""
    monkeypatch.delenv("V3LAB_HOME")
    for name in results.REWRITTEN:
        assert (REPOSITORY / "notebooks" / f"{name}.ipynb").is_file()
    assert results.check() == 0


# ---------------------------------------------------------------- arms of one seed


def test_arms_are_recorded_one_at_a_time():
    def one(arm, number, **more):
        data = {"arms": {arm: number}, "last": arm}
        return results.record("run", {}, 0, data, {arm: a_history()}, **more)

    one("a", 1, keep_arms=True)
    one("b", 2, keep_arms=True)
    found = results.recorded("run", {})
    assert found == {0: {"arms": {"a": 1, "b": 2}, "last": "b"}}
    assert list(provenance_of("run")["runs"]) == ["a", "b"]
    one("a", 3, keep_arms=True)
    assert results.recorded("run", {})[0]["arms"] == {"a": 3, "b": 2}
    # an arm that rests on other code does not stay
    stale = {"runs": {"b": a_history("0" * 12)["provenance"]}}
    change("run", seed0=stale)
    one("a", 4, keep_arms=True)
    assert results.recorded("run", {})[0]["arms"] == {"a": 4}
    one("b", 5)
    assert results.recorded("run", {})[0]["arms"] == {"b": 5}


def test_arms_with_and_without_runs_are_evaluated_by_the_code_of_both():
    results.record("run", {}, 0, {"arms": {"a": 1}}, keep_arms=True, runs={})
    runs_of_b = {"b": a_history()}
    results.record("run", {}, 0, {"arms": {"b": 1}}, runs_of_b, keep_arms=True)
    found = provenance_of("run")
    assert "helpers.training.pretrain" in found["evaluation"]["modules"]
    assert Judge().verdict(found) == "current"


# ---------------------------------------------------------------------- recording anew

PARAMETERS = "seeds = [0]  # live\nsteps = 3  # of training\n"
RECORD = """
import sys
sys.path.insert(0, {root!r})
from helpers.evidence import results
for seed in seeds:
    data = {{"loss": seed + steps}}
    results.record("tiny", {{"steps": steps}}, seed, data, runs={{}})
"""
RECORD_ARMS = """
import sys
sys.path.insert(0, {root!r})
from helpers.evidence import results
for seed in seeds:
    data = {{"arms": {{arm: seed for arm in arms}}}}
    results.record("tiny", {{"steps": steps}}, seed, data, keep_arms={keep}, runs={{}})
"""


def write_notebook(path, parameters=PARAMETERS, cells=()):
    notebook = nbformat.v4.new_notebook()
    first = nbformat.v4.new_code_cell(parameters)
    first.metadata["tags"] = ["parameters"]
    notebook.cells = [first, *map(nbformat.v4.new_code_cell, cells)]
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "notebooks"
    path.mkdir()
    return path


def steps_of_progress(capsys):
    """What was printed, without seconds."""
    lines = capsys.readouterr().out.splitlines()
    return [line.split(" in ")[0] for line in lines]


@pytest.mark.slow
def test_a_notebook_is_recorded_seed_by_seed_and_goes_on(folder, capsys):
    cell = RECORD.format(root=str(REPOSITORY))
    path = write_notebook(folder / "tiny.ipynb", cells=[cell])
    before = path.read_bytes()
    command = ["--record", "tiny", "--seeds", "0", "3"]
    assert results.main(command, folder) == 0
    assert results.recorded("tiny", {"steps": 3}) == {0: {"loss": 3}, 3: {"loss": 6}}
    assert steps_of_progress(capsys) == [
        "[1/2] tiny, seed 0: running",
        "[1/2] tiny, seed 0: done",
        "[2/2] tiny, seed 3: running",
        "[2/2] tiny, seed 3: done",
    ]
    assert path.read_bytes() == before
    assert sorted(found.name for found in folder.iterdir()) == ["results", "tiny.ipynb"]

    # what is up to date is not run again, what is stale is
    change("tiny", seed3=OTHER_EVALUATION)
    assert results.main(command, folder) == 0
    assert steps_of_progress(capsys) == [
        "[1/2] tiny, seed 0: up to date",
        "[2/2] tiny, seed 3: running",
        "[2/2] tiny, seed 3: done",
    ]
    assert set(results.recorded("tiny", {"steps": 3})) == {0, 3}


@pytest.mark.slow
def test_a_notebook_with_new_parameters_replaces_what_was_recorded(folder, capsys):
    results.record("tiny", {"steps": 2}, 0, {"loss": 9}, runs={})
    results.record("apart", {"steps": 2}, 0, {}, runs={})
    results.record("apart", {"steps": 9}, 0, {}, runs={})
    cell = RECORD.format(root=str(REPOSITORY))
    write_notebook(folder / "tiny.ipynb", cells=[cell])
    assert results.main(["--record", "tiny.ipynb", "--seeds", "1"], folder) == 0
    assert "tiny: the parameters are others than" in capsys.readouterr().out
    assert results.recorded("tiny", {"steps": 2}) == {}
    assert results.recorded("tiny", {"steps": 3}) == {1: {"loss": 4}}
    names = sorted(path.name for path in results.results_dir().iterdir())
    assert names == ["apart.json", "apart.other.json", "tiny.json"]


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False])
def test_arms_run_one_at_a_time(folder, capsys, keep):
    cell = RECORD_ARMS.format(root=str(REPOSITORY), keep=keep)
    parameters = PARAMETERS + "arms = ['MLA', 'GQA']\n"
    write_notebook(folder / "tiny.ipynb", parameters, [cell])
    command = ["--record", "tiny", "--seeds", "2"]
    assert results.main([*command, "--arm", "GQA"], folder) == 0
    assert steps_of_progress(capsys) == [
        "[1/1] tiny, seed 2, GQA: running",
        "[1/1] tiny, seed 2, GQA: done",
    ]
    code = results.main(command, folder)
    printed = capsys.readouterr()
    if keep:
        assert code == 0
        assert "[2/2] tiny, seed 2, GQA: up to date" in printed.out
        data = results.recorded("tiny", {"steps": 3})[2]
        assert data == {"arms": {"GQA": 2, "MLA": 2}}
    else:
        assert code == 1
        assert "keep_arms=True" in printed.err


@pytest.mark.slow
def test_the_first_failure_ends_it_with_the_last_lines_of_the_error(folder, capsys):
    failing = "if seeds == [1]:\n    raise RuntimeError('no experts left')"
    cells = [failing, RECORD.format(root=str(REPOSITORY))]
    write_notebook(folder / "tiny.ipynb", cells=cells)
    assert results.main(["--record", "tiny", "--seeds", "0", "1", "2"], folder) == 1
    printed = capsys.readouterr()
    assert "[1/3] tiny, seed 0: done" in printed.out
    assert "[3/3]" not in printed.out
    assert "tiny, seed 1: it failed" in printed.err
    assert printed.err.strip().endswith("RuntimeError: no experts left")
    assert "Traceback (most recent call last)" not in printed.err.splitlines()[0]
    assert list(results.recorded("tiny", {"steps": 3})) == [0]


@pytest.mark.slow
def test_a_notebook_that_records_nothing_is_an_error(folder, capsys):
    write_notebook(folder / "tiny.ipynb", cells=["1 + 1"])
    assert results.main(["--record", "tiny", "--seeds", "0"], folder) == 1
    assert "tiny.json has no such seed" in capsys.readouterr().err


RECORD_ALSO = """
import sys
sys.path.insert(0, {root!r})
from helpers.evidence import results
for seed in seeds:
    results.record("tiny", {{"steps": steps}}, seed, {{"loss": seed}}, runs={{}})
    for longer in also_train:
        results.record("tiny_" + longer, {{"steps": 9}}, seed, {{"loss": 0}}, runs={{}})
"""


@pytest.mark.slow
def test_further_trainings_run_for_seeds_that_are_up_to_date(folder, capsys):
    cell = RECORD_ALSO.format(root=str(REPOSITORY))
    path = folder / "tiny.ipynb"
    write_notebook(path, PARAMETERS + "also_train = []\n", [cell])
    command = ["--record", "tiny", "--seeds", "2"]
    assert results.main(command, folder) == 0
    assert results.main([*command, "--also", "long"], folder) == 0
    assert "[1/1] tiny, seed 2: running" in capsys.readouterr().out
    assert results.recorded("tiny_long", {"steps": 9}) == {2: {"loss": 0}}


WRONG = [
    (["--record", "tiny", "--also", "long"], PARAMETERS, "no further trainings"),
    (["--record", "nothing"], PARAMETERS, "notebook='nothing' cannot work"),
    (["--record", "tiny", "--arm", "MLA"], PARAMETERS, "no arms"),
    (
        ["--record", "tiny", "--arm", "MLP"],
        PARAMETERS + "arms = ['MLA', 'GQA']",
        "use one of MLA, GQA",
    ),
    (["--record", "tiny", "--seeds", "1"], "steps = 2", "no seeds"),
]


@pytest.mark.parametrize(("command", "parameters", "message"), WRONG)
def test_what_cannot_be_recorded_is_one_line(
    folder, capsys, command, parameters, message
):
    write_notebook(folder / "tiny.ipynb", parameters)
    assert results.main(command, folder) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_an_interrupt_says_how_to_go_on(folder, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    write_notebook(folder / "tiny.ipynb")
    monkeypatch.setattr(rerecord, "_run", interrupted)
    assert results.main(["--record", "tiny"], folder) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_parameters_are_read_where_they_are_written_out(tmp_path):
    text = "seeds = [0]\nlr = 3e-3  # rate\nwide = None\ntwice = 2 * lr\nname = 'é'\n"
    path = write_notebook(tmp_path / "a.ipynb", text)
    assert stored.defaults_of(path) == {
        "seeds": [0],
        "lr": 3e-3,
        "wide": None,
        "name": "é",
    }
