"""A control above a figure: move it, and the figure is drawn anew."""

import html
import re
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
from IPython.display import display
from IPython.utils.capture import capture_output
from ipywidgets import DOMWidget, ValueWidget, VBox

NO_KERNEL = "Run this cell for the controls of this picture."


class Shown:
    """HTML in a cell's output that can be written anew; a saved notebook keeps it."""

    def __init__(self, value: str) -> None:
        self.value = value
        self._handle = display(self._bundle(), raw=True, display_id=True)

    def update(self, value: str) -> None:
        """Put other HTML in its place."""
        self.value = value
        if self._handle is not None:  # there is none outside of IPython
            self._handle.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        alts = re.findall(r'alt="([^"]*)"', self.value)
        words = alts or [re.sub(r"<[^>]*>", "", self.value)]
        return {"text/html": self.value, "text/plain": html.unescape(words[0])}


def what_if(
    control: ValueWidget | Sequence[ValueWidget], draw: Callable[..., None]
) -> None:
    """Display `control`, or several of them, above the figure that `draw` shows.

    draw: called with the value of each control, now and whenever one of them changes.
    It shows one figure by `figures.show`. The figure is an ordinary output, so that
    pages without a kernel have it too.

    What the first call raises leaves the cell, as from any other line. What a later one
    raises stands in the picture's place, in one line, and the controls go on working:
    the reader has no other place to see it.
    """
    controls = [control] if isinstance(control, ValueWidget) else list(control)
    follow(controls, draw)


def follow(controls: Sequence[ValueWidget], draw: Callable[..., None]) -> Shown:
    """`what_if`; -> the place of the figure."""

    def picture() -> str:
        return drawn(draw, [one.value for one in controls])

    first = picture()
    show_widget(VBox(controls), NO_KERNEL)
    place = Shown(first)

    def on_change(change: object) -> None:
        try:
            place.update(picture())
        except Exception as error:
            place.update(in_one_line(error))

    for one in controls:
        one.observe(on_change, names="value")
    return place


def show_widget(widget: DOMWidget, hint: str) -> None:
    """Display a widget; where there is no kernel the line `hint` stands for it."""
    bundle = widget._repr_mimebundle_()
    line = f"<p><i>{html.escape(hint)}</i></p>"
    display(bundle | {"text/html": line, "text/plain": hint}, raw=True)


def drawn(draw: Callable[..., None], values: Sequence[object]) -> str:
    """The figure that `draw(*values)` shows, as an HTML image with its alt text.

    Raises ValueError when it shows none, and whatever `draw` raises. Figures that it
    leaves open are closed: the end of the cell would show them a second time.
    """
    open_before = set(plt.get_fignums())
    try:
        with capture_output() as caught:
            draw(*values)
    finally:
        for number in set(plt.get_fignums()) - open_before:
            plt.close(number)
    for output in caught.outputs:
        picture = output.data.get("text/html", "")
        if picture.startswith("<img "):
            return str(picture)
    raise ValueError("no figure was shown; end the drawing with figures.show(fig, alt)")


def in_one_line(error: Exception) -> str:
    """What went wrong, as an HTML line in the picture's place."""
    # a message may have several lines, or none
    message = " ".join(str(error).split()) or type(error).__name__
    text = html.escape(f"Cannot be drawn: {message}")
    return f'<p role="alert" style="color: #D55E00">{text}</p>'
