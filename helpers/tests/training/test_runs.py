"""Where runs are kept, what they are named after, which code made them."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.training import runs
from helpers.training.runs import Provenance
from helpers.training.source import REPOSITORY, Sources

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


@dataclass
class Size:
    layers: int
    rate: float = 0.1


# ---------------------------------------------------------------------------- folders


def test_home_is_the_repository_without_the_variable(monkeypatch):
    monkeypatch.delenv("V3LAB_HOME")
    assert (runs.home() / "helpers" / "training" / "runs.py").is_file()
    monkeypatch.setenv("V3LAB_HOME", "")
    assert runs.home() == REPOSITORY


def test_a_tilde_in_the_variable_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("V3LAB_HOME", "~/x")
    assert runs.home() == tmp_path / "x"
    assert runs.cache_dir() == tmp_path / "x" / ".lab"


def test_run_dir_is_in_the_cache_and_not_created():
    folder = runs.run_dir("base", steps=3)
    assert folder == runs.cache_dir() / f"base-{runs.key(steps=3)}"
    assert not folder.exists()


def test_writable_creates_the_folder(tmp_path):
    folder = tmp_path / "a" / "b"
    assert runs.writable(folder) == folder and folder.is_dir()
    assert runs.writable(folder) == folder


def test_a_read_only_checkout_is_one_message_that_names_the_variable(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match="V3LAB_HOME"):
        runs.writable(tmp_path / "file" / "folder")

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(OSError, match="Read-only file system.*V3LAB_HOME"):
            runs.writable(tmp_path / "new")
    # a folder that is there, in a place where nothing can be written
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OSError, match="V3LAB_HOME"):
        runs.writable(tmp_path)


# ------------------------------------------------------------------------------- keys

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
part_names = st.from_regex(r"[a-z_]+", fullmatch=True)


@pytest.mark.slow
@settings(deadline=None)
@given(st.dictionaries(part_names, plain, max_size=4), st.randoms())
def test_key_does_not_depend_on_the_order_of_parts(parts, random):
    names = list(parts)
    random.shuffle(names)
    key = runs.key(**parts)
    assert key == runs.key(**{name: parts[name] for name in names})
    assert len(key) == 16 and int(key, 16) >= 0


def test_key_is_the_same_in_another_process_and_differs_with_any_value():
    code = "from helpers.training import runs; print(runs.key(b=[1, 2.5], a='é'))"
    other = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == runs.key(a="é", b=[1, 2.5])
    values = (1, 2, 1.5, "1", True, None, [1], {"b": 1})
    assert len({runs.key(a=value) for value in values}) == len(values)


def test_key_is_that_of_the_first_edition():
    """Folders of earlier runs, the tokenized corpus among them, keep their names."""
    assert runs.key(a="é", b=[1, 2.5]) == "1d5aa48ef9cd2b6b"


def test_key_takes_dataclasses_at_any_depth():
    as_dict = {"layers": 2, "rate": 0.1}
    assert runs.key(size=Size(2)) == runs.key(size=as_dict)
    assert runs.key(size=Size(2)) != runs.key(size=Size(3))
    assert runs.key(arms=[Size(2)]) == runs.key(arms=[as_dict])


NOT_JSON = [
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
]


@pytest.mark.parametrize("bad", NOT_JSON)
def test_key_names_the_part_that_is_not_json(bad):
    with pytest.raises(TypeError, match="'wrong'"):
        runs.key(fine=1, wrong=bad)


class Model(torch.nn.Module):
    config = "sizes of a model"

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0, dtype=dtype).view(2, 3).T)
        self.register_buffer("scalar", torch.tensor(2.0, dtype=dtype))


def test_fingerprint_is_that_of_config_and_weights():
    digits = runs.fingerprint(Model())
    assert digits == runs.fingerprint(Model()) == "fd3110f3c3e70890"
    assert digits != runs.fingerprint(Model(torch.bfloat16))
    changed = Model()
    changed.config = "other sizes"
    assert runs.fingerprint(changed) != digits
    changed = Model()
    with torch.no_grad():
        changed.weight[0, 0] += 1
    assert runs.fingerprint(changed) != digits


# --------------------------------------------------------------- the code's identity

V3_INIT = '"""The model."""\nfrom helpers.v3.model import Model\n__all__ = ["Model"]\n'
MODEL = """
import math
from helpers.v3.rope import turn  # positions

def model(x):
    return turn(x, base=10000.0)

class Model:
    size = 3
"""
FILES = {
    "helpers/__init__.py": "",
    "helpers/checks.py": "LIMIT = 1\n",
    "helpers/v3/__init__.py": V3_INIT,
    "helpers/v3/model.py": MODEL,
    "helpers/v3/rope.py": "SCALE = 2\n\ndef turn(x, base):\n    return SCALE * x\n",
    "helpers/v3/fp8.py": "from helpers.v3.model import Model\nFORMAT = 'e4m3'\n",
    "helpers/training/__init__.py": "",
    "helpers/training/runs.py": "STEPS = 3\n",
    "helpers/training/loop.py": (
        "from . import runs\nfrom .. import checks\nROUNDS = 1\n"
    ),
    "helpers/training/pretrain.py": (
        "from helpers.v3 import Model\n"
        "from helpers.training.loop import ROUNDS\n"
        "from helpers.page.figures import draw\n"
        "from helpers.evidence import facts\n"
        "import torch.nn as nn\n"
    ),
    "helpers/page/__init__.py": "",
    "helpers/page/figures.py": "from helpers.reasoning import rollout\n",
    "helpers/evidence/__init__.py": "",
    "helpers/evidence/facts.py": "TOKENS = 14.8\n",
    "helpers/reasoning/__init__.py": "",
    "helpers/reasoning/rollout.py": "TEMPERATURE = 1.0\n",
    "helpers/reasoning/grpo.py": "def late():\n    import helpers.training.pretrain\n",
}


@pytest.fixture
def tree(tmp_path):
    """A small helpers folder of its own."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def rewrite(tree, name, old, new):
    path = tree / "helpers" / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def pretrain_hash(tree):
    return runs.code_hash("helpers.training.pretrain", tree)


def test_modules_are_found_directly_and_indirectly_but_only_in_the_three_rooms(tree):
    found = Sources(tree).modules_of("helpers.training.pretrain")
    assert found == {
        "helpers.training.pretrain",
        "helpers.training.loop",
        "helpers.v3.model",  # Model is passed on by helpers.v3
        "helpers.v3.rope",
        "helpers.reasoning.rollout",  # by way of page
    }
    late = Sources(tree).modules_of("helpers.reasoning.grpo")
    assert late == found | {"helpers.reasoning.grpo"}


def test_a_package_as_a_whole_leads_to_all_that_it_imports(tree):
    text = "import helpers.v3 as v3\nfrom helpers.training import pretrain as p\n"
    found = Sources(tree).modules_of_text(text)
    assert {"helpers.v3", "helpers.v3.model", "helpers.training.pretrain"} <= found
    assert "helpers.v3.fp8" not in found
    assert Sources(tree).modules_of_text("from helpers.v3 import fp8, Model\n") == {
        "helpers.v3.fp8",
        "helpers.v3.model",
        "helpers.v3.rope",
    }


SAME = {
    "a comment": ("v3/model", "# positions", "# where a token stands"),
    "a docstring": (
        "v3/model",
        "def model(x):",
        'def model(x):\n    """One pass."""',
    ),
    "the module's docstring": ("v3/model", "\nimport math", '"""Doc."""\nimport math'),
    "a changed docstring": ("v3/__init__", "The model.", "All of it."),
    "blank lines": ("v3/model", "class Model", "\n\n\nclass Model"),
    "quotes and brackets": (
        "v3/rope",
        "return SCALE * x",
        "return (\n        SCALE\n        * x\n    )",
    ),
    "how a number is written": ("v3/model", "10000.0", "1e4"),
    "a string under a constant": ("v3/rope", "SCALE = 2", 'SCALE = 2\n"""A scale."""'),
    "pass": ("v3/model", "    size = 3", "    size = 3\n    pass"),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_computes_nothing_does_not_count(tree, change):
    before = pretrain_hash(tree)
    rewrite(tree, *change)
    assert pretrain_hash(tree) == before


DIFFERENT = {
    "itself": ("training/pretrain", "import torch.nn as nn", "STEPS = 4"),
    "directly": ("training/loop", "ROUNDS = 1", "ROUNDS = 2"),
    "indirectly": ("v3/rope", "SCALE = 2", "SCALE = 3"),
    "a type": ("v3/rope", "SCALE = 2", "SCALE = 2.0"),
    "a default": ("v3/rope", "turn(x, base)", "turn(x, base=1)"),
    "a string": ("v3/model", "size = 3", "size = '3'"),
    "a class member": ("v3/model", "size = 3", "size = 4"),
    "by way of page": ("reasoning/rollout", "1.0", "0.9"),
}


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT)
def test_what_is_computed_counts(tree, change):
    before = pretrain_hash(tree)
    rewrite(tree, *change)
    assert pretrain_hash(tree) != before


APART = {
    "not imported": ("v3/fp8", "e4m3", "e5m2"),
    "page": ("page/figures", "import rollout", "import rollout as drawn"),
    "evidence": ("evidence/facts", "14.8", "15"),
    "checks": ("checks", "LIMIT = 1", "LIMIT = 2"),
    "runs itself": ("training/runs", "STEPS = 3", "STEPS = 4"),
}


@pytest.mark.parametrize("change", APART.values(), ids=APART)
def test_other_modules_do_not_count(tree, change):
    before = pretrain_hash(tree)
    rewrite(tree, *change)
    assert pretrain_hash(tree) == before


def test_moving_a_line_between_modules_counts(tree):
    before = pretrain_hash(tree)
    rewrite(tree, "v3/rope", "SCALE = 2\n", "")
    rewrite(tree, "v3/model", "import math\n", "import math\nSCALE = 2\n")
    assert pretrain_hash(tree) != before


@pytest.mark.slow
def test_code_hash_is_twelve_digits_and_imports_nothing(tree):
    rewrite(tree, "v3/rope", "SCALE = 2\n", "SCALE = 2\nraise SystemExit\n")
    digits = pretrain_hash(tree)
    assert len(digits) == 12 and int(digits, 16) >= 0
    code = (
        "import sys\n"
        "from helpers.training import runs\n"
        "print(runs.code_hash('helpers.training.pretrain'), 'torch' in sys.modules)\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert printed == [runs.code_hash("helpers.training.pretrain"), "False"]


@pytest.mark.parametrize("name", ["helpers.nothing", "torch", "", "helpers.v3.nothing"])
def test_a_module_that_is_not_ours_is_an_error(tree, name):
    with pytest.raises(ValueError, match="module="):
        runs.code_hash(name, tree)


def test_the_formatter_does_not_change_the_hash(tree):
    """Our own experts in lines of 40 columns."""
    original = (REPOSITORY / "helpers" / "v3" / "experts.py").read_text("utf-8")
    file = tree / "helpers" / "v3" / "experts.py"
    file.write_text(original, encoding="utf-8")
    before = Sources(tree).hash_of(["helpers.v3.experts"])
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "-q"]
    subprocess.run([*command, "--line-length", "40", str(file)], check=True)
    assert len(file.read_text("utf-8").splitlines()) > len(original.splitlines()) + 30
    assert Sources(tree).hash_of(["helpers.v3.experts"]) == before


# ------------------------------------------------------------------------- provenance

MADE = Provenance("aaa", [7.6, 7.5, 7.4])
VERDICTS = [
    (Provenance("aaa", []), "same code"),
    (Provenance("bbb", [7.6, 7.5, 7.4]), "code changed, numbers same"),
    (Provenance("bbb", [7.6 + 7e-6, 7.5, 7.4]), "code changed, numbers same"),
    (Provenance("bbb", [7.6, 7.5, 7.4 + 2e-4]), "stale"),
    (Provenance("bbb", [7.6, 7.5]), "stale"),
    (Provenance("bbb", []), "stale"),
    (Provenance("bbb", [7.6, 7.5, math.nan]), "stale"),
]


@pytest.mark.parametrize(("now", "verdict"), VERDICTS)
def test_a_run_is_worth_what_its_first_losses_say(now, verdict):
    assert MADE.verdict(now) == verdict


def test_nothing_compared_is_no_agreement():
    assert Provenance("aaa", []).verdict(Provenance("bbb", [])) == "stale"
    assert Provenance("", []).verdict(Provenance("bbb", [])) == "stale"


def test_a_comparison_is_remembered():
    made = Provenance("aaa", [1.0], compared="bbb")
    assert made.verdict(Provenance("bbb", [])) == "code changed, numbers same"
    assert made.verdict(Provenance("ccc", [])) == "stale"


def test_provenance_goes_through_a_runs_state():
    kept = json.loads(json.dumps(asdict(MADE)))
    assert Provenance(**kept) == MADE
    assert Provenance(**{"code": "aaa", "witness": [7.6, 7.5, 7.4]}) == MADE
