"""Published figures, each with its source and how well it was checked.

The figures are data. `facts.toml` has one table a fact, named by its key;
`sources.toml` spells out the sources and what a status means; `configs.toml` has the
published model configurations. `fact("v3.total_params")` prints as
`671B parameters (V3 §4.2; VERIFIED)`. As of 2026-11-22.
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.checks import need

FOLDER = Path(__file__).parent
VALUE_FIELDS = ("value", "range", "values", "pairs")  # a fact has one of them
TEXT_FIELDS = ("unit", "source", "status", "note")


def read_toml(name: str) -> dict[str, Any]:
    """What a TOML file of this folder holds."""
    return tomllib.loads((FOLDER / name).read_text(encoding="utf-8"))


SOURCES: dict[str, str] = read_toml("sources.toml")["sources"]
STATUSES: dict[str, str] = read_toml("sources.toml")["statuses"]


@dataclass(frozen=True, repr=False)
class Fact:
    """One figure.

    `value` is a number or a text, a tuple (low, high), or a dict of several by name; in
    a dict a tuple is (before, after).
    """

    value: Any
    unit: str
    source: str
    status: str
    note: str = ""

    def __post_init__(self) -> None:
        known = self.status in STATUSES
        need(known, "status", self.status, f"use one of {', '.join(STATUSES)}")

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
    return [part.split()[0] for part in source.split(";")]


def read_fact(key: str, row: Mapping[str, Any]) -> Fact:
    """The fact in one table of facts.toml.

    Raises ValueError that names the key for an unknown field, more or less than one
    value, and an unknown status or source.
    """
    for field in row:
        known = field in VALUE_FIELDS or field in TEXT_FIELDS
        fields = ", ".join((*VALUE_FIELDS, *TEXT_FIELDS))
        need(known, f"{key}: field", field, f"use one of {fields}")
    given = [field for field in VALUE_FIELDS if field in row]
    need(len(given) == 1, f"{key}: fields", given, "give exactly one kind of value")
    value = row[given[0]]
    if given == ["range"]:
        value = tuple(value)
    if given == ["pairs"]:
        value = {name: tuple(pair) for name, pair in value.items()}
    source = row.get("source", "")
    for source_key in source_keys(source) if source else [""]:
        known = source_key in SOURCES
        need(known, f"{key}: source", source, "its keys must be in sources.toml")
    return Fact(
        value,
        row.get("unit", ""),
        source,
        row.get("status", ""),
        row.get("note", ""),
    )


FACTS: dict[str, Fact] = {
    key: read_fact(key, row) for key, row in read_toml("facts.toml").items()
}


def fact(key: str) -> Fact:
    """The figure under `key`; an unknown key is a ValueError with the nearest ones."""
    if key not in FACTS:
        near = difflib.get_close_matches(key, FACTS, n=3, cutoff=0.4)
        raise ValueError(f"no fact {key!r}; nearest: {', '.join(near) or 'none'}")
    return FACTS[key]


def _peers(configs: dict[str, dict[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """name -> (model_type, arguments of transformers.AutoConfig.for_model)."""
    peers = {}
    for name, config in configs.items():
        arguments = dict(config)
        peers[name] = (arguments.pop("model_type"), arguments)
    return peers


_CONFIGS = read_toml("configs.toml")
# The config.json of the 671B model as published
V3_CONFIG: dict[str, Any] = _CONFIGS.pop("deepseek_v3")
# The models that it is compared with
PEERS = _peers(_CONFIGS)
