"""Published figures, each with its source and how well it was checked.

The figures are data. `facts.toml` has one table a fact, named by its key;
`sources.toml` spells out the sources and what a status means; `configs.toml` has the
published model configurations. `fact("v3.total_params")` prints as
`671B parameters (V3 §4.2; VERIFIED)`. As of 2026-11-25.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.checks import InputError, check, need

FOLDER = Path(__file__).parent
VALUE_FIELDS = ("value", "range", "values", "pairs")  # a fact has one of them
TEXT_FIELDS = ("unit", "source", "status", "note")


def read_toml(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """What a TOML file of this folder holds.

    Raises InputError that names file and line for what is not TOML, and for a key or
    table that stands there twice.
    """
    text = (folder / name).read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name} cannot work: {error}") from None


_LEGEND = read_toml("sources.toml")
SOURCES: dict[str, str] = _LEGEND["sources"]
STATUSES: dict[str, str] = _LEGEND["statuses"]


@dataclass(frozen=True, repr=False)
class Fact:
    """One figure.

    `value` is a number or a text, a tuple (low, high), or a dict of several by name; in
    a dict a tuple is (before, after). Raises InputError for an unknown status.
    """

    value: Any
    unit: str
    source: str
    status: str
    note: str = ""

    def __post_init__(self) -> None:
        check_status("status", self.status)

    def __str__(self) -> str:
        figure = f"{readable(self.value)} {self.unit}".strip()
        status = "not checked" if self.status == "MEMORY" else self.status
        return f"{figure} ({self.source}; {status})"

    def __repr__(self) -> str:
        if self.note:
            return f"{self} - {self.note}"
        return str(self)


def readable(value: Any, between: str = "–") -> str:
    """A figure as people write it: 671B, 14.8T, 70,272, 2.2e-4.

    A tuple is a range, a dict a row of a table; a text (a date) stays.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        entries = [f"{name} {readable(entry, '→')}" for name, entry in value.items()]
        return ", ".join(entries)
    if isinstance(value, tuple):
        return between.join(readable(entry) for entry in value)
    if abs(value) >= 1e15 or 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.6g}{suffix}"
    return f"{value:,.6g}"


def source_keys(source: str) -> list[str]:
    """The keys in a source: `"V3 §4.2; ISCA §4.1"` gives `["V3", "ISCA"]`."""
    parts = [part.split() for part in source.split(";")]
    return [words[0] for words in parts if words]


def check_source(field: str, source: str) -> None:
    """Raise InputError unless the source names a key, and all its keys are known."""
    check(field, source, str)
    keys = source_keys(source)
    known = bool(keys) and all(key in SOURCES for key in keys)
    need(known, field, source, "name keys that sources.toml explains")


def check_status(field: str, status: str) -> None:
    """Raise InputError unless sources.toml explains the status."""
    need(status in STATUSES, field, status, f"use one of {', '.join(STATUSES)}")


def read_fact(key: str, row: Mapping[str, Any]) -> Fact:
    """The fact in one table of facts.toml; `key` is the table's name.

    Raises InputError that names the key for an unknown field, for no value or several,
    for a value that is not what its field says, and for an unknown source or status.
    """
    fields = (*VALUE_FIELDS, *TEXT_FIELDS)
    for field in row:
        need(field in fields, f"{key}: field", field, f"use one of {', '.join(fields)}")
    given = [field for field in VALUE_FIELDS if field in row]
    need(len(given) == 1, f"{key}: fields", given, "give exactly one kind of value")
    texts = {field: row.get(field, "") for field in TEXT_FIELDS}
    for field, text in texts.items():
        check(f"{key}: {field}", text, str)
    check_source(f"{key}: source", texts["source"])
    check_status(f"{key}: status", texts["status"])
    return Fact(_read_value(key, given[0], row[given[0]]), **texts)


def _read_value(key: str, kind: str, entry: Any) -> Any:
    """The Python value of a fact: what TOML writes as a list is a tuple here."""
    field = f"{key}: {kind}"
    if kind == "value":
        _check_figure(field, entry)
        return entry
    if kind == "range":
        low, high = _read_two(field, entry)
        need(low <= high, field, entry, "the lower end comes first")
        return low, high
    check(field, entry, dict)
    need(len(entry) > 0, field, entry, "give at least one figure")
    if kind == "pairs":
        return {name: _read_two(field, pair) for name, pair in entry.items()}
    for figure in entry.values():
        _check_figure(field, figure)
    return entry


def _read_two(field: str, entry: Any) -> tuple[float, float]:
    two = isinstance(entry, list) and len(entry) == 2
    need(two, field, entry, "give two numbers in brackets")
    for number in entry:
        check(field, number, float)
    first, second = entry
    return first, second


def _check_figure(field: str, figure: Any) -> None:
    if isinstance(figure, str):
        return
    number = type(figure) in (int, float)
    need(number, field, figure, "give a number, or a text (a date too) in quotes")
    check(field, figure, float)


FACTS: dict[str, Fact] = {
    key: read_fact(key, row) for key, row in read_toml("facts.toml").items()
}


def fact(key: str) -> Fact:
    """The figure under `key`; an unknown key is a ValueError with the nearest ones."""
    if key not in FACTS:
        near = difflib.get_close_matches(key, FACTS, n=3, cutoff=0.4)
        raise InputError(f"no fact {key!r}; nearest: {', '.join(near) or 'none'}")
    return FACTS[key]


def _read_peers(
    configs: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[str, dict[str, Any]]]:
    """name -> (model_type, arguments of transformers.AutoConfig.for_model)."""
    peers = {}
    for name, config in configs.items():
        arguments = dict(config)
        peers[name] = (arguments.pop("model_type"), arguments)
    return peers


_CONFIGS = read_toml("configs.toml")
# The config.json of the 671B model as published
V3_CONFIG: dict[str, Any] = _CONFIGS["deepseek_v3"]
# The models that it is compared with
PEERS = _read_peers(_CONFIGS["peers"])
