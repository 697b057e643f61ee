"""The claims as data: a to p, each with a verdict, sources and one notebook."""

import re

from helpers.checks import InputError
from helpers.evidence.claims import CLAIMS, read_claims
from helpers.evidence.facts import SOURCES, read_toml, source_keys

import pytest

ROWS = read_toml("claims.toml")["claim"]


def test_claims_a_to_p_each_name_one_notebook():
    assert "".join(claim.letter for claim in CLAIMS) == "abcdefghijklmnop"
    for claim in CLAIMS:
        assert re.fullmatch(r"(0[1-9]|1[01])_[a-z][a-z0-9_]+", claim.notebook), claim
        words = "CORRECT|PARTLY|WRONG|UNVERIFIABLE"
        assert re.search(words, claim.verdict), claim
        assert claim.claim.endswith("."), claim
        assert claim.question.endswith("?"), claim
        assert claim.correction.endswith("."), claim


def test_claim_notebooks_have_one_name_per_number():
    names = {claim.notebook for claim in CLAIMS}
    assert len({name[:2] for name in names}) == len(names)


def test_every_source_key_is_explained():
    used = {key for claim in CLAIMS for key in source_keys(claim.source)}
    assert used - SOURCES.keys() == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdikt": "CORRECT"}, "claim a: field='verdikt' cannot work: use letter"),
        ({"verdict": None}, "claim a: verdict=None cannot work: it must be a str"),
        ({"question": 3}, "claim a: question=3 cannot work"),
        ({"source": "V9 §1"}, "claim a: source='V9 §1' cannot work: name keys"),
    ],
)
def test_a_malformed_claim_is_refused_by_its_letter(changes, message):
    row = {k: v for k, v in (ROWS[0] | changes).items() if v is not None}
    with pytest.raises(InputError) as error:
        read_claims([row])
    assert message in str(error.value)


def test_a_letter_given_twice_is_refused():
    with pytest.raises(InputError, match="letters='aa' cannot work: each once"):
        read_claims([ROWS[0], ROWS[0]])
