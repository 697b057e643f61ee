import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import store


@dataclass
class Size:
    layers: int
    rate: float = 0.1


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path))


def test_home_is_the_repository_without_the_variable(monkeypatch):
    monkeypatch.delenv("V3LAB_HOME")
    assert (store.home() / "helpers" / "store.py").is_file()


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), plain, max_size=4),
    st.randoms(),
)
def test_key_does_not_depend_on_the_order_of_parts(parts, random):
    names = list(parts)
    random.shuffle(names)
    assert store.key(**parts) == store.key(**{name: parts[name] for name in names})
    assert len(store.key(**parts)) == 16 and int(store.key(**parts), 16) >= 0


def test_key_is_the_same_in_another_process_and_differs_with_any_value():
    code = "from helpers import store; print(store.key(b=[1, 2.5], a='é'))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(store.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert other.strip() == store.key(a="é", b=[1, 2.5])
    assert (
        len(
            {
                store.key(a=value)
                for value in (1, 2, 1.5, "1", True, None, [1], {"b": 1})
            }
        )
        == 8
    )


def test_key_takes_dataclasses_at_any_depth():
    assert (
        store.key(size=Size(2))
        == store.key(size={"layers": 2, "rate": 0.1})
        != store.key(size=Size(3))
    )
    assert store.key(arms=[Size(2)]) == store.key(arms=[{"rate": 0.1, "layers": 2}])


@pytest.mark.parametrize(
    "bad",
    [
        {1, 2},
        object(),
        Size,
        math.nan,
        math.inf,
        b"x",
        Path("x"),
        [object()],
        {"x": {1}},
        {"x": 1, 2: 3},
    ],
)
def test_key_names_the_part_that_is_not_json(bad):
    with pytest.raises(TypeError, match="'wrong'"):
        store.key(fine=1, wrong=bad)


def test_checkpoint_dir_is_in_the_cache_which_holds_no_results():
    folder = store.checkpoint_dir("base", steps=3)
    assert (
        folder == store.cache_dir() / f"base-{store.key(steps=3)}"
        and not folder.exists()
    )
    assert not store.record("kept", {}, 0, {"loss": 1}).is_relative_to(
        store.cache_dir()
    )


def test_record_keeps_other_seeds_and_replaces_its_own(tmp_path):
    parameters = {"steps": 10, "size": Size(2), "arms": ("a", "b")}
    assert store.recorded("run", parameters) == {}
    for seed in (10, 2, 0):
        path = store.record("run", parameters, seed, {"loss": [seed, 1.0]})
    store.record("run", parameters, 2, {"loss": [7]})
    assert path == tmp_path / "notebooks" / "results" / "run.json"
    assert store.recorded("run", parameters) == {
        0: {"loss": [0, 1.0]},
        2: {"loss": [7]},
        10: {"loss": [10, 1.0]},
    }
    found = json.loads(path.read_text())
    assert list(found) == ["name", "parameters", "versions", "seeds"] and list(
        found["seeds"]
    ) == ["0", "2", "10"]
    assert found["parameters"] == {
        "steps": 10,
        "size": {"layers": 2, "rate": 0.1},
        "arms": ["a", "b"],
    }
    assert (
        set(found["versions"]) == {"python", "torch", "code"}
        and len(found["versions"]["code"]) == 12
    )


def test_record_is_stable_and_rounds_results_but_not_parameters():
    path = store.record(
        "run",
        {"rate": 0.123456789},
        0,
        {"loss": [1.23456789, 1.23456789e-9, 123456789, 2.0], "note": "é"},
    )
    first = path.read_bytes()
    assert store.recorded("run", {"rate": 0.123456789}) == {
        0: {"loss": [1.23457, 1.23457e-9, 123456789, 2.0], "note": "é"}
    }
    store.record(
        "run", {"rate": 0.123456789}, 0, store.recorded("run", {"rate": 0.123456789})[0]
    )
    assert (
        path.read_bytes() == first and first.endswith(b"}\n") and b'\n "name"' in first
    )
    assert [p.name for p in path.parent.iterdir()] == [
        "run.json"
    ]  # no temporary file is left


def test_other_parameters_never_touch_the_recorded_file():
    path = store.record("run", {"steps": 1000}, 0, {"loss": 1})
    first = path.read_bytes()
    other = store.record("run", {"steps": 10}, 0, {"loss": 2})
    store.record("run", {"steps": 10}, 1, {"loss": 3})
    assert other.name == "run.other.json" and path.read_bytes() == first
    assert store.recorded("run", {"steps": 10}) == {0: {"loss": 2}, 1: {"loss": 3}}
    assert store.recorded("run", {"steps": 1000}) == {0: {"loss": 1}}
    store.record("run", {"steps": 20}, 5, {"loss": 4})
    assert path.read_bytes() == first
    assert store.recorded("run", {"steps": 10}) == {} and store.recorded(
        "run", {"steps": 20}
    ) == {5: {"loss": 4}}


@pytest.mark.parametrize(
    ("bad", "error"),
    [(math.nan, ValueError), (-math.inf, ValueError), (object(), TypeError)],
)
def test_a_result_that_cannot_be_recorded_leaves_the_file_alone(bad, error):
    path = store.record("run", {}, 0, {"loss": 1})
    first = path.read_bytes()
    with pytest.raises(error):
        store.record("run", {}, 1, {"loss": [1, bad]})
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == [
        "run.json"
    ]
