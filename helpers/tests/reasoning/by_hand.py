"""The task once more, in code that shares nothing with ours but the constants."""

import math
import re
from collections import Counter

from helpers.reasoning import rewards
from helpers.reasoning.countdown import TAGS, Problem

RIGHT = "2 * 6 + 9 * 1"
WRONG = "2 + 6 + 9 + 1"
ASKED = Problem((2, 6, 9, 1), 21)
THOUGHTS = "try 2 * 6 = 12 + 9 = 21 * 1 = 21 check 21 right"
GOOD = f"<think> {THOUGHTS} </think> <answer> {RIGHT} </answer>"
LINE = "check 21 right"

NUMERALS = "0123456789"
ANSWER = re.compile(r"(?:^| )<answer>((?: \S+)*?) </answer>(?: |$)")
WHOLE = re.compile(r"<think>(?: \S+)* </think> <answer>(?: \S+){7} </answer>(?: \S+)*")


def tagged(expression: str, thoughts: str = THOUGHTS) -> str:
    return f"<think> {thoughts} </think> <answer> {expression} </answer>"


def left_to_right(words: list[str]) -> list[int] | None:
    """The totals of an expression; None where words are not digit, sign, digit, ..."""
    digits = words[::2]
    signs = words[1::2]
    if len(words) % 2 == 0 or not all(re.fullmatch("[1-9]", d) for d in digits):
        return None
    if not all(sign in ("+", "-", "*") for sign in signs):
        return None
    total = NUMERALS.index(digits[0])
    totals = [total]
    for sign, digit in zip(signs, digits[1:], strict=True):
        other = NUMERALS.index(digit)
        if sign == "+":
            total = total + other
        elif sign == "-":
            total = total - other
        else:
            total = total * other
        totals.append(total)
    return totals


def answer_of(words: list[str]) -> list[str]:
    """The words of the one answer, by a regular expression."""
    openings = words.count("<answer>")
    closings = words.count("</answer>")
    if openings == closings == 0:
        return words[-7:]
    found = None
    if openings == closings == 1:
        found = ANSWER.search(" ".join(words))
    return found[1].split() if found else []


def scores(problem: Problem, text: str) -> tuple[float, float]:
    """Accuracy and format of a text, written another way."""
    words = text.split()
    answer = answer_of(words)
    totals = left_to_right(answer)
    right = (
        len(answer) == 7
        and totals is not None
        and answer[::2] == [str(digit) for digit in problem.digits]
        and min(totals) >= 0
        and max(totals) <= 60
        and totals[-1] == problem.target
    )
    tags = Counter(word for word in words if word in TAGS)
    once = all(tags[tag] == 1 for tag in TAGS)
    return float(right), float(once and bool(WHOLE.fullmatch(" ".join(words))))


def check_all(problem: Problem, text: str) -> None:
    """Every reward: no exception, a number in its range, and they agree."""
    accuracy = rewards.accuracy(problem, text)
    well_formed = rewards.well_formed(text)
    readable = rewards.readable(problem, text)
    for found in (accuracy, well_formed, readable):
        assert type(found) is float
        assert found in (0.0, 1.0)
    consistency = rewards.language_consistency(problem.language, text)
    assert type(consistency) is float
    assert 0 <= consistency <= 1

    seen = rewards.behaviour(problem, text)
    assert (seen["accuracy"], seen["format"]) == (accuracy, well_formed)
    assert seen["readable"] == readable
    for name in ("accuracy", "format", "readable", "verify", "mixed"):
        assert seen[name] in (0, 1)
    for name in ("tries", "waits"):
        assert 0 <= seen[name] <= len(text.split())
    silent = math.isnan(seen["consistency"])
    assert consistency == (0 if silent else seen["consistency"])
    assert seen["mixed"] == (0 < consistency < 1)
