"""The base model of the reasoning notebooks."""

from dataclasses import replace

from helpers.reasoning import base as module
from helpers.reasoning.base import BASE, EXTENSION, PRETRAINING, base
from helpers.reasoning.countdown import VOCABULARY
from helpers.reasoning.writers import Writers, corpus
from helpers.tests.reasoning.small_models import changed, record
from helpers.training import pretrain, runs

import pytest

SMALL = BASE.with_(hidden_size=32, intermediate_size=48, moe_intermediate_size=16)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path / "home"))


@pytest.fixture
def texts():
    return corpus(Writers(), 6000, 0, valid_tokens=12_000)


def test_the_base_fits_the_task():
    assert BASE.vocab_size == len(VOCABULARY)
    longest = max(PRETRAINING.length, EXTENSION.length)
    assert longest < BASE.max_position_embeddings
    assert PRETRAINING.length < EXTENSION.length


@pytest.mark.slow
def test_short_windows_first_then_long_ones_and_read_again(texts, monkeypatch):
    trained = record(
        monkeypatch,
        pretrain,
        "train",
        lambda model, corpus, settings, *_: settings,
    )
    model, histories = base(texts, SMALL, steps=10)
    expected = [replace(PRETRAINING, steps=10), replace(EXTENSION, steps=2)]
    assert trained == expected
    assert [len(history["loss"]) for history in histories] == [10, 2]

    monkeypatch.setattr(pretrain, "losses", None)
    again, same = base(texts, SMALL, steps=10)
    assert same == histories
    assert not changed(model.state_dict(), again.state_dict())
    names = sorted(path.name[:-17] for path in folders())
    assert names == ["countdown-base", "countdown-base-longer"]


def folders():
    return [path for path in runs.cache_dir().iterdir() if path.is_dir()]


@pytest.mark.slow
def test_another_corpus_config_or_number_of_steps_is_another_base(texts):
    other = corpus(Writers(verify={"en": 0.0, "es": 0.0}), 6000, 0, 12_000)
    base(texts, SMALL, steps=1)
    assert len(folders()) == 2
    base(other, SMALL, steps=1)
    base(texts, SMALL.with_(num_attention_heads=1), steps=1)
    base(texts, SMALL, steps=2)
    assert len(folders()) == 8


@pytest.mark.slow
def test_the_settings_stay_as_they_are(texts):
    base(texts, SMALL, steps=1)
    assert module.PRETRAINING.steps == 1750
    assert module.EXTENSION.steps == 350
