"""One look for all figures: colours and line styles that colour-blind readers can tell apart, and alt text with every picture."""
import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from IPython.utils.capture import capture_output
from ipywidgets import HTML, VBox
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, each colour with a line style and a marker of its own
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]

plt.rcParams.update({
    "figure.figsize": (8, 4), "figure.dpi": 110, "figure.constrained_layout.use": True, "savefig.facecolor": "white",
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.25, "legend.frameon": False,
    "lines.linewidth": 1.8,
})


def style(i: int, marker: bool = False) -> dict[str, object]:
    """Colour and line style number i (and a marker), for `ax.plot(..., **style(i))`."""
    look = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)]}
    return look | {"marker": MARKERS[i % len(MARKERS)], "markersize": 5} if marker else look


def spread(ax: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], i: int, label: str, live: Sequence[float] | None = None) -> None:
    """Recorded runs [seeds][points] as a band from lowest to highest, and the live run as a line over it."""
    look = style(i)
    if runs:
        low, high = np.min(runs, axis=0), np.max(runs, axis=0)
        ax.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0, label=f"{label}: {len(runs)} recorded seeds")
    if live is not None:
        ax.plot(x, live, label=f"{label}: live run", **look)


def show(fig: Figure, alt: str) -> None:
    """Display the figure once, with `alt` as its text for readers who do not see it, and close it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    plt.close(fig)
    display({"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})


def what_if(control: Any, draw: Callable[..., None]) -> None:
    """A widget `control`, or a list of them, above the figure that `draw(control.value, ...)` shows, drawn anew when one moves.
    The picture is plain HTML: an Output widget (`ipywidgets.interact`) can hang a notebook that is executed without a browser."""
    controls = control if isinstance(control, list) else [control]
    picture = HTML()

    def redraw(_: Any = None) -> None:
        with capture_output() as caught:
            draw(*(c.value for c in controls))
        image = caught.outputs[0]
        picture.value = (f'<img style="max-width: 100%" alt="{image.metadata["image/png"]["alt"]}" '
                         f'src="data:image/png;base64,{image.data["image/png"]}">')

    redraw()
    for c in controls:
        c.observe(redraw, names="value")
    display(VBox([*controls, picture]))
