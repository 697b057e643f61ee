"""Recorded measurements as one tidy frame, and the one rule by which arms are compared.

A frame has a row for each number: seed, arm, metric, step and value, and `origin`:
"recorded", "live" for what this notebook has just run, or "counted" for what no chance
is in.

The rule: arms share seed and data, so what is compared is the *paired* difference, seed
by seed. It is a finding only if the 95 % t-interval over at least 5 seeds leaves out
zero, after Holm's correction where one page makes several comparisons. Otherwise the
arms are "not separable" at this size, and the interval says how large a difference
could have been missed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from helpers.checks import need
from helpers.evidence import results

import pandas as pd
from scipy import stats

COLUMNS = ["seed", "arm", "metric", "step", "value", "origin"]
LEAST_SEEDS = 5
LEVEL = 0.95

# {arm: {metric: number, or {step: number}}}; JSON makes the steps into text
Arms = Mapping[str, Mapping[str, float | Mapping[Any, float]]]


def tidy(arms: Arms, seed: int, origin: str = "live") -> pd.DataFrame:
    """One seed's numbers as a frame. A metric without steps gets step 0."""
    rows = []
    for arm, metrics in arms.items():
        for metric, found in metrics.items():
            curve = found if isinstance(found, Mapping) else {0: found}
            for step, value in curve.items():
                rows.append((seed, arm, metric, int(step), float(value), origin))
    return pd.DataFrame(rows, columns=COLUMNS)


def frame(
    name: str,
    parameters: Mapping[str, Any],
    live: Mapping[int, Arms] | None = None,
) -> pd.DataFrame:
    """All that was recorded as `name` with these parameters, and the live seeds.

    live: {seed: arms} of the runs of this notebook. A seed that is live and recorded
    stands in the frame twice, once of each origin; `compare` takes the recorded one.
    Stale seeds are left out, and so is a file that cannot be read: each with a printed
    line.
    """
    parts = []
    for seed, data in _readable(name, parameters).items():
        parts.append(tidy(data["arms"], seed, "recorded"))
    for seed, arms in (live or {}).items():
        parts.append(tidy(arms, seed))
    if not parts:
        return pd.DataFrame(columns=COLUMNS)
    return pd.concat(parts, ignore_index=True)


def _readable(name: str, parameters: Mapping[str, Any]) -> dict[int, Any]:
    """The recorded seeds that hold arms; a damaged file holds none."""
    try:
        found = results.recorded(name, parameters)
    except (ValueError, OSError) as error:
        print(f"recorded seeds left out: {error}")
        return {}
    return {seed: data for seed, data in found.items() if "arms" in data}


def at_the_end(found: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The last value of a metric: a row for each seed, a column for each arm.

    Where a seed is both live and recorded the recorded one counts.
    """
    of_metric = found[found["metric"] == metric]
    # "recorded" comes last in this order, and the last one stays
    ordered = of_metric.sort_values(["origin", "step"])
    last = ordered.drop_duplicates(["seed", "arm"], keep="last")
    return last.pivot(index="seed", columns="arm", values="value")


def compare(
    found: pd.DataFrame,
    metric: str,
    baseline: str,
    arms: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Each arm beside `baseline`: paired differences of the last value of `metric`.

    A row for each arm, with n (seeds that both have), mean (arm - baseline), low and
    high (95 % t-interval), p (two-sided paired t-test), p_holm (corrected for the
    number of arms here; `pairs` does it for a whole page) and finding (see this
    module's rule). low, high and p are NaN below two seeds. Raises InputError for a
    metric or an arm that is not there.
    """
    metrics = sorted(set(found["metric"]))
    need(metric in metrics, "metric", metric, f"use one of {', '.join(metrics)}")
    values = at_the_end(found, metric)
    known = ", ".join(map(str, values.columns))
    need(baseline in values, "baseline", baseline, f"use one of {known}")
    if arms is None:
        arms = [arm for arm in values.columns if arm != baseline]
    rows = {}
    for arm in arms:
        need(arm in values, "arms", arm, f"use some of {known}")
        differences = (values[arm] - values[baseline]).dropna()
        rows[arm] = _paired(differences)
    return _judged(rows)


def pairs(
    found: pd.DataFrame, chosen: Mapping[str, Sequence[tuple[str, str]]]
) -> pd.DataFrame:
    """The comparisons of a whole page: as `compare`, for chosen pairs of arms.

    chosen: {metric: [(arm, baseline)]}; a row is called "arm minus baseline", and has a
    column "metric" before those of `compare`. p_holm is corrected for all of them
    together. A pair of which nothing is recorded has n = 0.
    """
    rows = {}
    metrics = []
    for metric, of_metric in chosen.items():
        values = at_the_end(found, metric)
        for arm, baseline in of_metric:
            differences = pd.Series(dtype=float)
            if arm in values and baseline in values:
                differences = (values[arm] - values[baseline]).dropna()
            rows[metric, f"{arm} minus {baseline}"] = _paired(differences)
            metrics.append(metric)
    table = _judged(rows)
    table.index = pd.Index([name for _, name in rows], name="arm")
    table.insert(0, "metric", metrics)
    return table


def _judged(
    rows: Mapping[Any, tuple[int, float, float, float, float]],
) -> pd.DataFrame:
    """Rows of `_paired` as a table, corrected for their number."""
    table = pd.DataFrame.from_dict(
        rows, orient="index", columns=["n", "mean", "low", "high", "p"]
    )
    table["n"] = table["n"].astype(int)
    table["p_holm"] = holm(table["p"])
    enough = table["n"] >= LEAST_SEEDS
    table["finding"] = enough & (table["p_holm"] < 1 - LEVEL)
    table.index.name = "arm"
    return table


def _paired(differences: "pd.Series[float]") -> tuple[int, float, float, float, float]:
    """n, mean, both ends of the interval, p."""
    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        return n, mean, math.nan, math.nan, math.nan
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)) * error
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return n, mean, mean - reach, mean + reach, p


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's step-down correction, in the order given; NaN stays, and does not count.

    The k-th smallest of m is multiplied by m - k + 1, and none is below a smaller one.
    """
    given = list(p_values)
    known = [i for i, p in enumerate(given) if not math.isnan(p)]
    known.sort(key=given.__getitem__)
    corrected = list(given)
    least = 0.0
    for rank, i in enumerate(known):
        least = max(least, min(1.0, given[i] * (len(known) - rank)))
        corrected[i] = least
    return corrected


def seeds_needed(difference: float, deviation: float, power: float = 0.8) -> int:
    """How many paired seeds would show `difference` with this probability.

    deviation: the standard deviation of the paired differences. From the t-test's
    power at the 5 % level. Raises InputError unless both are above 0.
    """
    need(difference > 0, "difference", difference, "it must be above 0")
    need(deviation > 0, "deviation", deviation, "it must be above 0")
    n = 2
    while n < 1_000_000:
        critical = stats.t.ppf(0.5 + LEVEL / 2, n - 1)
        shift = difference / deviation * math.sqrt(n)
        if stats.nct.sf(critical, n - 1, shift) >= power:
            return n
        n += 1
    return n
