"""The rewards of the reasoning task, by rules alone, and what the curves show.

A rule that reads a text is a target for whoever writes it, so each says exactly what it
reads: words between white space, and tags that are whole words. Texts may be anything a
model can write, and more; none is evaluated as code, and none raises an exception.
"""

import math

from helpers.reasoning.countdown import (
    ALL_OPERATORS,
    ANSWER,
    ANSWER_WORDS,
    END_ANSWER,
    END_THINK,
    LANGUAGE,
    TAGS,
    THINK,
    WORDS,
    Problem,
    candidates,
    check_language,
)
from helpers.reasoning.writers import summary


def final_answer(text: str) -> list[str]:
    """The words of the one <answer>; in a text without answer tags the last seven.

    Empty when one of the two tags is missing, repeated or out of order: a text with
    several answers has none.

    >>> final_answer("<think> so </think> <answer> 2 + 3 </answer> check 5 right")
    ['2', '+', '3']
    >>> final_answer("try 2 + 6 = 8 so ; 2 * 6 + 9 * 1")
    ['2', '*', '6', '+', '9', '*', '1']
    """
    words = text.split()
    if ANSWER not in words and END_ANSWER not in words:
        return words[-ANSWER_WORDS:]
    if words.count(ANSWER) != 1 or words.count(END_ANSWER) != 1:
        return []
    return words[words.index(ANSWER) + 1 : words.index(END_ANSWER)]


def accuracy(problem: Problem, text: str, operators: str = ALL_OPERATORS) -> float:
    """1.0 if the final answer is an allowed expression that hits the target, else 0.0.

    Allowed: the digits in their order, known operators, no total outside 0..60. The
    text is looked up among all `candidates`, so nothing of it is calculated.

    >>> accuracy(Problem((2, 6, 9, 1), 21), "2 * 6 + 9 * 1")
    1.0
    >>> accuracy(Problem((2, 6, 9, 1), 21), "<answer> 6 * 2 + 9 * 1 </answer>")
    0.0
    """
    answer = " ".join(final_answer(text))
    value = candidates(problem.digits, operators).get(answer)
    return float(value == problem.target)


def well_formed(text: str) -> float:
    """1.0 for `<think> ... </think> <answer> seven words </answer> ...`, else 0.0.

    Each tag comes once, nothing stands before the first. What the seven words are does
    not matter, nor what follows.

    >>> well_formed("<think> </think> <answer> A A A A A A A </answer>")
    1.0
    """
    words = text.split()
    if not all(words.count(tag) == 1 for tag in TAGS):
        return 0.0
    think, end_think, answer, end_answer = (words.index(tag) for tag in TAGS)
    starts_with_thoughts = think == 0 and end_think > 0
    answer_follows = answer == end_think + 1
    right_length = end_answer - answer == ANSWER_WORDS + 1
    return float(starts_with_thoughts and answer_follows and right_length)


def readable(problem: Problem, text: str) -> float:
    """1.0 if the text ends with the true `summary` of its own answer, else 0.0.

    The summary is in the language of the question. The answer may be wrong, where the
    summary says so; it must be an allowed expression. It stands for the summary at the
    end of each answer that R1's cold-start data have (R1 v1 section 2.3.1).
    """
    words = text.split()
    answer = " ".join(final_answer(text))
    if answer not in candidates(problem.digits) or words.count(END_ANSWER) != 1:
        return 0.0
    last_line = words[words.index(END_ANSWER) + 1 :]
    return float(" ".join(last_line) == summary(problem, answer))


def thoughts(text: str) -> list[str]:
    """The words of the chain of thought.

    Between the first <think> and the </think> after it, or the end. In a text without
    <think>: all before the last `;`, or all but the last seven words.

    >>> thoughts("<think> wait so </think> <answer> 2 + 3 </answer>")
    ['wait', 'so']
    >>> thoughts("wait so ; 2 + 3")
    ['wait', 'so']
    """
    words = text.split()
    if THINK in words:
        inside = words[words.index(THINK) + 1 :]
        return inside[: inside.index(END_THINK)] if END_THINK in inside else inside
    if ";" in words:
        behind = words[::-1].index(";")
        return words[: len(words) - 1 - behind]
    return words[:-ANSWER_WORDS]


def language_consistency(language: str, text: str) -> float:
    """Share of `language` among the words of the chain of thought that have a language.

    R1 v2, eq. 7. 0.0 for a chain without such words.

    >>> language_consistency("en", "<think> try 2 + 3 = 5 check 5 bien </think>")
    0.6666666666666666
    """
    check_language(language)
    spoken = [LANGUAGE[word] for word in thoughts(text) if word in LANGUAGE]
    return spoken.count(language) / len(spoken) if spoken else 0.0


def behaviour(
    problem: Problem, text: str, operators: str = ALL_OPERATORS
) -> dict[str, float]:
    """What the curves show of one answer, and how its writer thought.

    accuracy, format, readable: the rewards above; consistency: language_consistency,
    but NaN where no word of the thoughts has a language. Of the thoughts alone: tries
    and waits, how many; verify, 1.0 if there is a check; mixed, 1.0 if both languages
    occur.
    """
    spoken = [word for word in thoughts(text) if word in LANGUAGE]
    languages = {LANGUAGE[word] for word in spoken}
    consistency = math.nan
    if spoken:
        consistency = language_consistency(problem.language, text)
    return {
        "accuracy": accuracy(problem, text, operators),
        "format": well_formed(text),
        "readable": readable(problem, text),
        "tries": _count(spoken, "try_"),
        "verify": float(_count(spoken, "check") > 0),
        "waits": _count(spoken, "wait"),
        "mixed": float(len(languages) > 1),
        "consistency": consistency,
    }


def _count(words: list[str], key: str) -> int:
    """How often the word for `key` occurs, in any language."""
    return sum(words.count(lexicon[key]) for lexicon in WORDS.values())
