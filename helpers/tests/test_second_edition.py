"""The notebooks of the second edition are what design asks of them."""

import warnings

from helpers.evidence.results import REWRITTEN
from helpers.tests import reading, second_edition
from helpers.tests.reading import NOTEBOOKS

import nbformat
import pytest
from nbformat.v4 import (
    new_code_cell,
    new_markdown_cell,
    new_notebook,
    new_output,
)

PAGES = [path for path in NOTEBOOKS if path.stem in REWRITTEN]

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def following(path):
    """The name of the next notebook; None behind the last."""
    place = NOTEBOOKS.index(path)
    return NOTEBOOKS[place + 1].name if place + 1 < len(NOTEBOOKS) else None


@each_page
def test_no_cell_is_too_long(path):
    notebook = reading.read(path)
    long = second_edition.long_cells(notebook, second_edition.LONG)
    if long:
        warnings.warn(f"{path.stem}, worth a look: {'; '.join(long)}", stacklevel=1)
    assert second_edition.long_cells(notebook, second_edition.TOO_LONG) == []


@each_page
def test_prose_is_written_by_hand(path):
    assert second_edition.assembled_sentences(reading.read(path)) == []


@each_page
def test_its_findings_say_what_was_measured(path):
    notebook = reading.read(path)
    assert second_edition.findings(notebook)
    assert second_edition.unknown_numbers(notebook) == []


@each_page
def test_it_links_to_the_map_and_to_the_next_page(path):
    assert second_edition.lost_pages(reading.read(path), following(path)) == []


@each_page
def test_solutions_stand_last_and_folded(path):
    assert second_edition.solutions_out_of_place(reading.read(path)) == []


@each_page
def test_no_moment_is_kept(path):
    assert second_edition.moments(reading.read(path)) == []


@each_page
def test_widgets_have_something_to_show_without_a_kernel(path):
    assert second_edition.raw_widgets(reading.read(path)) == []


@each_page
def test_pictures_are_html_with_alt_text(path):
    # the alt text of an image/png reaches nobody
    for where, output in reading.all_outputs(reading.read(path)):
        assert "image/png" not in output.get("data", {}), where


# ------------------------------------------------------- the checks find what they seek


def page(*cells):
    return new_notebook(cells=list(cells))


def code(source, outputs=(), tags=(), **jupyter):
    cell = new_code_cell(source, outputs=list(outputs))
    cell.metadata = nbformat.from_dict({"tags": list(tags), "jupyter": jupyter})
    return cell


def shown(**data):
    return new_output("display_data", data)


def test_long_cells_are_counted_in_lines():
    notebook = page(code("x = 1\n" * 61), code("y = 2"))
    [found] = second_edition.long_cells(notebook, 60)
    assert found.endswith("61 lines")


@pytest.mark.parametrize(
    "source", ["display(Markdown(f'{x} is more'))", "print(f'**Found.** {x}')"]
)
def test_sentences_made_by_code_are_found(source):
    assert second_edition.assembled_sentences(page(code(source)))
    assert not second_edition.assembled_sentences(page(code("print(x)")))


def test_missing_links_are_found():
    notebook = page(new_markdown_cell("[map](00_start_here.ipynb)"))
    assert second_edition.lost_pages(notebook, "05.ipynb") == ["no link to 05.ipynb"]
    assert second_edition.lost_pages(notebook, None) == []


def test_solutions_out_of_place_are_found():
    folded = {"source_hidden": True, "outputs_hidden": True}
    good = page(code("1"), code("2", tags=["solution"], **folded))
    assert second_edition.solutions_out_of_place(good) == []
    early = page(code("2", tags=["solution"], **folded), code("1"))
    assert (
        "behind the first solution" in second_edition.solutions_out_of_place(early)[0]
    )
    half = page(code("2", tags=["solution"], source_hidden=True))
    assert "fold" in second_edition.solutions_out_of_place(half)[0]


def test_bars_that_stand_still_are_found():
    bar = shown(**{"text/plain": "  0%|          | 0/8 [00:00<?, ?it/s]"})
    line = shown(**{"text/plain": "base: 100 steps, 15 s, loss=5.03"})
    assert second_edition.moments(page(code("x", [bar])))
    assert not second_edition.moments(page(code("x", [line])))


def test_widgets_without_a_picture_are_found():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    assert second_edition.raw_widgets(page(code("x", [shown(**view)])))
    both = view | {"text/html": "<p>run this cell</p>"}
    assert not second_edition.raw_widgets(page(code("x", [shown(**both)])))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (
            "57 times less, 0.123 nats (-0.05 to 1,024).",
            ["57", "0.123", "-0.05", "1,024"],
        ),
        ("Llama 3.1 405B and `x = 12` at 128K in V3, $2^{10}$", []),
        ("in 24 % of 5 seeds", ["24", "5"]),
    ],
)
def test_numbers_are_read_as_they_are_written(text, numbers):
    assert [number for number, _ in second_edition.numbers_in(text)] == numbers


def test_the_word_behind_a_number_is_its_unit():
    read = second_edition.numbers_in("9.2 GB, 3.1 (about 12 %).")
    assert read == [("9.2", "GB"), ("3.1", "(about"), ("12", "%")]


@pytest.mark.parametrize(
    ("number", "unit", "known"),
    [
        ("57", "", True),  # 57.2
        ("57.2", "times", True),
        ("57.3", "times", False),
        ("12.3", "%", True),  # 0.1234 as a share
        ("12.3", "nats", False),
        ("70.3", "kB", True),  # 70,272 in thousands
        ("70.3", "", False),
        ("3", "", True),  # a few things are counted
        ("−0.12", "", True),  # of 0.1234: the sign is for the reader to see
        ("11", "", False),
    ],
)
def test_a_number_is_known_if_a_value_rounds_to_it(number, unit, known):
    assert second_edition.is_known(number, unit, [57.2, 0.1234, 70_272]) == known


def test_values_come_from_what_the_page_shows():
    picture = '<img style="max-width: 100%" alt="MLA 70.3 kB" src="data:x,999">'
    notebook = page(
        code(
            "x",
            [
                new_output("stream", name="stdout", text="ratio 57.2\n"),
                shown(**{"text/html": f"<td>1,024</td>{picture}"}),
            ],
        ),
        new_markdown_cell("**Found.** 57 times, 1,024 and 70.3; not 41.5."),
        new_markdown_cell("Elsewhere 41.7 is free."),
    )
    values = second_edition.known_values(notebook)
    assert {57.2, 1024.0, 70.3} <= set(values)
    assert 999.0 not in values
    [found] = second_edition.unknown_numbers(notebook)
    assert "41.5" in found
