"""The few kinds of figures that the pages draw, each in one call.

`curves` and `differences` take what `helpers.evidence.frames` gives, the others any
frame. Recorded seeds are a band and the live run a line, and the legend says which is
which. Every figure has its finding as the title and an alt text.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from helpers.page.figures import COLORS, MARKERS, show, style

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

WIDEST_TITLE = 85  # letters in a line of a title
Names = Mapping[str, str]  # what the reader sees for an arm


class Labels(NamedTuple):
    """The words of a figure. The title is the finding; alt is for who does not see."""

    title: str
    alt: str
    x: str = ""
    y: str = ""

    def put_on(self, ax: Axes) -> None:
        """Write title and axis labels. The title begins at the figure's left edge."""
        ax.figure.suptitle(
            textwrap.fill(self.title, WIDEST_TITLE),
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
        )
        ax.set(xlabel=self.x, ylabel=self.y)


def curves(
    found: pd.DataFrame,
    metric: str,
    labels: Labels,
    arms: Sequence[str] | None = None,
    names: Names | None = None,
    log: str = "",
    level: float | None = None,
) -> None:
    """A metric over the steps: a line for the live run, a band for recorded seeds.

    found: a frame as `frames.frame` gives it. arms: which, in this order; None: all. A
    band goes from the lowest to the highest recorded seed; without a live run the line
    is the mean of the recorded ones. What is counted, not run, is a line with no more
    than its name. log: "x" where the steps grow by factors (each is named), "xy" where
    the values do, too.
    level: a value that the curves are read against, drawn as a thin line.
    """
    of_metric = found[found["metric"] == metric]
    if arms is None:
        arms = list(of_metric["arm"].unique())
    fig, ax = plt.subplots()
    for i, arm in enumerate(arms):
        name = (names or {}).get(arm, arm)
        _curve(ax, of_metric[of_metric["arm"] == arm], name, i)
    labels.put_on(ax)
    if level is not None:
        ax.axhline(level, color="black", linewidth=1)
    if "y" in log:
        ax.set_yscale("log")
    if "x" in log:
        steps = sorted(of_metric["step"].unique())
        ax.set_xscale("log")
        ax.set_xticks(steps, [f"{step:,}" for step in steps])
        ax.minorticks_off()
    ax.legend()
    show(fig, labels.alt)


def _curve(ax: Axes, of_arm: pd.DataFrame, label: str, i: int) -> None:
    by_step = of_arm.pivot_table(
        index="step", columns=["origin", "seed"], values="value"
    )
    origins = set(of_arm["origin"])
    look = style(i)
    if "recorded" in origins:
        recorded = by_step["recorded"]
        seeds = recorded.shape[1]
        ax.fill_between(
            recorded.index,
            recorded.min(axis=1),
            recorded.max(axis=1),
            color=look["color"],
            alpha=0.2,
            linewidth=0,
            label=f"{label}: {seeds} recorded seeds",
        )
        if "live" not in origins:
            ax.plot(
                recorded.index, recorded.mean(axis=1), label=f"{label}: mean", **look
            )
    if "live" in origins:
        live = by_step["live"].mean(axis=1)
        ax.plot(live.index, live, label=f"{label}: this run", **look)
    if "counted" in origins:
        counted = by_step["counted"].mean(axis=1)
        ax.plot(counted.index, counted, label=label, **look)


def differences(
    table: pd.DataFrame,
    labels: Labels,
    names: Names | None = None,
    guess: float | None = None,
) -> None:
    """Paired differences with their 95 % intervals, one line for each arm.

    table: what `frames.compare` or `frames.pairs` gives. A full point is a finding, a
    hollow one is not separable from zero. With a column "group" each group has its
    colour. guess: the reader's, drawn as a dotted line.
    """
    fig, ax = plt.subplots(figsize=(8, 1.2 + 0.5 * len(table)))
    ax.axvline(0, color="black", linewidth=1)
    places = range(len(table))
    lines = []
    groups = list(dict.fromkeys(table.get("group", [])))
    for place, (arm, row) in zip(places, table.iterrows(), strict=True):
        i = groups.index(row["group"]) if groups else 0
        color = COLORS[i]
        ax.plot([row["low"], row["high"]], [place, place], color=color)
        face = color if row["finding"] else "white"
        marker = MARKERS[i]
        ax.plot(row["mean"], place, marker, color=color, markerfacecolor=face)
        name = (names or {}).get(str(arm), str(arm))
        lines.append(f"{name} (n = {row['n']})")
    for i, group in enumerate(groups):
        ax.plot([], [], MARKERS[i], color=COLORS[i], label=group)
    if guess is not None:
        ax.axvline(guess, color=COLORS[-1], linestyle=":", label="your guess")
    if groups or guess is not None:
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
    labels.put_on(ax)
    ax.set(yticks=places, yticklabels=lines)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    show(fig, labels.alt)


def bars(
    values: pd.DataFrame,
    labels: Labels,
    form: str = "{:,.3g}",
    guess: float | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """A bar for each row of `values`, with its number written beside it.

    values: its first column is drawn; columns "low" and "high", if there are any, are
    the ends of an interval. guess: the reader's, drawn as a dotted line. limits: the
    ends of the axis, for a figure that is drawn anew as a control moves.
    """
    fig, ax = plt.subplots(figsize=(8, 1.0 + 0.42 * len(values)))
    drawn = values.iloc[:, 0]
    places = np.arange(len(values))
    ax.barh(places, drawn, color=COLORS[0], height=0.6)
    ends = drawn
    if {"low", "high"} <= set(values.columns):
        for place, low, high in zip(places, values["low"], values["high"], strict=True):
            ax.plot([low, high], [place, place], color="black", linewidth=1.2)
        ends = values[["high"]].max(axis=1)
    _write_beside(ax, [form.format(value) for value in drawn], ends)
    ax.margins(x=0.12)
    _name_rows(ax, values, limits, guess)
    labels.put_on(ax)
    show(fig, labels.alt)


def dots(
    values: pd.DataFrame,
    labels: Labels,
    form: str = "{:,.3g}",
    guess: float | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """As `bars`, for values that differ by powers of ten: dots on a logarithmic axis.

    (A bar has no length there: the axis has no zero to begin at.) Each column of
    `values` has its colour and marker; only the last one's numbers are written.
    """
    fig, ax = plt.subplots(figsize=(8, 1.0 + 0.42 * len(values)))
    for i, column in enumerate(values.columns):
        look = style(i, marker=True) | {"linestyle": "none", "markersize": 7}
        label = str(column) if values.shape[1] > 1 else "_"  # "_": not in a legend
        ax.plot(values[column], np.arange(len(values)), label=label, **look)
    last = values.iloc[:, -1]
    _write_beside(ax, [form.format(value) for value in last], last)
    ax.set_xscale("log")
    ax.margins(x=0.15)
    if values.shape[1] > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    _name_rows(ax, values, limits, guess)
    labels.put_on(ax)
    show(fig, labels.alt)


def _write_beside(ax: Axes, texts: Sequence[str], ends: Iterable[float]) -> None:
    """Write a text to the right of each row's end."""
    for place, (text, end) in enumerate(zip(texts, ends, strict=True)):
        ax.annotate(
            text, (end, place), xytext=(6, 0), textcoords="offset points", va="center"
        )


def _name_rows(
    ax: Axes,
    values: pd.DataFrame,
    limits: tuple[float, float] | None,
    guess: float | None,
) -> None:
    """Rows from the top, with their names; the reader's guess as a dotted line."""
    if limits is not None:
        ax.set_xlim(limits)
    if guess is not None:
        ax.axvline(guess, color=COLORS[1], linestyle=":", label="your guess")
        ax.legend()
    ax.set(yticks=range(len(values)), yticklabels=list(values.index))
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")


def scatter(points: pd.DataFrame, labels: Labels, level: float | None = None) -> None:
    """Points in the plane, each kind with its colour and marker.

    points: columns "kind", "x" and "y". level: a height that the points are read
    against, drawn as a thin line.
    """
    fig, ax = plt.subplots()
    for i, (kind, of_kind) in enumerate(points.groupby("kind", sort=False)):
        look = style(i, marker=True) | {"linestyle": "none"}
        ax.plot(of_kind["x"], of_kind["y"], label=kind, **look)
    if level is not None:
        ax.axhline(level, color="black", linewidth=1)
    labels.put_on(ax)
    ax.legend()
    show(fig, labels.alt)


class Roof(NamedTuple):
    """What a processor can do: its peak, or what was reached on it."""

    name: str
    flop_rate: float  # FLOP/s
    byte_rate: float  # bytes/s


def roofline(points: pd.DataFrame, roofs: Sequence[Roof], labels: Labels) -> None:
    """Work as points under a processor's roof: what limits each of them?

    points: columns "kind" (colour and marker), "name" (written at the point) and
    "intensity", FLOP per byte; they lie on the first roof. A roof is the smaller of
    intensity * byte_rate and flop_rate, and bends at its ridge.
    """
    fig, ax = plt.subplots(figsize=(8, 4.6))
    furthest = max(4096, 4 * points["intensity"].max())
    for roof, line in zip(roofs, ("-", "--", "-."), strict=False):
        ridge = roof.flop_rate / roof.byte_rate
        ends = np.array([0.5, ridge, furthest])
        heights = np.minimum(ends * roof.byte_rate, roof.flop_rate) / 1e12
        label = f"{roof.name}: ridge at {ridge:.0f} FLOP per byte"
        ax.plot(
            ends, heights, color="black", linewidth=1.2, linestyle=line, label=label
        )
    first = roofs[0]
    for i, (kind, of_kind) in enumerate(points.groupby("kind", sort=False)):
        reached = np.minimum(of_kind["intensity"] * first.byte_rate, first.flop_rate)
        look = style(i, marker=True) | {"linestyle": "none", "markersize": 8}
        ax.plot(of_kind["intensity"], reached / 1e12, label=kind, **look)
        places = zip(of_kind["name"], of_kind["intensity"], reached / 1e12, strict=True)
        for name, x, y in places:
            # names of kinds stand at different heights, so that they keep apart
            ax.annotate(
                name,
                (x, y),
                xytext=(8, -12 - 14 * i),
                textcoords="offset points",
                va="top",
                fontsize=9,
                color=look["color"],
            )
    labels.put_on(ax)
    ax.set(xscale="log", yscale="log")
    ax.set_ylim(0.3, 30 * first.flop_rate / 1e12)
    ax.set_xlim(0.4, 4 * furthest)
    ax.legend(loc="upper left", fontsize=9)
    show(fig, labels.alt)


def heat_map(
    values: pd.DataFrame,
    labels: Labels,
    unit: str,
    form: str = "{:.2g}",
    limits: tuple[float, float] | None = None,
) -> None:
    """Rows and columns of `values` as coloured fields with their numbers in them.

    unit: what the colour bar says. limits: the values of the darkest and the lightest
    colour; None: the smallest and the largest there are.
    """
    fig, ax = plt.subplots(figsize=(8, 1.4 + 0.42 * len(values)))
    low, high = limits or (values.min().min(), values.max().max())
    image = ax.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for i, row in enumerate(values.to_numpy()):
        for j, value in enumerate(row):
            color = image.cmap(image.norm(value))
            brightness = np.dot(color[:3], (0.299, 0.587, 0.114))
            ink = "black" if brightness > 0.5 else "white"
            ax.text(j, i, form.format(value), ha="center", va="center", color=ink)
    labels.put_on(ax)
    ax.set(
        xticks=range(values.shape[1]),
        xticklabels=list(values.columns),
        yticks=range(values.shape[0]),
        yticklabels=list(values.index),
    )
    ax.grid(visible=False)
    fig.colorbar(image, label=unit)
    show(fig, labels.alt)


def gantt(tasks: pd.DataFrame, labels: Labels) -> None:
    """Tasks as blocks along the time, a line for each worker.

    tasks: columns worker, start, end, kind (which colour) and label (written in the
    block; "" for none).
    """
    workers = list(dict.fromkeys(tasks["worker"]))
    kinds = list(dict.fromkeys(tasks["kind"]))
    fig, ax = plt.subplots(figsize=(9, 1.4 + 0.4 * len(workers)))
    for i, kind in enumerate(kinds):
        of_kind = tasks[tasks["kind"] == kind]
        ax.barh(
            [workers.index(worker) for worker in of_kind["worker"]],
            of_kind["end"] - of_kind["start"],
            left=of_kind["start"],
            color=COLORS[i % len(COLORS)],
            edgecolor="white",
            linewidth=0.6,
            label=kind,
        )
    for task in tasks.itertuples():
        middle = (task.start + task.end) / 2
        place = workers.index(task.worker)
        ax.text(middle, place, task.label, ha="center", va="center", color="white")
    labels.put_on(ax)
    ax.set(
        yticks=range(len(workers)),
        yticklabels=workers,
    )
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    show(fig, labels.alt)
