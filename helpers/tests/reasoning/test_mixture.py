"""One vocabulary for Python and Countdown."""

from helpers.checks import InputError
from helpers.reasoning import mixture, writers
from helpers.reasoning.countdown import VOCABULARY
from helpers.reasoning.mixture import CHUNK, SHIFT, mixed, python_ids
from helpers.tests.builders import write_texts
from helpers.training import corpus as text
from helpers.training.corpus import END

import pytest
import torch


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small text in the form of the Python corpus."""
    folder = write_texts(tmp_path_factory.mktemp("corpus") / "texts")
    return text.load(folder, vocab_size=300)


@pytest.fixture(scope="module")
def words():
    return writers.corpus(writers.Writers(), tokens=4000, seed=0, valid_tokens=200)


def test_python_follows_the_words_and_shares_their_end(corpus):
    ids = python_ids(corpus.train)
    assert (ids[corpus.train == END] == END).all()
    others = ids[corpus.train != END]
    assert others.min() >= len(VOCABULARY)
    assert torch.equal(others - SHIFT, corpus.train[corpus.train != END])


def test_all_documents_and_so_much_python(words, corpus):
    both = mixed(words, corpus, share=0.5, seed=1)
    of_python = both.train >= len(VOCABULARY)
    ends_of_python = int((python_ids(corpus.train) == END).sum())
    assert abs(int(of_python.sum()) - len(words.train)) <= CHUNK + ends_of_python
    # the words are all there, each document whole
    kept = both.train[~of_python]
    assert len(words.train) <= len(kept) <= len(words.train) + ends_of_python
    text = " ".join(map(str, both.train.tolist()))
    for document in mixture._documents(words.train)[:20]:
        assert " ".join(map(str, document.tolist())) in text


def test_it_depends_on_seed_and_share_alone(words, corpus):
    one = mixed(words, corpus, 0.3, seed=1)
    again = mixed(words, corpus, 0.3, seed=1)
    assert torch.equal(one.train, again.train) and one.hash == again.hash
    other = mixed(words, corpus, 0.3, seed=2)
    assert not torch.equal(one.train, other.train) and one.hash != other.hash
    none = mixed(words, corpus, 0.0, seed=1)
    assert (none.train < len(VOCABULARY)).all()
    assert len(none.train) == len(words.train)


def test_a_model_of_the_mixture_has_a_name_for_each_id(words, corpus):
    both = mixed(words, corpus, 0.3, seed=1)
    assert both.vocab_size == SHIFT + corpus.vocab_size
    ids = [VOCABULARY.index("make"), SHIFT + 1]
    assert both.decode(ids).startswith("make python ")
    windows = mixture.python_windows(corpus, 3, 8)
    assert windows.shape == (3, 8)
    assert int(windows.max()) < both.vocab_size


@pytest.mark.parametrize("share", [1.0, -0.1, 0.99])
def test_a_share_that_cannot_be_is_refused(words, corpus, share):
    with pytest.raises(InputError, match="share="):
        mixed(words, corpus, share, seed=0)
