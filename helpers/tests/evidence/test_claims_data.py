"""The claims as data: a to p, each with a verdict, sources and one notebook."""

import hashlib
import re

from helpers.checks import InputError
from helpers.evidence.claims import (
    CLAIMS,
    SENTENCES,
    STATEMENTS,
    Sentence,
    read_claims,
    read_statements,
)
from helpers.evidence.facts import SOURCES, read_toml, source_keys
from helpers.tests.reading import NOTEBOOKS
from helpers.training.source import REPOSITORY

import pytest

ROWS = read_toml("claims.toml")["claim"]
STATED = read_toml("claims.toml")["statement"]


@pytest.fixture
def article():
    """The text of the article, where it lies beside the checkout."""
    path = REPOSITORY.parent / "shared" / "article.txt"
    if not path.is_file():
        pytest.skip("the article is not there")
    return path.read_text(encoding="utf-8")


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


def test_statements_are_quotes_with_a_translation_and_reasons():
    names = {path.stem for path in NOTEBOOKS}
    for statement in STATEMENTS:
        assert statement.quote.strip() == statement.quote
        assert statement.english != statement.quote
        assert statement.why.endswith("."), statement
        assert statement.notebook in names
        assert statement.measured in names | {""}
    assert {one.letter for one in STATEMENTS} == {claim.letter for claim in CLAIMS}


def test_a_quote_that_is_a_whole_sentence_has_its_hash():
    """True without the article at hand, too."""
    whole = 0
    for statement in STATEMENTS:
        digest = hashlib.sha256(statement.quote.encode()).hexdigest()
        whole += digest == SENTENCES[statement.sentence - 1].sha256
    assert whole > 10
    hashes = [sentence.sha256 for sentence in SENTENCES]
    assert len(set(hashes)) == len(hashes)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)


def test_quotes_and_sentences_are_those_of_the_article(article):
    found = []
    for paragraph in article.splitlines()[1:]:  # the first line is the title
        found += re.split(r"(?<=[.?])\s+(?=[A-ZÁÉÍÓÚÑ¿])", paragraph.strip())
    sentences = [sentence for sentence in found if sentence]
    digests = [hashlib.sha256(one.encode()).hexdigest() for one in sentences]
    assert digests == [sentence.sha256 for sentence in SENTENCES]
    for statement in STATEMENTS:
        assert statement.quote in sentences[statement.sentence - 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "true"}, "verdict='true' cannot work"),
        ({"facts": ["v3.nothing"]}, "facts='v3.nothing' cannot work: facts.toml has"),
        ({"facts": []}, r"facts=\[\] cannot work: give at least one key"),
        ({"letter": "z"}, "letter='z' cannot work: use one of ab"),
        ({"sentence": 2}, r"sentence=\[2\] cannot work: each checkable sentence"),
    ],
)
def test_a_malformed_statement_is_refused(changes, message):
    sentences = [Sentence("", True), Sentence("", False)]
    assert read_statements([STATED[0]], sentences, "ab")
    with pytest.raises(InputError, match=message):
        read_statements([STATED[0] | changes], sentences, "ab")
