"""The one look, bands of recorded runs, and pictures that carry their text."""

import subprocess
import sys
from pathlib import Path

from helpers.page import figures
from helpers.tests import reading

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from IPython.utils.capture import capture_output

ROOT = Path(__file__).resolve().parents[3]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def test_styles_differ_in_colour_line_and_marker():
    assert len(figures.COLORS) == len(figures.STYLES) == len(figures.MARKERS) == 7
    for looks in (figures.COLORS, figures.STYLES, figures.MARKERS):
        assert len(set(looks)) == len(looks)


def test_a_style_starts_again_after_the_last_one():
    assert figures.style(7) == figures.style(0)
    assert figures.style(1) == {"color": "#D55E00", "linestyle": "--"}
    assert figures.style(9, marker=True) == figures.style(2) | {
        "marker": "^",
        "markersize": 5,
    }


def test_every_style_can_be_drawn(ax):
    for i in range(8):
        ax.plot([0, 1], [i, i + 1], **figures.style(i, marker=True))
    ax.figure.canvas.draw()


@pytest.mark.slow
def test_the_look_is_set_on_import_and_by_this_module_only():
    assert matplotlib.rcParams["lines.linewidth"] == 1.8
    script = (
        "import sys, helpers.page.parameters, helpers.page\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import matplotlib\n"
        "assert matplotlib.rcParams['lines.linewidth'] == 1.5\n"
        "import helpers.page.figures\n"
        "assert matplotlib.rcParams['lines.linewidth'] == 1.8\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_recorded_runs_are_a_band_and_the_live_run_a_line(ax):
    runs = [[1.0, 4.0], [3.0, 2.0], [2.0, 3.0]]
    figures.spread(ax, [0, 1], runs, 2, "loss", live=[5.0, 6.0])
    [band] = ax.collections
    heights = {tuple(point) for point in band.get_paths()[0].vertices}
    assert {(0.0, 1.0), (0.0, 3.0), (1.0, 2.0), (1.0, 4.0)} <= heights
    assert band.get_label() == "loss: 3 recorded seeds"
    [line] = ax.lines
    assert np.array_equal(line.get_ydata(), [5.0, 6.0])
    assert line.get_label() == "loss: live run"
    assert line.get_color() == figures.COLORS[2]


@pytest.mark.parametrize(
    ("runs", "live", "bands", "lines"),
    [([], [1.0], 0, 1), ([[1.0]], None, 1, 0), ([], None, 0, 0)],
)
def test_either_may_be_missing(ax, runs, live, bands, lines):
    figures.spread(ax, [0], runs, 0, "loss", live=live)
    assert (len(ax.collections), len(ax.lines)) == (bands, lines)


def test_a_figure_is_shown_once_with_its_alt_text_and_closed(shell):
    fig, _ = plt.subplots()
    with capture_output() as caught:
        figures.show(fig, 'Two "bars": 1 < 2.')
    [output] = caught.outputs
    assert set(output.data) == {"text/html", "text/plain"}
    assert output.data["text/plain"] == 'Two "bars": 1 < 2.'
    shown = nbformat.v4.new_output("display_data", output.data)
    [picture] = reading.pictures(shown)
    assert picture.png.startswith(PNG)
    assert picture.alt == 'Two "bars": 1 < 2.'
    assert not plt.fignum_exists(fig.number)
