"""The claims of the article: what it says, what is asked here, and the answer.

claims.toml has three tables: the groups a to p, every sentence of the article by its
hash, and the statements that can be checked, each in the article's own words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from helpers.checks import Count, check, check_fields, need
from helpers.evidence.facts import FACTS, check_source, read_toml


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


class Sentence(NamedTuple):
    """A sentence of the article by the hash of its text: can it be checked?"""

    sha256: str
    checkable: bool


Verdict = Literal["correct", "partly", "wrong", "cannot be verified"]


@dataclass(frozen=True)
class Statement:
    """One thing that the article states, in its own words, with the verdict on it.

    sentence: the number of its sentence, from 1. letter: of its group. facts: keys of
    facts.toml that the verdict rests on. measured: the recorded result that says
    something about it, such as "01_mixture_of_experts"; "" for none. Raises InputError,
    which names the field, for what cannot be.
    """

    sentence: Count
    letter: str
    quote: str
    english: str
    verdict: Verdict
    why: str
    facts: list[str]
    notebook: str
    measured: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        need(len(self.facts) > 0, "facts", self.facts, "give at least one key")
        for key in self.facts:
            need(key in FACTS, "facts", key, "facts.toml has no such key")


def read_statements(
    rows: list[dict[str, Any]], sentences: list[Sentence], letters: str
) -> list[Statement]:
    """The statements, in the article's order.

    Raises InputError for one out of order, of an unknown group, or of a sentence that
    is marked as not checkable, and for a checkable sentence without a statement.
    """
    statements = [Statement(**row) for row in rows]
    numbers = [statement.sentence for statement in statements]
    need(numbers == sorted(numbers), "sentence", numbers, "keep the article's order")
    for statement in statements:
        group = statement.letter
        need(group in letters, "letter", group, f"use one of {letters}")
    marked = [n for n, one in enumerate(sentences, start=1) if one.checkable]
    remedy = "each checkable sentence has a statement, and no other"
    need(sorted(set(numbers)) == marked, "sentence", numbers, remedy)
    return statements


_TABLES = read_toml("claims.toml")
CLAIMS: list[Claim] = read_claims(_TABLES["claim"])
SENTENCES: list[Sentence] = [Sentence(**row) for row in _TABLES["sentence"]]
STATEMENTS: list[Statement] = read_statements(
    _TABLES["statement"], SENTENCES, "".join(claim.letter for claim in CLAIMS)
)
