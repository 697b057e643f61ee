import math

from helpers.checks import InputError
from helpers.reasoning import countdown, rewards, writers
from helpers.reasoning.countdown import Problem
from helpers.tests.reasoning.by_hand import ASKED, GOOD, RIGHT, left_to_right, tagged

import pytest


@pytest.mark.parametrize(
    "problem, expression",
    [
        (Problem((9, 8, 9, 3), 60), "9 * 8 - 9 - 3"),  # 72 on the way
        (Problem((1, 5, 9, 2), 10), "1 - 5 + 9 * 2"),  # -4 on the way
        (Problem((7, 9, 8, 5), 50), "7 * 9 - 8 - 5"),  # 63 on the way
    ],
)
def test_a_total_outside_the_range_on_the_way_is_wrong_though_the_end_is_right(
    problem, expression
):
    assert left_to_right(expression.split())[-1] == problem.target
    assert rewards.accuracy(problem, expression) == 0
    assert rewards.accuracy(problem, tagged(expression)) == 0


def test_sixty_and_zero_on_the_way_are_allowed():
    assert rewards.accuracy(Problem((6, 9, 6, 1), 59), "6 * 9 + 6 - 1") == 1
    assert rewards.accuracy(Problem((3, 3, 4, 5), 9), "3 - 3 + 4 + 5") == 1


def test_operators_that_were_not_allowed_are_wrong():
    assert rewards.accuracy(ASKED, RIGHT, "+-") == 0
    assert rewards.accuracy(Problem((2, 6, 9, 1), 18), "2 + 6 + 9 + 1", "+-") == 1
    assert rewards.behaviour(ASKED, GOOD, "+-")["accuracy"] == 0
    with pytest.raises(InputError, match="operators="):
        rewards.accuracy(ASKED, RIGHT, "")


@pytest.mark.parametrize("seed", range(4))
def test_every_candidate_that_hits_is_right_and_no_other(seed):
    for problem in countdown.problems("test", 50, seed):
        for expression, value in countdown.candidates(problem.digits).items():
            untagged = writers.answer_text("try", expression, tagged=False)
            for text in (expression, tagged(expression), untagged):
                assert rewards.accuracy(problem, text) == (value == problem.target)


def test_every_true_summary_is_readable_in_the_language_of_the_question():
    for problem in countdown.problems("test", 100, 0):
        for expression in countdown.candidates(problem.digits):
            for language in ("en", "es"):
                reader = Problem(problem.digits, problem.target, language)
                line = writers.summary(reader, expression)
                text = writers.answer_text("try", expression, last_line=line)
                assert text.endswith(line)
                assert rewards.well_formed(text)
                own = language == problem.language
                assert rewards.readable(problem, text) == own


def test_a_language_that_is_not_known_is_named():
    with pytest.raises(InputError, match="language='fr' cannot work: .*'en', 'es'"):
        rewards.language_consistency("fr", GOOD)


MIXED = (
    "try 2 + 6 = 8 check 21 wrong wait prueba 2 * 6 = 12 revisa 21 mal "
    "espera espera try so"
)
SILENT = {
    "accuracy": 1,
    "format": 1,
    "readable": 0,
    "tries": 0,
    "verify": 0,
    "waits": 0,
    "mixed": 0,
}


def test_behaviour_by_hand():
    """Eleven words with a language, six of them English."""
    text = tagged(RIGHT, MIXED)
    counts = {"tries": 3, "verify": 1, "waits": 3, "mixed": 1}
    expected = SILENT | counts | {"consistency": 6 / 11}
    assert rewards.behaviour(ASKED, text) == pytest.approx(expected)
    in_spanish = Problem((2, 6, 9, 1), 21, "es")
    seen = rewards.behaviour(in_spanish, text)
    assert seen["consistency"] == pytest.approx(5 / 11)


def test_behaviour_of_thoughts_without_words():
    seen = rewards.behaviour(ASKED, tagged(RIGHT, "2 * 6"))
    assert math.isnan(seen.pop("consistency"))
    assert seen == SILENT


def test_only_the_chain_of_thought_counts():
    text = f"{tagged(RIGHT, 'try')} wait espera check"
    seen = rewards.behaviour(ASKED, text)
    assert seen["tries"] == 1
    assert seen["waits"] == seen["verify"] == seen["mixed"] == 0
