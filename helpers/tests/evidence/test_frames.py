"""Tidy frames of recorded seeds, and the rule by which arms are compared."""

import json
import math

from helpers.checks import InputError
from helpers.evidence import frames, results
from helpers.evidence.frames import compare, frame, holm, seeds_needed, tidy

import numpy as np
import pandas as pd
import pytest
from scipy import stats

NAME = "02_latent_attention"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path))


def of_seeds(differences, metric="loss"):
    """Arms "a" and "b" whose last values differ by so much, seed by seed."""
    parts = []
    for seed, difference in enumerate(differences):
        level = 3.0 + seed  # seeds differ far more than arms do
        arms = {
            "a": {metric: {10: level + 1, 20: level}},
            "b": {metric: {10: level + 5, 20: level + difference}},
        }
        parts.append(tidy(arms, seed, "recorded"))
    return pd.concat(parts, ignore_index=True)


def test_a_frame_has_a_row_for_each_number():
    found = tidy({"a": {"loss": {"10": 2.0, "20": 1.5}, "bytes": 7}}, seed=3)
    assert found.to_dict("records") == [
        {"seed": 3, "arm": "a", "metric": "loss", "step": 10, "value": 2.0}
        | {"origin": "live"},
        {"seed": 3, "arm": "a", "metric": "loss", "step": 20, "value": 1.5}
        | {"origin": "live"},
        {"seed": 3, "arm": "a", "metric": "bytes", "step": 0, "value": 7.0}
        | {"origin": "live"},
    ]


def test_recorded_seeds_come_back_and_live_ones_stand_beside_them():
    parameters = {"steps": 20}
    for seed in (0, 1):
        arms = {"a": {"loss": {10: 2.0 + seed}}}
        results.record(NAME, parameters, seed, {"arms": arms}, runs={})
    live = {0: {"a": {"loss": {10: 9.0}}}}
    found = frame(NAME, parameters, live)
    kept = found[["seed", "origin", "value"]].to_dict("split")["data"]
    assert kept == [[0, "recorded", 2.0], [1, "recorded", 3.0], [0, "live", 9.0]]
    assert frames.at_the_end(found, "loss")["a"].to_dict() == {0: 2.0, 1: 3.0}
    assert list(frame(NAME, {"steps": 21}).columns) == frames.COLUMNS
    assert frame(NAME, {"steps": 21}).empty


def test_a_damaged_file_leaves_the_live_run_and_a_line(capsys):
    folder = results.results_dir()
    folder.mkdir(parents=True)
    (folder / f"{NAME}.json").write_text('{"name": ', encoding="utf-8")
    found = frame(NAME, {}, {0: {"a": {"loss": 1.0}}})
    assert found["origin"].tolist() == ["live"]
    assert f"{NAME}.json" in capsys.readouterr().out


def test_results_without_arms_are_no_part_of_a_frame():
    results.record(NAME, {}, 0, {"loss": [1.0]}, runs={})
    assert frame(NAME, {}).empty
    assert json.loads(
        (results.results_dir() / f"{NAME}.json").read_text(encoding="utf-8")
    )


def test_the_interval_is_that_of_the_paired_t_test():
    differences = [0.02, 0.05, 0.03, 0.06, 0.04]
    table = compare(of_seeds(differences), "loss", baseline="a")
    row = table.loc["b"]
    theirs = stats.ttest_1samp(differences, 0)
    low, high = theirs.confidence_interval(0.95)
    assert row["n"] == 5
    assert row["mean"] == pytest.approx(0.04)
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert row["p"] == pytest.approx(theirs.pvalue)
    assert row["p_holm"] == pytest.approx(theirs.pvalue)
    assert bool(row["finding"])


@pytest.mark.parametrize(
    ("differences", "finding"),
    [
        ([0.02, 0.05, 0.03, 0.06], False),  # four seeds are too few
        ([0.02, -0.05, 0.03, 0.06, -0.04], False),  # the interval holds zero
        ([0.04] * 5, True),  # no spread at all
        ([0.0] * 5, False),
    ],
    ids=["four seeds", "around zero", "no spread", "no difference"],
)
def test_what_is_a_finding(differences, finding):
    table = compare(of_seeds(differences), "loss", baseline="a")
    assert bool(table.loc["b", "finding"]) == finding


def test_one_seed_has_a_difference_and_no_interval():
    row = compare(of_seeds([0.02]), "loss", baseline="a").loc["b"]
    assert row["n"] == 1
    assert row["mean"] == pytest.approx(0.02)
    assert math.isnan(row["low"]) and math.isnan(row["p"])
    assert not row["finding"]


def test_only_seeds_that_both_arms_have_are_compared():
    found = of_seeds([0.1, 0.2, 0.3])
    lost = (found["seed"] == 1) & (found["arm"] == "b")
    row = compare(found[~lost], "loss", baseline="a").loc["b"]
    assert row["n"] == 2
    assert row["mean"] == pytest.approx(0.2)


@pytest.mark.slow
def test_several_comparisons_of_nothing_are_rarely_findings():
    rng = np.random.default_rng(0)
    found_something = 0
    for _ in range(200):
        values = rng.normal(size=(5, 6))
        parts = []
        for seed, row in enumerate(values):
            arms = {str(i): {"loss": float(x)} for i, x in enumerate(row)}
            parts.append(tidy(arms, seed, "recorded"))
        table = compare(pd.concat(parts), "loss", baseline="0")
        found_something += bool(table["finding"].any())
    # at the 5 % level about 10 of 200 pages; without the correction about 30
    assert found_something <= 18


def test_comparisons_of_one_page_are_corrected_together():
    found = of_seeds([0.02, 0.05, 0.03, 0.06, 0.01])
    one = compare(found, "loss", baseline="a")
    chosen = {"loss": [("b", "a"), ("a", "b")], "speed": [("b", "a")]}
    page = frames.pairs(found, chosen)
    assert list(page.index) == ["b minus a", "a minus b", "b minus a"]
    assert list(page["metric"]) == ["loss", "loss", "speed"]
    page = page.reset_index()
    assert page.loc[0, "mean"] == one.loc["b", "mean"]
    # what is not recorded does not count in the correction either
    p = one.loc["b", "p"]
    assert page["p_holm"].tolist()[:2] == pytest.approx([2 * p, 2 * p])
    assert page["n"].tolist() == [5, 5, 0]
    assert page["finding"].tolist() == [2 * p < 0.05, 2 * p < 0.05, False]


def test_holm_is_the_published_procedure():
    # Holm 1979: 0.01 * 4, then 0.02 * 3, then the larger of that and 0.03 * 2, ...
    corrected = holm([0.03, 0.01, 0.9, 0.02])
    assert corrected == pytest.approx([0.06, 0.04, 0.9, 0.06])
    nothing, one = holm([math.nan, 0.04])
    assert math.isnan(nothing) and one == pytest.approx(0.04)
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_more_seeds_are_needed_for_smaller_differences():
    # the textbook: an effect of one standard deviation needs 10 pairs for 80 %
    assert seeds_needed(1.0, 1.0) == 10
    assert seeds_needed(0.5, 1.0) == 34
    with pytest.raises(InputError, match="difference=0"):
        seeds_needed(0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"metric": "bits", "baseline": "a"}, "metric='bits'"),
        ({"metric": "loss", "baseline": "c"}, "baseline='c'"),
        ({"metric": "loss", "baseline": "a", "arms": ["d"]}, "arms='d'"),
    ],
    ids=["metric", "baseline", "arm"],
)
def test_what_is_not_there_is_named(arguments, field):
    with pytest.raises(InputError, match=f"{field} cannot work: use"):
        compare(of_seeds([0.1]), **arguments)
