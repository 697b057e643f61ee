"""Bars that leave one plain line."""

import re

from helpers.training import progress
from helpers.training.progress import Bar

import pytest


class Place:
    """A place in a cell's output, as IPython's display handle is one."""

    def __init__(self):
        self.texts = []

    def update(self, data, raw):
        assert raw
        self.texts.append(data["text/plain"])


@pytest.fixture
def place(monkeypatch):
    there = Place()
    monkeypatch.setattr(progress, "_display", lambda: there)
    return there


def test_in_a_notebook_a_line_is_all_that_stays(place):
    with Bar(total=1200, desc="base", unit="step", mininterval=0) as bar:
        for _ in range(1200):
            bar.update()
        bar.set_postfix(loss=5.03, refresh=False)
    assert "%|" in place.texts[0]
    assert re.fullmatch(r"base: 1,200 steps, \d+ s, loss=5.03", place.texts[-1])


def test_a_bar_that_was_stopped_says_how_far_it_came(place):
    with pytest.raises(KeyboardInterrupt), Bar(total=10, desc="rl", unit="step") as bar:
        bar.update(3)
        raise KeyboardInterrupt
    assert place.texts[-1].startswith("rl: 3 of 10 steps")


def test_iterating_closes_it_once(place):
    assert list(Bar(range(3), unit="part")) == [0, 1, 2]
    assert place.texts[-1].startswith("3 parts")
    assert sum("parts" in text for text in place.texts) == 1


def test_a_disabled_bar_shows_nothing(place):
    assert list(Bar(range(3), disable=True)) == [0, 1, 2]
    assert place.texts == []


def test_in_a_terminal_it_is_tqdms_own(capsys):
    assert list(Bar(range(3), unit="part")) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err
