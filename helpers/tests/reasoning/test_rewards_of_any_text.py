"""Texts that a model might write, and some that it could not."""

import math
import random
import time
from collections import Counter

from helpers.reasoning import countdown, rewards, writers
from helpers.tests.reasoning.by_hand import (
    ASKED,
    GOOD,
    LINE,
    RIGHT,
    THOUGHTS,
    check_all,
    scores,
    tagged,
)

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

VOCABULARY = countdown.VOCABULARY
WORDS_BEHIND_THE_NUMBERS = VOCABULARY[100:]
ODD = [
    "٢",
    "９",
    "²",
    "−",
    "×",
    "\0",
    "\x1b[31m",
    "\u200b",
    "\u202e",
    "\ud800",
    "9" * 400,
    "1e999",
    "nan",
    "**",
    "//",
    "__import__('os')",
    "<Answer>",
    "<answer",
    "</think></answer>",
    "%s",
    "{}",
    "\\",
    "\U0001f600",
    "é",
    "-1",
    "2.0",
    "+2",
    "100",
    "<|end|>",
]
SPACES = [" "] * 5 + ["\n", "  ", "\t", "\u2003", "\r\n", "", "\x85"]


def mutated(rng, words):
    """Some words repeated, dropped, swapped, replaced, doubled as a block."""
    words = list(words)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        i, j = sorted(rng.randrange(len(words) + 1) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0:
            words[i:j] = words[i:j] * rng.randrange(3)
        elif kind == 1:
            words[i : i + 1] = []
        elif kind == 2:
            words.insert(i, rng.choice(VOCABULARY))
        elif kind == 3:
            words.insert(i, rng.choice(ODD))
        elif kind == 4:
            words.insert(i, rng.choice(countdown.TAGS))
        elif i < j < len(words):
            words[i], words[j] = words[j], words[i]
    return words


def mutated_answer(rng, problem):
    """A right answer with thoughts and perhaps a last line, mutated."""
    values = countdown.candidates(problem.digits)
    right = [e for e, value in values.items() if value == problem.target]
    thoughts = rng.choice(("", "try", "try prueba check right", "A ;"))
    line = rng.choice(("", writers.summary(problem, right[0])))
    expression = rng.choice(right)
    text = writers.answer_text(thoughts, expression, rng.random() < 0.7, line)
    return mutated(rng, text.split())


def random_words(rng, problem):
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choices(VOCABULARY, k=rng.randrange(40))
    if kind == 1:
        digits = map(str, problem.digits)
        few = [*countdown.TAGS, *digits, *"+-*;", "try", "espera"]
        return rng.choices(few, k=rng.randrange(30))
    if kind == 2:
        return mutated_answer(rng, problem)
    words = rng.choices([*WORDS_BEHIND_THE_NUMBERS, *ODD], k=rng.randrange(20))
    return mutated(rng, words)


@pytest.mark.slow
def test_a_hundred_thousand_random_and_mutated_texts():
    rng = random.Random(0)
    asked = countdown.problems("test", 500, 0)
    seen = Counter()
    longest = 0.0
    for n in range(110_000):
        problem = asked[n % len(asked)]
        words = random_words(rng, problem)
        text = rng.choice(SPACES).join(words)
        began = time.process_time()
        accuracy = rewards.accuracy(problem, text)
        form = rewards.well_formed(text)
        longest = max(longest, time.process_time() - began)
        assert (accuracy, form) == scores(problem, text), text
        check_all(problem, text)
        seen["right"] += accuracy
        seen["in form"] += form
        seen["readable"] += rewards.readable(problem, text)
        seen["wrong in form"] += form and not accuracy
    assert seen["right"] > 5000, seen
    assert seen["in form"] > 5000, seen
    assert seen["readable"] > 2000, seen
    assert seen["wrong in form"] > 300, seen
    assert longest < 0.5


def joined(words, most):
    return st.lists(st.sampled_from(words), max_size=most).map(" ".join)


def mutated_by_seed(seed):
    return " ".join(mutated(random.Random(seed), f"{GOOD} {LINE}".split()))


A_TEXT = st.one_of(
    st.text(st.characters()),
    joined([*VOCABULARY, *ODD], 60),
    joined([*countdown.TAGS, *RIGHT.split(), ";", "try", "bien"], 40),
    st.integers(0, 2**32).map(mutated_by_seed),
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(A_TEXT, st.sampled_from([*countdown.problems("dev", 20, 0), ASKED]))
def test_texts_that_nobody_thought_of(text, problem):
    check_all(problem, text)
    accuracy = rewards.accuracy(problem, text)
    assert (accuracy, rewards.well_formed(text)) == scores(problem, text)
    # only the words count, not the white space between them
    once = " ".join(text.split())
    assert accuracy == rewards.accuracy(problem, once)
    assert rewards.readable(problem, text) == rewards.readable(problem, once)
    for language in ("en", "es"):
        consistency = rewards.language_consistency(language, text)
        assert consistency == rewards.language_consistency(language, once)


LONG = {
    "one word": "a" * 10**6,
    "spaces": " " * 10**6,
    "control characters": "\0\x1b" * 500_000,
    "one number": "9" * 10**6,
    "tabs and words": "\ttry" * 250_000,
    "opened thoughts": "<think> " * 125_000,
    "closed thoughts": "</think> " * 111_112,
    "opened answers": "<answer> " * 111_112,
    "open and close": "<think> </think> <answer> </answer> " * 28_000,
    "nested": "<think> " * 60_000 + "</think> " * 60_000,
    "semicolons": "; " * 500_000,
    "good answers": f"{GOOD} " * 12_000,
    "good thoughts": f"<think> {(THOUGHTS + ' ') * 21_000}",
    "a long chain": "1 + " * 250_000,
    "wait": "wait espera " * 84_000,
    "letters far apart": "<answer>" + " a" * 500_000,
    "emoji": "\U0001f600 " * 500_000,
}
MEGABYTE = {name: text[:1_000_000] for name, text in LONG.items()}
MEGABYTE["a good answer after a megabyte of thoughts"] = tagged(
    RIGHT, "wait " * 199_980
)
MEGABYTE["a good answer before a megabyte"] = f"{GOOD} " + "wait " * 199_980
REWARDS = {
    "accuracy": lambda text: rewards.accuracy(ASKED, text),
    "well_formed": rewards.well_formed,
    "readable": lambda text: rewards.readable(ASKED, text),
    "consistency": lambda text: rewards.language_consistency("en", text),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEGABYTE)
def test_a_megabyte_is_no_slow_case(name):
    text = MEGABYTE[name]
    assert len(text) > 990_000
    for reward in REWARDS.values():
        began = time.process_time()
        found = reward(text)
        assert time.process_time() - began < 1
        assert 0 <= found <= 1
    began = time.process_time()
    seen = rewards.behaviour(ASKED, text)
    assert time.process_time() - began < 1
    for number in seen.values():
        assert math.isnan(number) or 0 <= number <= len(text)
    if name.startswith("a good answer"):
        assert rewards.accuracy(ASKED, text) == rewards.well_formed(text) == 1
