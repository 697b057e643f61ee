import doctest
import random
import re
from collections import Counter

from helpers.checks import InputError
from helpers.reasoning import countdown, rewards, writers
from helpers.reasoning.countdown import Problem
from helpers.tests.reasoning.by_hand import ASKED, RIGHT, left_to_right
from helpers.training.corpus import END

import pytest

SIGNS = "+-*"


@pytest.mark.parametrize("module", [countdown, writers, rewards])
def test_the_examples_in_the_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted > 3
    assert found.failed == 0


# ----------------------------------------------------------------------- the splits


def test_the_splits_are_disjoint_and_hold_every_tuple_with_a_digit_at_most_twice():
    splits = {name: countdown.tuples(name) for name in ("train", "dev", "test")}
    together = [digits for name in splits for digits in splits[name]]
    without_three_or_four_alike = 9**4 - 9 - 9 * 8 * 4
    assert len(together) == len(set(together)) == without_three_or_four_alike
    for digits in together:
        assert len(digits) == 4
        assert set(digits) <= set(range(1, 10))
        assert max(Counter(digits).values()) <= 2
    for name, share in (("test", 16 / 128), ("dev", 8 / 128), ("train", 104 / 128)):
        assert len(splits[name]) / len(together) == pytest.approx(share, abs=0.015)
        first_digits = {digits[0] for digits in splits[name]}
        assert first_digits == set(range(1, 10)), "the splits do not go by a digit"
    with pytest.raises(InputError, match="split='valid'.*'train', 'dev', 'test'"):
        countdown.tuples("valid")


def test_what_is_kept_between_calls_cannot_be_changed():
    """Tuples and candidates are computed once, so all callers share them."""
    kept = countdown.candidates((1, 2, 3, 4))
    with pytest.raises(TypeError):
        kept["1 + 2 + 3 + 4"] = 0
    assert kept["1 + 2 + 3 + 4"] == 10
    assert type(countdown.tuples("test")) is tuple


# --------------------------------------------------------------------- the problems


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_problems_can_be_solved_and_come_from_split_and_seed_alone(split):
    drawn = countdown.problems(split, 300, 5)
    random.seed(1)
    assert drawn == countdown.problems(split, 300, 5)
    assert drawn[:40] == countdown.problems(split, 40, 5)
    assert drawn != countdown.problems(split, 300, 6)
    allowed = set(countdown.tuples(split))
    for i, problem in enumerate(drawn):
        assert problem.digits in allowed
        assert problem.language == ("en", "es")[i % 2]
        assert problem.target in countdown.candidates(problem.digits).values()
        assert len(problem.prompt.split()) == 8
        assert set(problem.prompt.split()) <= set(countdown.VOCABULARY)
    assert len({problem.target for problem in drawn}) > 40


def test_problems_in_one_language_and_with_fewer_operators():
    spanish = countdown.problems("dev", 20, 5, language="es")
    assert {problem.language for problem in spanish} == {"es"}
    for problem in countdown.problems("dev", 50, 5, operators="+-"):
        assert problem.target in countdown.candidates(problem.digits, "+-").values()
    for problem in countdown.problems("dev", 20, 5, operators="*"):
        assert [problem.target] == [*countdown.candidates(problem.digits, "*").values()]


@pytest.mark.parametrize("operators", ["", "/", "+-/", "**2", "+ -", None, ["+"], 3])
def test_operators_that_cannot_be_are_named(operators):
    """With none `problems` drew for ever; with / it was a KeyError."""
    with pytest.raises(InputError, match="operators=.*one or more of"):
        countdown.problems("train", 1, 0, operators)
    with pytest.raises(InputError, match="operators="):
        writers.Writers(operators=operators)
    if isinstance(operators, str):
        with pytest.raises(InputError, match="operators="):
            countdown.candidates((1, 2, 3, 4), operators)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"n": -1}, "n"),
        ({"n": 2.0}, "n"),
        ({"n": True}, "n"),
        ({"seed": "0"}, "seed"),
        ({"split": "valid"}, "split"),
        ({"language": "fr"}, "language"),
        ({"language": ""}, "language"),
    ],
)
def test_problems_that_cannot_be_drawn_are_named(arguments, name):
    with pytest.raises(InputError, match=f"^{name}="):
        countdown.problems(**({"split": "train", "n": 1, "seed": 0} | arguments))


def test_no_problems_are_an_empty_list():
    assert countdown.problems("train", 0, 0) == []


def test_prompts_by_hand():
    assert ASKED.prompt == "make 21 from 2 6 9 1 A"
    assert Problem((6, 7, 3, 8), 24, "es").prompt == "forma 24 con 6 7 3 8 A"


@pytest.mark.parametrize(
    "digits, target, language, name",
    [
        ((1, 2, 3), 5, "en", "digits"),
        ((1, 2, 3, 10), 5, "en", "digits"),
        ((0, 1, 2, 3), 5, "en", "digits"),
        ((1, 2, 3, 4.0), 5, "en", "digits"),
        ((True, 2, 3, 4), 5, "en", "digits"),
        (("1", "2", "3", "4"), 5, "en", "digits"),
        ([1, 2, 3, 4], 5, "en", "digits"),
        (1234, 5, "en", "digits"),
        ((1, 2, 3, 4), 61, "en", "target"),
        ((1, 2, 3, 4), -1, "en", "target"),
        ((1, 2, 3, 4), 5.0, "en", "target"),
        ((1, 2, 3, 4), True, "en", "target"),
        ((1, 2, 3, 4), None, "en", "target"),
        ((1, 2, 3, 4), 5, "fr", "language"),
        ((1, 2, 3, 4), 5, ["en"], "language"),
    ],
)
def test_what_cannot_be_asked_is_named(digits, target, language, name):
    with pytest.raises(InputError, match=f"^{name}=.* cannot work: "):
        Problem(digits, target, language)


# ------------------------------------------------------------------- the expressions


def by_brute_force(digits):
    """Every sign between every digit, by Python with brackets for left to right."""
    a, b, c, d = digits
    expected = {}
    for x in SIGNS:
        for y in SIGNS:
            for z in SIGNS:
                first = eval(f"{a}{x}{b}")
                second = eval(f"({a}{x}{b}){y}{c}")
                third = eval(f"(({a}{x}{b}){y}{c}){z}{d}")
                if all(0 <= total <= 60 for total in (first, second, third)):
                    expected[f"{a} {x} {b} {y} {c} {z} {d}"] = third
    return expected


@pytest.mark.slow
def test_candidates_are_those_of_brute_force():
    extreme = [(1, 1, 9, 9), (9, 9, 9, 9), (1, 2, 3, 4)]
    for digits in [*countdown.tuples("test"), *extreme]:
        expected = by_brute_force(digits)
        assert countdown.candidates(digits) == expected
        plain = {e: value for e, value in expected.items() if "*" not in e}
        assert countdown.candidates(digits, "+-") == plain
        for expression, value in expected.items():
            totals = countdown.chain(expression)
            assert totals == left_to_right(expression.split())
            assert totals[-1] == value


def test_a_chain_by_hand():
    assert countdown.chain("2 * 6 + 9") == [2, 12, 21]
    assert countdown.chain(RIGHT) == [2, 12, 21, 21]
    assert countdown.chain("7") == [7]
    assert countdown.chain("1 - 5 * 9 + 2") == [1, -4, -36, -34]


# --------------------------------------------------------------------- the vocabulary


def test_the_words_of_the_languages():
    english = countdown.WORDS["en"]
    spanish = countdown.WORDS["es"]
    assert [*english] == [*spanish], "the same keys in the same order"
    assert countdown.LANGUAGES == ("en", "es")
    assert countdown.LANGUAGE[english["try_"]] == "en"
    assert countdown.LANGUAGE[spanish["try_"]] == "es"
    assert len(countdown.LANGUAGE) == 24, "no word belongs to both"
    for key in english:
        line = rf"{key} +{english[key]} +{spanish[key]} +\w"
        assert re.search(line, countdown.__doc__), key


def test_one_token_a_word_and_back():
    by_word = countdown.tokenizer()
    vocabulary = countdown.VOCABULARY
    assert by_word.get_vocab_size() == len(vocabulary) == len(set(vocabulary)) == 135
    assert by_word.token_to_id("<|end|>") == END == 0
    ids = [by_word.token_to_id(word) for word in vocabulary]
    assert ids == list(range(len(vocabulary)))
    rng = random.Random(3)
    for _ in range(100):
        document = writers.document(writers.Writers(), rng)
        found = by_word.encode(document).ids
        assert len(found) == len(document.split())
        assert by_word.decode(found) == document
    assert by_word.decode([END]) == ""
    assert vocabulary[5] == "4"
    with pytest.raises(Exception, match="[Uu][Nn][Kk]"):
        by_word.encode("make 21 from bread")
