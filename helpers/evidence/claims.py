"""The claims of the article: what it says, what is asked here, and the answer."""

from typing import NamedTuple

from helpers.evidence.facts import read_toml


class Claim(NamedTuple):
    """One of the claims a to p, from claims.toml."""

    letter: str
    claim: str
    question: str
    verdict: str
    correction: str
    source: str
    notebook: str


CLAIMS: list[Claim] = [Claim(**row) for row in read_toml("claims.toml")["claim"]]
