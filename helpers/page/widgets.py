"""A control above a figure: move it, and the figure is drawn anew."""

import html
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
from IPython.display import display
from IPython.utils.capture import capture_output
from ipywidgets import HTML, DOMWidget, ValueWidget, VBox

NO_KERNEL = "Run this cell to move the control: the picture follows."


def what_if(
    control: ValueWidget | Sequence[ValueWidget], draw: Callable[..., None]
) -> None:
    """Display `control`, or several of them, above the figure that `draw` shows.

    draw: called with the value of each control, now and whenever one of them changes.
    It shows one figure by `figures.show`.

    What the first call raises leaves the cell, as from any other line. What a later one
    raises stands in the picture's place, in one line, and the controls go on working:
    the reader has no other place to see it.
    """
    controls = [control] if isinstance(control, ValueWidget) else list(control)
    # Plain HTML: an Output widget, as `ipywidgets.interact` makes it, can hang a
    # notebook that is executed without a browser.
    picture = HTML()

    def redraw() -> None:
        picture.value = drawn(draw, [one.value for one in controls])

    def on_change(change: object) -> None:
        try:
            redraw()
        except Exception as error:
            picture.value = in_one_line(error)

    redraw()
    for one in controls:
        one.observe(on_change, names="value")
    show_widget(VBox([*controls, picture]), picture.value, NO_KERNEL)


def show_widget(widget: DOMWidget, static: str, hint: str) -> None:
    """Display a widget, with HTML for where there is no kernel to bring it to life.

    One output holds both: JupyterLab shows the widget once the cell has run there, and
    `static` with the line `hint` below it before that, as do static pages.
    """
    below = f"<p><i>{html.escape(hint)}</i></p>" if hint else ""
    bundle = widget._repr_mimebundle_()
    bundle |= {"text/html": static + below, "text/plain": hint or "a widget"}
    display(bundle, raw=True)


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
