"""The check of a notebook's parameters, in the cell after them.

    check_parameters(
        seeds=(seeds, Seeds),
        steps=(steps, at_most(Count, 100_000)),
        layers=(layers, between(2, 61)),
        max_bytes=(max_bytes, Count | None),
    )
    check_parameters(layer=(layer, between(1, layers - 1)))  # needs a checked `layers`
    require(length % 32 == 0, "length", length, "it must be a multiple of 32")

A value that cannot work ends the cell with one line, before anything is computed:

    ParameterError: layer=99 cannot work: it must be a whole number of at least 1 ...
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, get_args

from helpers.checks import InputError, Range, check, need


class ParameterError(InputError):
    """A parameter that cannot work. Jupyter shows its message and no traceback."""

    def _render_traceback_(self) -> list[str]:
        """The lines that IPython prints in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class Entries:
    """How many entries a list has, and whether one may stand in it twice."""

    at_least: int = 1
    at_most: int | None = None
    distinct: bool = False

    def check(self, field: str, value: list[object]) -> None:
        """Raise InputError unless the list is as this says."""
        need(len(value) >= self.at_least, field, value, f"give {self}")
        if self.at_most is not None:
            need(len(value) <= self.at_most, field, value, f"give {self}")
        if self.distinct:
            once = len(set(value)) == len(value)
            need(once, field, value, "each may stand in it once only")

    def __str__(self) -> str:
        if self.at_most is None:
            return f"at least {self.at_least}"
        if self.at_most == self.at_least:
            return f"exactly {self.at_least}"
        return f"{self.at_least} to {self.at_most}"


# Kinds, beside those of `helpers.checks` (Count, Whole, Positive, Share, ...). A kind
# is an annotation, and annotations have no common type: hence `Any` in this module.

# numpy draws from seeds below 2**32 only
Seeds = Annotated[list[Annotated[int, Range(0, 1e9)]], Entries(distinct=True)]


def between(low: int, high: int) -> Any:
    """The kind of a whole number from `low` to `high`, both included."""
    return Annotated[int, Range(low, high)]


def at_most(kind: Any, high: float) -> Any:
    """`kind`, a number, with an upper limit: `at_most(Count, 1000)`."""
    number = get_args(kind)[0] if get_args(kind) else kind
    for note in getattr(kind, "__metadata__", ()):
        if isinstance(note, Range):
            return Annotated[number, replace(note, high=high)]
    return Annotated[number, Range(high=high)]


def some(kind: Any, least: int = 1, most: int | None = None) -> Any:
    """The kind of a list with `least` to `most` entries of `kind`: `some(Count)`."""
    return Annotated[list[kind], Entries(least, most)]


def check_parameters(**named: tuple[object, Any]) -> None:
    """Raise ParameterError for the first parameter that is not of its kind.

    named: for each parameter its value and its kind. A kind that is computed from
    another parameter belongs in a second call, after that parameter was checked.
    """
    try:
        for field, (value, kind) in named.items():
            check(field, value, kind)
            _check_entries(field, value, kind)
    except InputError as error:
        raise ParameterError(_in_one_line(error)) from None


def require(ok: bool, field: str, value: object, remedy: str) -> None:
    """Raise ParameterError `field=value cannot work: remedy` unless `ok`.

    For what no kind can say, such as a number that must divide another.
    """
    try:
        need(ok, field, value, remedy)
    except InputError as error:
        raise ParameterError(_in_one_line(error)) from None


def _check_entries(field: str, value: object, kind: Any) -> None:
    """Hold a list against the `Entries` of its kind, also in a union with None."""
    for choice in (kind, *get_args(kind)):
        for note in getattr(choice, "__metadata__", ()):
            if isinstance(note, Entries) and isinstance(value, list):
                note.check(field, value)


def _in_one_line(error: InputError) -> str:
    # the repr of an array spreads over several lines
    return " ".join(str(error).split())
