"""The figures that pages draw in one call."""

from helpers.evidence.frames import compare, tidy
from helpers.page import charts
from helpers.page.charts import Labels

import matplotlib.pyplot as plt
import pandas as pd
import pytest

LABELS = Labels(
    "b ends 0.1 lower", "Two curves; b ends at 1.9, a at 2.0.", "steps", "y"
)


@pytest.fixture
def drawn(monkeypatch):
    """What was shown: [(figure, alt)]; figures stay open until the test is over."""
    shown = []
    monkeypatch.setattr(charts, "show", lambda fig, alt: shown.append((fig, alt)))
    yield shown
    plt.close("all")


def two_arms(origins):
    parts = []
    for seed, origin in enumerate(origins):
        arms = {
            "a": {"loss": {10: 3.0, 20: 2.0 + seed}},
            "b": {"loss": {10: 3.0, 20: 1.9 + seed}},
        }
        parts.append(tidy(arms, seed, origin))
    return pd.concat(parts, ignore_index=True)


def legend(fig):
    return [text.get_text() for text in fig.axes[0].get_legend().get_texts()]


def test_curves_draw_a_band_of_recorded_seeds_and_the_live_line(drawn):
    charts.curves(
        two_arms(["live", "recorded", "recorded"]), "loss", LABELS, names={"a": "MHA"}
    )
    [(fig, alt)] = drawn
    ax = fig.axes[0]
    assert alt == LABELS.alt
    assert fig.get_suptitle() == LABELS.title
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("steps", "y")
    assert legend(fig) == [
        "MHA: 2 recorded seeds",
        "MHA: this run",
        "b: 2 recorded seeds",
        "b: this run",
    ]
    assert ax.lines[0].get_ydata().tolist() == [3.0, 2.0]
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (3.0, 4.0)


def test_a_long_title_is_broken_and_stays_within_the_figure(drawn):
    long = LABELS._replace(title="a title that says much of what was found here " * 4)
    charts.curves(two_arms(["live"]), "loss", long)
    [(fig, _)] = drawn
    fig.canvas.draw()
    [title] = [text for text in fig.texts if text.get_text() == fig.get_suptitle()]
    assert "\n" in title.get_text()
    box = title.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= fig.bbox.x1


def test_without_a_live_run_the_line_is_the_mean(drawn):
    charts.curves(two_arms(["recorded", "recorded"]), "loss", LABELS, arms=["b"])
    [(fig, _)] = drawn
    assert legend(fig) == ["b: 2 recorded seeds", "b: mean"]
    assert fig.axes[0].lines[0].get_ydata().tolist() == pytest.approx([3.0, 2.4])


def test_what_is_counted_is_called_by_its_name_alone(drawn):
    charts.curves(two_arms(["counted"]), "loss", LABELS)
    [(fig, _)] = drawn
    assert legend(fig) == ["a", "b"]


def test_differences_fill_only_what_is_a_finding(drawn):
    few = compare(two_arms(["recorded"] * 3), "loss", baseline="a")
    many = compare(two_arms(["recorded"] * 5), "loss", baseline="a")
    for table in (few, many):
        charts.differences(table, LABELS, guess=-0.5)
    faces = []
    for fig, _ in drawn:
        ax = fig.axes[0]
        points = [line for line in ax.lines if line.get_marker() == "o"]
        faces += [point.get_markerfacecolor() for point in points]
        assert legend(fig) == ["your guess"]
    assert faces == ["white", charts.COLORS[0]]
    ticks = [fig.axes[0].get_yticklabels()[0].get_text() for fig, _ in drawn]
    assert ticks == ["b (n = 3)", "b (n = 5)"]


def test_bars_carry_their_numbers_and_intervals(drawn):
    values = pd.DataFrame(
        {"kB": [70.3, 516.0], "low": [60, 500], "high": [80, 530]},
        index=["MLA", "GQA"],
    )
    charts.bars(values, LABELS, form="{:,.0f} kB", guess=100)
    [(fig, _)] = drawn
    ax = fig.axes[0]
    assert [text.get_text() for text in ax.texts] == ["70 kB", "516 kB"]
    assert ax.get_xscale() == "linear"  # a bar begins at zero
    assert [bar.get_width() for bar in ax.patches] == [70.3, 516.0]
    # the interval of each bar, and the guess
    assert len(ax.lines) == 3


def test_dots_for_values_that_differ_by_powers_of_ten(drawn):
    values = pd.DataFrame({"GB": [9.2, 655.0]}, index=["MLA", "MHA"])
    charts.dots(values, LABELS, form="{:.0f} GB", guess=100, limits=(1, 1000))
    [(fig, _)] = drawn
    ax = fig.axes[0]
    assert ax.get_xscale() == "log" and ax.get_xlim() == (1, 1000)
    assert [text.get_text() for text in ax.texts] == ["9 GB", "655 GB"]
    assert ax.lines[0].get_xdata().tolist() == [9.2, 655.0]
    assert legend(fig) == ["your guess"]
    rows = [text.get_text() for text in ax.get_yticklabels()]
    assert rows == ["MLA", "MHA"] and ax.yaxis_inverted()


def test_several_columns_of_dots_have_a_legend(drawn):
    values = pd.DataFrame({"on each": [9.2, 82.0], "in all": [9.2, 655.0]})
    charts.dots(values, LABELS, form="{:.0f}")
    [(fig, _)] = drawn
    assert legend(fig) == ["on each", "in all"]
    assert [text.get_text() for text in fig.axes[0].texts] == ["9", "655"]


def test_groups_of_differences_have_their_colours(drawn):
    table = compare(two_arms(["recorded"] * 5), "loss", baseline="a")
    table = pd.concat([table, table.rename({"b": "c"})]).assign(group=["one", "two"])
    charts.differences(table, LABELS)
    [(fig, _)] = drawn
    assert legend(fig) == ["one", "two"]
    points = [line for line in fig.axes[0].lines if len(line.get_xdata()) == 1]
    assert [point.get_color() for point in points] == charts.COLORS[:2]


def test_a_roofline_bends_at_its_ridge_and_carries_the_points(drawn):
    points = pd.DataFrame(
        [("decode", "one text", 2.0), ("decode", "64", 50.0), ("prompt", "4K", 900.0)],
        columns=["kind", "name", "intensity"],
    )
    roofs = [charts.Roof("peak", 100e12, 1e12), charts.Roof("reached", 60e12, 1e12)]
    charts.roofline(points, roofs, LABELS)
    [(fig, _)] = drawn
    ax = fig.axes[0]
    x, y = ax.lines[0].get_data()
    assert x[1] == 100 and y.tolist()[1:] == [100, 100] and y[0] == x[0]
    assert ax.lines[1].get_xdata()[1] == 60
    assert legend(fig)[:2] == [
        "peak: ridge at 100 FLOP per byte",
        "reached: ridge at 60 FLOP per byte",
    ]
    reached = {line.get_label(): line.get_ydata().tolist() for line in ax.lines[2:]}
    assert reached == {"decode": [2.0, 50.0], "prompt": [100.0]}
    assert {text.get_text() for text in ax.texts} >= {"one text", "64", "4K"}


def test_a_level_that_curves_are_read_against(drawn):
    charts.curves(two_arms(["live"]), "loss", LABELS, ["a"], log="xy", level=2.5)
    [(fig, _)] = drawn
    ax = fig.axes[0]
    assert [*ax.lines[-1].get_ydata()] == [2.5, 2.5]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_a_heat_map_writes_its_numbers_in_an_ink_that_can_be_read(drawn):
    values = pd.DataFrame([[0.0, 1.0], [0.5, 0.25]], index=["1K", "4K"], columns=[1, 8])
    charts.heat_map(values, LABELS, unit="share")
    [(fig, _)] = drawn
    texts = fig.axes[0].texts
    assert [text.get_text() for text in texts] == ["0", "1", "0.5", "0.25"]
    assert texts[0].get_color() == "white"  # on the darkest field
    assert texts[1].get_color() == "black"  # on the lightest


def test_a_gantt_chart_has_a_line_for_each_worker(drawn):
    tasks = pd.DataFrame(
        [("GPU 0", 0, 1, "forward", "1"), ("GPU 1", 1, 3, "backward", "1")],
        columns=["worker", "start", "end", "kind", "label"],
    )
    charts.gantt(tasks, LABELS)
    [(fig, _)] = drawn
    ax = fig.axes[0]
    assert [bar.get_width() for bar in ax.patches] == [1, 2]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["GPU 0", "GPU 1"]
    assert legend(fig) == ["forward", "backward"]


def test_points_of_each_kind_are_told_apart(drawn):
    points = pd.DataFrame(
        [("with", 0.1, 1.0), ("without", 0.1, 0.5), ("without", -0.2, 3.0)],
        columns=["kind", "x", "y"],
    )
    charts.scatter(points, LABELS, level=1)
    [(fig, _)] = drawn
    assert legend(fig) == ["with", "without"]
    first, second, level = fig.axes[0].lines
    assert first.get_xydata().tolist() == [[0.1, 1.0]]
    assert second.get_xydata().tolist() == [[0.1, 0.5], [-0.2, 3.0]]
    assert first.get_marker() != second.get_marker()
    assert set(level.get_ydata()) == {1}
