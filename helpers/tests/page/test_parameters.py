"""Parameters that cannot work end their cell with one line, before anything runs."""

import math
from typing import Annotated, Literal

from helpers.checks import Count, InputError, NonNegative, Positive, Range, Share
from helpers.page.parameters import (
    ParameterError,
    Seeds,
    at_most,
    between,
    check_parameters,
    require,
    some,
)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HUGE = 10**9


def refusal(value: object, kind: object) -> str:
    """The message with which `n=value` is refused."""
    with pytest.raises(ParameterError) as caught:
        check_parameters(n=(value, kind))
    return str(caught.value)


def test_what_works_passes():
    check_parameters(
        seeds=([0, 1, 2], Seeds),
        steps=(100, Count),
        layer=(1, Annotated[int, Range(1, 3)]),
        layers=(61, between(2, 61)),
        lr=(3e-3, Positive),
        max_bytes=(None, Count | None),
        valid_sequences=(32, at_most(Count, 10_000) | None),
        contexts=([256, 512], some(Count)),
        small=([48, 2], some(Count, 2, 2)),
        show=("all", Literal["all", "wrong"]),
        run_controls=(False, bool),
    )


@pytest.mark.parametrize(
    "value",
    [0, -1, HUGE + 1, 10**400, 1.0, 2.5, "2", True, None, math.nan, math.inf, [1]],
    ids=repr,
)
def test_no_count_but_a_count(value):
    message = refusal(value, at_most(Count, HUGE))
    assert message.startswith("n=")
    assert "cannot work: it must be a whole number of at least 1 and at most" in message


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, True, "0.1", None])
def test_no_rate_but_a_finite_positive_number(value):
    assert "it must be a finite number above 0" in refusal(value, Positive)


@pytest.mark.parametrize("layer", [0, -1, 4, 99, 1.0, True, "1"])
def test_a_layer_that_does_not_exist(layer):
    assert refusal(layer, between(1, 3)) == (
        f"n={layer!r} cannot work: "
        "it must be a whole number of at least 1 and at most 3"
    )


@pytest.mark.parametrize(
    ("seeds", "remedy"),
    [
        ([], "give at least 1"),
        ([0, 1, 0], "each may stand in it once only"),
        ([-1], "it must be a whole number of at least 0"),
        ([2**32], "it must be a whole number of at least 0"),
        ([0.0], "it must be a whole number"),
        ([True], "it must be a whole number"),
        ([[0]], "it must be a whole number"),
        ([math.nan], "it must be a whole number"),
        (0, "it must be a list"),
        ((0, 1), "it must be a list"),
        ("01", "it must be a list"),
        (None, "it must be a list"),
        (range(3), "it must be a list"),
    ],
    ids=repr,
)
def test_seeds_are_a_list_of_different_whole_numbers(seeds, remedy):
    assert remedy in refusal(seeds, Seeds)


def test_a_list_says_how_many_entries_it_may_have():
    assert "give at least 1" in refusal([], some(Count))
    assert "give exactly 2" in refusal([48], some(Count, 2, 2))
    assert "give 1 to 2" in refusal([1, 2, 3], some(Count, 1, 2))
    assert "an entry of n=0 cannot work" in refusal([1, 0], some(Count))


def test_the_entries_count_beside_none_too():
    check_parameters(n=(None, some(Count) | None))
    assert "give at least 1" in refusal([], some(Count) | None)


def test_an_upper_limit_keeps_the_lower_one():
    assert "above 0 and at most 1" in refusal(2.0, at_most(Positive, 1))
    assert "above 0 and at most 1" in refusal(0, at_most(Positive, 1))
    assert "of at least 0 and at most 8" in refusal(9, at_most(NonNegative, 8))
    assert "of at most 3" in refusal(4, at_most(int, 3))
    check_parameters(n=(-5, at_most(int, 3)))


def test_other_kinds():
    assert "true or false" in refusal(1, bool)
    assert "use one of 'all', 'wrong'" in refusal("none", Literal["all", "wrong"])
    assert "at most 1" in refusal(1.5, Share)


def test_the_first_one_is_named_and_its_message_is_one_line():
    with pytest.raises(ParameterError, match="^steps=0 cannot work") as caught:
        check_parameters(seeds=([0], Seeds), steps=(0, Count), lr=(0, Positive))
    assert isinstance(caught.value, InputError)
    assert "\n" not in refusal(np.zeros((3, 3)), Count)


def test_what_no_kind_can_say():
    require(64 % 32 == 0, "redundant", 64, "use a multiple of 32")
    with pytest.raises(ParameterError, match="^redundant=50 cannot work: use a mult"):
        require(50 % 32 == 0, "redundant", 50, "use a multiple of 32")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists
)


@settings(max_examples=40, deadline=None)
@given(value=ANYTHING)
def test_any_value_is_taken_or_refused_by_name(value):
    for kind in (Seeds, some(Count, 1, 2), between(0, 5), at_most(Share, 0.5) | None):
        try:
            check_parameters(n=(value, kind))
        except ParameterError as error:
            assert "n=" in str(error) and "cannot work: " in str(error)  # noqa: PT017


@pytest.mark.slow
def test_jupyter_shows_one_line_and_no_traceback(run_cells):
    [output] = run_cells(
        "layer = 99",
        "from helpers.page.parameters import between, check_parameters\n"
        "check_parameters(layer=(layer, between(1, 3)))\n"
        "print('not reached')",
    )
    line = "layer=99 cannot work: it must be a whole number of at least 1 and at most 3"
    assert output.output_type == "error"
    assert (output.ename, output.evalue) == ("ParameterError", line)
    assert output.traceback == [f"ParameterError: {line}"]
