"""How input is checked, everywhere: one message with the field, its value, a remedy.

    steps=0 cannot work: it must be a whole number of at least 1

A dataclass says what its fields may hold in their types, and asks in `__post_init__`:

    @dataclass(frozen=True)
    class Settings:
        steps: Count = 400
        lr: Positive = 3e-3

        def __post_init__(self) -> None:
            check_fields(self)

What one type cannot say (a field that must divide another) is a `need` after it.
"""

import math
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; with `above`, `low` itself is left out."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def holds(self, number: float) -> bool:
        """Whether `number` lies in the range. NaN does not."""
        beyond_low = number > self.low if self.above else number >= self.low
        return beyond_low and number <= self.high

    def __str__(self) -> str:
        low = _in_full(self.low)
        lower = f"above {low}" if self.above else f"of at least {low}"
        if self.high == math.inf:
            return lower
        if self.low == -math.inf:
            return f"of at most {_in_full(self.high)}"
        return f"{lower} and at most {_in_full(self.high)}"


def _in_full(limit: float) -> str:
    """A limit as a person writes it: 1,234,567 and not 1.23457e+06."""
    whole = limit == math.floor(limit) if math.isfinite(limit) else False
    return f"{int(limit):,}" if whole else f"{limit:g}"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


class InputError(ValueError):
    """A value that cannot work. The message names the field and what would."""


def need(ok: bool, field: str, value: object, remedy: str) -> None:
    """Raise InputError `field=value cannot work: remedy` unless `ok`."""
    if not ok:
        raise InputError(f"{field}={value!r} cannot work: {remedy}")


def check(field: str, value: object, kind: Any) -> None:
    """Raise InputError unless `value` is of `kind`.

    kind: bool, int, float (finite; an int will do), str, any of them with a `Range` in
    Annotated, a Literal, a list[...] of these, or a union with None. Of other kinds (a
    dataclass, a dict) only the class is compared.
    """
    bounds = [note for note in getattr(kind, "__metadata__", ()) if type(note) is Range]
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    origin = get_origin(plain)
    if origin in (Union, UnionType):
        _check_union(field, value, get_args(plain))
    elif origin is Literal:
        choices = get_args(plain)
        need(value in choices, field, value, f"use one of {_listed(choices)}")
    elif origin is list:
        need(type(value) is list, field, value, "it must be a list")
        for entry in value if isinstance(value, list) else ():
            check(f"an entry of {field}", entry, get_args(plain)[0])
    elif plain in (int, float):
        _check_number(field, value, plain, bounds)
    elif isinstance(origin or plain, type):
        expected = origin or plain
        right = "true or false" if expected is bool else f"a {expected.__name__}"
        need(isinstance(value, expected), field, value, f"it must be {right}")


def check_fields(instance: Any) -> None:
    """`check` every field of a dataclass against its own type."""
    kinds = get_type_hints(type(instance), include_extras=True)
    for field in fields(instance):
        check(field.name, getattr(instance, field.name), kinds[field.name])


def _check_union(field: str, value: object, kinds: tuple[Any, ...]) -> None:
    if value is None and NoneType in kinds:
        return
    others = [kind for kind in kinds if kind is not NoneType]
    if len(others) == 1:
        check(field, value, others[0])


def _check_number(field: str, value: Any, kind: type, bounds: list[Range]) -> None:
    allowed = (int,) if kind is int else (int, float)
    noun = "a whole number" if kind is int else "a finite number"
    right = " ".join([noun, *map(str, bounds)])
    number = isinstance(value, allowed) and not isinstance(value, bool)
    finite = number and abs(value) <= 1e308
    need(finite, field, value, f"it must be {right}")
    need(
        all(bound.holds(value) for bound in bounds), field, value, f"it must be {right}"
    )


def _listed(choices: tuple[object, ...]) -> str:
    return ", ".join(repr(choice) for choice in choices)
