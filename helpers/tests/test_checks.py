"""What a message about bad input says."""

from typing import Annotated

from helpers.checks import InputError, Range, check

import pytest


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Range(1), "of at least 1"),
        (Range(0, above=True), "above 0"),
        (Range(0, 0.5), "of at least 0 and at most 0.5"),
        (Range(high=20), "of at most 20"),
        (Range(1, 1_234_567), "of at least 1 and at most 1,234,567"),
        (Range(1, 10**12), "of at least 1 and at most 1,000,000,000,000"),
    ],
)
def test_a_range_is_written_in_full(limits, text):
    assert str(limits) == text


def test_a_message_names_field_value_and_limits():
    with pytest.raises(InputError, match="at least 1 and at most 2,000,000") as caught:
        check("rows", 3_000_000, Annotated[int, Range(1, 2_000_000)])
    assert "rows=3000000" in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), 0, 1.5])
def test_what_lies_outside_is_refused(number):
    with pytest.raises(InputError, match="share"):
        check("share", number, Annotated[float, Range(0, 1, above=True)])
