"""One look for all figures, and alt text with every picture.

Colours, line styles and markers go together, so that readers who see no colours can
tell the curves apart.

Importing this module sets matplotlib's defaults to `LOOK`, for the whole process. That
is the one thing in `helpers` that an import changes for others, and it is wanted: a
notebook that imports `figures` draws in the common look with no further line. No helper
imports this module, so nobody gets the look who did not ask for it.
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import TypedDict

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

# A line style is a name, or (offset, lengths of dash, gap, dash, ...).
Dashes = tuple[int, tuple[int, ...]]

# Okabe and Ito's palette. Colour i goes with style i and marker i.
COLORS: list[str] = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
]
STYLES: list[str | Dashes] = [
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 1)),
]
MARKERS: list[str] = ["o", "s", "^", "D", "v", "P", "X"]

LOOK: dict[RcKeyType, object] = {
    "figure.figsize": (8, 4),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


class LineStyle(TypedDict, total=False):
    """The keywords of `Axes.plot` that `style` sets."""

    color: str
    linestyle: str | Dashes
    marker: str
    markersize: float


def use_look() -> None:
    """Make `LOOK` matplotlib's defaults."""
    plt.rcParams.update(LOOK)


use_look()


def style(i: int, marker: bool = False) -> LineStyle:
    """Colour and line style number i, for `ax.plot(..., **style(i))`.

    With `marker` also the marker of that number. After the last one it starts again.
    """
    look: LineStyle = {
        "color": COLORS[i % len(COLORS)],
        "linestyle": STYLES[i % len(STYLES)],
    }
    if marker:
        look["marker"] = MARKERS[i % len(MARKERS)]
        look["markersize"] = 5
    return look


def spread(
    ax: Axes,
    x: Sequence[float],
    runs: Sequence[Sequence[float]],
    i: int,
    label: str,
    live: Sequence[float] | None = None,
) -> None:
    """Draw recorded runs as a band from lowest to highest, the live run as a line.

    x: the points. runs: for each recorded seed its value at every point; may be empty.
    i: the number of the colour and line style. live: the live run's value at every
    point.
    """
    look = style(i)
    if runs:
        low = np.min(runs, axis=0)
        high = np.max(runs, axis=0)
        recorded = f"{label}: {len(runs)} recorded seeds"
        ax.fill_between(
            x, low, high, color=look["color"], alpha=0.2, linewidth=0, label=recorded
        )
    if live is not None:
        ax.plot(x, live, label=f"{label}: live run", **look)


def show(fig: Figure, alt: str) -> None:
    """Display the figure once and close it.

    alt: what a reader who does not see the picture should know: what is drawn, and the
    numbers that carry the finding. The output is HTML, since JupyterLab and static
    pages drop the alt text of a plain image.
    """
    display({"text/html": as_image(fig, alt), "text/plain": alt}, raw=True)


def as_image(fig: Figure, alt: str) -> str:
    """The figure as an HTML image with its alt text; the figure is closed."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    plt.close(fig)
    png = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img style="max-width: 100%" alt="{html.escape(alt)}" '
        f'src="data:image/png;base64,{png}">'
    )
