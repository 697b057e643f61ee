"""The claims of the article: what it says, what is asked here, and the answer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from helpers.checks import check, need
from helpers.evidence.facts import check_source, read_toml


class Claim(NamedTuple):
    """One of the claims a to p, from claims.toml."""

    letter: str
    claim: str
    question: str
    verdict: str
    correction: str
    source: str
    notebook: str


def read_claim(row: Mapping[str, Any]) -> Claim:
    """The claim in one table of claims.toml.

    Raises InputError that names the claim for a field that is unknown, missing or no
    text, and for an unknown source.
    """
    name = f"claim {row.get('letter', '?')}"
    for field in row:
        known = field in Claim._fields
        need(known, f"{name}: field", field, f"use {', '.join(Claim._fields)}")
    for field in Claim._fields:
        check(f"{name}: {field}", row.get(field), str)
    check_source(f"{name}: source", row["source"])
    return Claim(**row)


def read_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """The claims in the order of their letters; a letter given twice is an error."""
    claims = [read_claim(row) for row in rows]
    letters = [claim.letter for claim in claims]
    ordered = letters == sorted(set(letters))
    need(ordered, "letters", "".join(letters), "each once, in alphabetical order")
    return claims


CLAIMS: list[Claim] = read_claims(read_toml("claims.toml")["claim"])
