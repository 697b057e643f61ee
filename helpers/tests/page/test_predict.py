"""Questions that take a guess."""

from helpers.checks import InputError
from helpers.page import predict, widgets

import pytest


@pytest.fixture
def shown(monkeypatch):
    """The mime bundles that were displayed."""
    found = []

    def display(data, raw, display_id=False):
        found.append(data)

    for module in (widgets, predict):
        monkeypatch.setattr(module, "display", display)
    return found


VIEW = "application/vnd.jupyter.widget-view+json"


def test_without_a_guess_the_page_says_what_was_measured(shown):
    guess = predict.number("How many times smaller?", "times")
    guess.reveal(57.2)
    question, box, answer = shown
    assert question == {"text/html": "<p>How many times smaller?</p>"}
    assert VIEW in box and "Run this cell" in box["text/html"]
    assert answer["text/html"] == "Measured: <b>57.2 times</b>."
    assert answer["text/plain"] == "Measured: 57.2 times."


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("60", "Your guess: 60, 2.8 too high."),
        (" 50 % ", "Your guess: 50, 7.2 too low."),
        ("1,000", "Your guess: 1,000, 943 too high."),
        ("57.2", "Your guess: 57.2, exact."),
    ],
)
def test_the_answer_says_how_far_off_a_guess_was(shown, typed, line):
    guess = predict.number("How many?", "times")
    guess.box.value = typed
    guess.reveal(57.2)
    assert shown[-1]["text/html"].endswith(line)


def test_what_is_no_number_is_no_guess(shown):
    guess = predict.number("How many?")
    guess.box.value = "a lot"
    guess.reveal(2)
    assert guess.value is None
    assert "Your guess" not in shown[-1]["text/html"]


def test_a_guess_after_seeing_changes_the_line_and_is_marked(shown):
    guess = predict.number("How many?", "times")
    guess.reveal(2)
    assert "Your guess" not in guess.line.value
    guess.box.value = "3"
    assert guess.line.value.endswith("(guessed after seeing the result).")
    # a second reveal, as when the cell runs again, still knows
    guess.reveal(2)
    assert "after seeing" in shown[-1]["text/html"]


def test_a_choice_is_right_or_not(shown):
    guess = predict.choice("Which has the smallest cache?", ["MHA", "MLA <small>"])
    guess.box.value = "MHA"
    guess.reveal("MLA <small>")
    line = shown[-1]["text/html"]
    assert "Measured: <b>MLA &lt;small&gt;</b>. Your guess: MHA, not so." in line
    with pytest.raises(InputError, match="truth='GQA'"):
        guess.reveal("GQA")
    with pytest.raises(InputError, match="options"):
        predict.choice("Which?", ["only one"])
