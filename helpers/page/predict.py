"""A question that the reader answers before the result is there.

    guess = predict.number("How much smaller is the cache?", unit="times smaller")
    ...
    guess.reveal(ratio)     # below the result: how far off the guess was

Nobody has to answer: without a guess, or without a kernel, the page reads the same. An
answer typed after the result was shown changes the line below it at once, and is marked
as given after seeing.
"""

import html
from collections.abc import Sequence

from helpers.checks import need
from helpers.page.widgets import Shown, show_widget

from IPython.display import display
from ipywidgets import Dropdown, Text, ValueWidget, VBox

NO_KERNEL = "Run this cell to type a guess."


class Guess:
    """One question: the box it is answered in, and the line that its answer gets."""

    def __init__(self, question: str, box: ValueWidget) -> None:
        self.question = question
        self.box = box
        self.after_seeing = False
        self.line: Shown | None = None
        self.how = "Measured"
        box.observe(self._changed, names="value")
        # the question is plain text: it is read without a kernel, too
        display({"text/html": f"<p>{html.escape(question)}</p>"}, raw=True)
        show_widget(VBox([box]), NO_KERNEL)

    def _changed(self, change: object) -> None:
        if self.line is not None:
            self.after_seeing = True
            self.line.update(self._text())

    def _text(self) -> str:
        raise NotImplementedError

    def _show(self) -> None:
        """Show the answer's line below the result, and keep it up to date."""
        self.line = Shown(self._text())

    def _mark(self) -> str:
        return " (guessed after seeing the result)" if self.after_seeing else ""


class NumberGuess(Guess):
    """A guess that is a number."""

    def __init__(self, question: str, unit: str) -> None:
        self.unit = unit
        self.truth: float | None = None
        box = Text(placeholder="a number", continuous_update=False)
        super().__init__(question, box)

    @property
    def value(self) -> float | None:
        """The number that was typed; None without one that can be read."""
        typed = self.box.value.strip().rstrip("%").replace(",", "").strip()
        try:
            return float(typed)
        except ValueError:
            return None

    def reveal(self, truth: float, how: str = "Measured") -> None:
        """Show what it is, and how far off the guess was; `how` it is known."""
        self.truth = float(truth)
        self.how = how
        self._show()

    def _text(self) -> str:
        assert self.truth is not None
        unit = html.escape(self.unit)
        measured = f"{self.how}: <b>{f'{self.truth:,.4g} {unit}'.strip()}</b>."
        if self.value is None:
            return measured
        off = self.value - self.truth
        how = f"{abs(off):,.3g} too {'high' if off > 0 else 'low'}" if off else "exact"
        guessed = f"Your guess: {self.value:,.4g}, {how}{self._mark()}."
        return f"{measured} {guessed}"


class ChoiceGuess(Guess):
    """A guess that is one of several."""

    def __init__(self, question: str, options: Sequence[str]) -> None:
        self.options = list(options)
        self.truth: str | None = None
        box = Dropdown(options=[("choose", None), *((o, o) for o in self.options)])
        super().__init__(question, box)

    @property
    def value(self) -> str | None:
        """The option that was chosen."""
        return self.box.value

    def reveal(self, truth: str, how: str = "Measured") -> None:
        """Show which it is, and whether the guess was right; `how` it is known.

        Raises InputError for what is none of the options.
        """
        need(truth in self.options, "truth", truth, f"use one of {self.options}")
        self.truth = truth
        self.how = how
        self._show()

    def _text(self) -> str:
        measured = f"{self.how}: <b>{html.escape(str(self.truth))}</b>."
        if self.value is None:
            return measured
        right = "right" if self.value == self.truth else "not so"
        chosen = html.escape(self.value)
        return f"{measured} Your guess: {chosen}, {right}{self._mark()}."


def number(question: str, unit: str = "") -> NumberGuess:
    """Ask for a number; `unit` stands behind it in the answer."""
    return NumberGuess(question, unit)


def choice(question: str, options: Sequence[str]) -> ChoiceGuess:
    """Ask for one of `options`."""
    need(len(options) > 1, "options", options, "give at least two")
    return ChoiceGuess(question, options)
