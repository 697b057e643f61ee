"""The table of claims (notebook 12) stands whatever the recorded results hold.

Nothing, garbage, or a sentence with markup.
"""

import html
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

from helpers.evidence.claims import CLAIMS

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert.filters.markdown_mistune import markdown2html_mistune

pytestmark = pytest.mark.slow  # a kernel runs the notebook

ROOT = Path(__file__).resolve().parents[3]
NOTEBOOK = ROOT / "notebooks" / "12_claims_checked.ipynb"
RECORDED = [
    path
    for path in sorted((ROOT / "notebooks" / "results").glob("*.json"))
    if path.stem != NOTEBOOK.stem and not path.stem.endswith(".other")
]
LETTERS = [claim.letter for claim in CLAIMS]
READ = {
    "c": "01_mixture_of_experts",
    "f": "04_pretraining",
    "g": "02_latent_attention",
}  # rows made from recorded numbers


def result(*seeds, **more) -> str:
    return json.dumps({"parameters": {}, "seeds": dict(seeds)} | more)


def sentence(words) -> str:
    return result(("0", {"claims": {"k": words}}))


DAMAGED = {
    "empty": "",
    "cut off": '{"name": "x", "parameters": {}, "seeds": {"0": {"los',
    "no text": b"\xff\xfe\x00\x81",
    "a list": "[]",
    "null": "null",
    "a number": "1",
    "no seeds": '{"parameters": {}}',
    "no seed": result(),
    "seeds a list": result(seeds=[1]),
    "no parameters": '{"seeds": {"0": {}}}',
    "parameters a list": result(("0", {}), parameters=[]),
    "seed not a number": result(("first", {})),
    "data a list": result(("0", [1, 2])),
    "NaN": '{"parameters": {}, "seeds": {"0": {"loss": NaN}}}',
    "too large": '{"parameters": {}, "seeds": {"0": {"loss": 1e999}}}',
    "too deep": "[" * 200_000,
    "too long a number": '{"parameters": {}, "seeds": {"0": {"n": '
    + "9" * 5000
    + "}}}",
    "a folder": None,
}
HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a | b | c\n| d |\n\n# e",
    "**b** _i_ `c` ~~s~~ [x](javascript:alert(1)) ![y](z)",
    "https://example.org www.example.org a@example.org",
    "$x$ \\(y\\) \\[z\\] $$w$$",
    "&lt;b&gt; &#60;i&#62;",
    "<!-- > ]]> \u202e \u0000",
]
NO_SENTENCE = [None, 5, [], {}, ["a"], True, "", "  \n", "\u200b"]


def write(folder: Path, name: str, content) -> None:
    path = folder / "notebooks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def make_cases(folder: Path) -> None:
    """One home of results per case, named by its folder."""
    own = {claim.notebook for claim in CLAIMS} | set(READ.values())
    (folder / "missing").mkdir(parents=True)
    shutil.copytree(
        ROOT / "notebooks" / "results", folder / "recorded" / "notebooks" / "results"
    )
    for name, content in DAMAGED.items():
        for notebook in own:
            write(folder / f"damaged {name}", notebook, content)
    for notebook in own:
        write(folder / "other keys", notebook, result(("0", {"valid_loss": [1.0]})))
    for path in RECORDED:
        text = path.read_text(encoding="utf-8")
        write(
            folder / "numbers as text",
            path.stem,
            json.dumps(json.loads(text, parse_float=str, parse_int=str)),
        )
        write(folder / "cut in half", path.stem, text[: len(text) // 2])
    write(
        folder / "filled",
        "08_r1_zero",
        result(
            ("10", {"claims": {"k": "later"}}),
            ("2", {"claims": {"k": "mixing fell from 0.31 to 0.04"}}),
        ),
    )
    write(folder / "filled", "08_r1_zero.other", sentence("of another run"))
    write(folder / "filled", "12_claims_checked", sentence("of this notebook itself"))
    write(folder / "claims not a dict", "08_r1_zero", result(("0", {"claims": "k"})))
    write(folder / "too long", "08_r1_zero", sentence("word " * 10_000))
    for i, text in enumerate(HOSTILE):
        write(folder / f"hostile {i}", "08_r1_zero", sentence(text))
    for i, text in enumerate(NO_SENTENCE):
        write(folder / f"no sentence {i}", "08_r1_zero", sentence(text))


COLLECT = """
answers, drafts = {}, {}
for case in sorted(Path(CASES).iterdir()):
    with mock.patch.dict(os.environ, V3LAB_HOME=str(case)):
        again = read_all()
    drafts[case.name] = accepted(again)
    lines = {claim.letter: findings(claim, again) for claim in CLAIMS}
    answers[case.name] = {
        letter: [state(lines[letter]), row(claim, lines[letter])]
        for letter, claim in ((claim.letter, claim) for claim in CLAIMS)
    }
_ = Path(CASES).with_name("answers.json").write_text(
    json.dumps(answers), encoding="utf-8"
)
assert drafts["missing"] == "not yet measured" and drafts["recorded"][0].isdigit()
assert drafts["numbers as text"] == drafts["cut in half"] == "result unreadable"

from helpers.page.widgets import follow
picture = follow([control], tiles)
seen = set()
for control.value in FILTERS:
    seen.add(picture.value)
assert len(seen) == len(FILTERS), "a filter that changes nothing"
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """{case: {letter: (state, cells of the row)}}.

    From one kernel that ran the notebook with no result at all.
    """
    folder = tmp_path_factory.mktemp("claims")
    make_cases(folder / "cases")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(
        nbformat.v4.new_code_cell(f"CASES = {str(folder / 'cases')!r}\n{COLLECT}")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V3LAB_HOME", str(folder / "empty"))
        NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        ).execute()
    return json.loads((folder / "answers.json").read_text(encoding="utf-8"))


def ours(answers: dict, case: str, letter: str) -> str:
    return answers[case][letter][1][3]


class Page(HTMLParser):
    """The tags, link targets and text of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data):
        self.text += data


def rendered(cells: list[str]) -> Page:
    """A row as nbconvert shows it."""
    return Page(
        markdown2html_mistune(
            "| "
            + " | ".join("abcdef")
            + " |\n|"
            + "---|" * 6
            + "\n| "
            + " | ".join(cells)
            + " |"
        )
    )


def test_every_case_gives_sixteen_rows_of_six_cells(answers):
    assert len(answers) == 8 + len(DAMAGED) + len(HOSTILE) + len(NO_SENTENCE)
    for case, rows in answers.items():
        assert list(rows) == LETTERS, case
        assert all(
            len(cells) == 6 and all(cell.strip() for cell in cells)
            for _, cells in rows.values()
        ), case


def test_no_result_is_said_to_be_missing(answers):
    for claim in CLAIMS:
        state, cells = answers["missing"][claim.letter]
        assert (
            f"not yet measured ({claim.notebook[:2]})" in cells[3]
            and "measured:" not in cells[3]
        )
        assert state in ("not yet measured", "in part")
    assert [
        letter for letter in LETTERS if answers["missing"][letter][0] == "in part"
    ] == list("cdfghimnop")  # counted without a result


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_results_are_unreadable_and_nothing_else_changes(answers, name):
    for letter in LETTERS:
        state, cells = answers[f"damaged {name}"][letter]
        assert (
            state == "unreadable"
            and "result unreadable" in cells[3]
            and "measured:" not in cells[3]
        )
        assert [cells[i] for i in (0, 1, 2, 4)] == [
            answers["missing"][letter][1][i] for i in (0, 1, 2, 4)
        ]


@pytest.mark.parametrize("case", ["other keys", "numbers as text", "cut in half"])
def test_results_of_another_shape_are_unreadable_where_their_numbers_are_needed(
    answers, case
):
    assert {letter: answers[case][letter][0] for letter in READ} == dict.fromkeys(
        READ, "unreadable"
    )
    assert (
        answers["other keys"]["k"][0] == "not yet measured"
    )  # a whole result that says nothing about the claim


def test_recorded_numbers_are_those_of_the_files(answers):
    found = {
        name: json.loads(
            (ROOT / "notebooks" / "results" / f"{name}.json").read_text(
                encoding="utf-8"
            )
        )
        for name in READ.values()
    }
    bits = found["04_pretraining"]["seeds"]["0"]["bits_per_byte"]["our model"]
    losses = [
        data["DeepSeekMoE"]["valid_loss"][-1]
        for data in found["01_mixture_of_experts"]["seeds"].values()
    ]
    gigabytes = (
        found["02_latent_attention"]["seeds"]["0"]["bytes_per_token"]["DeepSeek-V3"]
        * 131072
        / 1e9
    )
    assert f"{bits:.2f} bits per byte" in ours(answers, "recorded", "f")
    assert f"DeepSeekMoE {min(losses):.3f} to {max(losses):.3f};" in ours(
        answers, "recorded", "c"
    )
    assert f"V3 {gigabytes:.1f} GB" in ours(answers, "recorded", "g")


def test_committed_table_shows_the_committed_results(answers):
    [cell] = [
        cell
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells
        if cell.id == "12-table"
    ]
    shown = cell.outputs[0].data["text/markdown"].splitlines()[2:]
    now = ["| " + " | ".join(cells) + " |" for _, cells in answers["recorded"].values()]
    assert shown == now, (
        "a result or a notebook is new: run 12_claims_checked.ipynb again"
    )


def test_a_new_result_fills_its_row_and_no_other(answers):
    state, cells = answers["filled"]["k"]
    assert state == "measured" and cells[3] == "measured: mixing fell from 0.31 to 0.04"
    assert {k: v for k, v in answers["filled"].items() if k != "k"} == {
        k: v for k, v in answers["missing"].items() if k != "k"
    }


def test_what_is_no_sentence_is_unreadable(answers):
    for case in [
        "claims not a dict",
        *(f"no sentence {i}" for i in range(len(NO_SENTENCE))),
    ]:
        assert (
            answers[case]["k"][0] == "unreadable"
            and ours(answers, case, "k") == "result unreadable (08)"
        ), case
        assert answers[case]["a"] == answers["missing"]["a"]


def test_a_long_sentence_is_cut(answers):
    words = ours(answers, "too long", "k").removeprefix("measured: ")
    assert len(words) == 200 and words.endswith("…")


@pytest.mark.parametrize("i", range(len(HOSTILE)))
def test_markup_in_a_sentence_is_shown_and_not_obeyed(answers, i):
    cells = answers[f"hostile {i}"]["k"][1]
    page, plain = rendered(cells), rendered(answers["filled"]["k"][1])
    assert page.tags == plain.tags and page.links == plain.links
    plain_text = HOSTILE[i].replace("$", " USD ").replace("\\", "\u29f5")
    assert (
        " ".join(
            "".join(c for c in plain_text if c.isprintable() or c.isspace()).split()
        )
        in page.text
    )
    assert not any(mark in html.unescape(cells[3]) for mark in ("$", "\\"))


def test_rows_link_only_to_notebooks_that_are_here(answers):
    pages = {
        letter: rendered(cells) for letter, (_, cells) in answers["recorded"].items()
    }
    assert {link for page in pages.values() for link in page.links} <= {
        path.name for path in NOTEBOOK.parent.glob("*.ipynb")
    }
    assert pages["c"].links and all(
        page.tags <= {"table", "thead", "tbody", "tr", "th", "td", "strong", "br", "a"}
        for page in pages.values()
    )
