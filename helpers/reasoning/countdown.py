"""Ordered Countdown in English and Spanish: a task whose answers a few lines can check.

Four digits stand in a fixed order. Put + - * between them, calculate strictly from left
to right (no precedence), keep every total in 0..60, and hit the target. A question, and
one full answer:

    make 21 from 2 6 9 1 A

    <think> try 2 * 6 = 12 + 9 = 21 + 1 = 22 check 21 wrong
    wait try 2 * 6 = 12 + 9 = 21 * 1 = 21 check 21 right </think>
    <answer> 2 * 6 + 9 * 1 </answer>

A text is words with white space between them, and a word is a token. The words that
belong to a language, by their key in WORDS:

    key     English  Spanish    what it does
    make    make     forma      opens a question; the target follows
    from_   from     con        the digits follow
    try_    try      prueba     opens an attempt; an expression with its totals follows
    so      so       entonces   ends an attempt that goes to the answer without a check
    check   check    revisa     compares the last total with the target, which follows
    right   right    bien       the verdict of a check: the total is the target
    wrong   wrong    mal        the verdict of a check: it is not
    wait    wait     espera     goes on to another attempt
    stuck   stuck    atascado   gives up: the last attempt is the answer, though wrong
    fact    fact     dato       opens a text without a question: an expression, checked
    answer  answer   respuesta  in no text of the corpus
    makes   makes    da         in no text of the corpus

The words that belong to none:

    A          ends the question (A as in "answer"): all that follows is the answer
    ;          parts thoughts and answer where a writer uses no tags
    =          the total so far follows
    <think> ... </think> <answer> ... </answer>    the tags of R1 v1, section 2.2.3
    <|end|>    ends a text

No text is ever evaluated as code.
"""

import functools
import hashlib
import itertools
import operator
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from helpers.checks import Range, Whole, check, need

from tokenizers import Tokenizer, models, pre_tokenizers

DIGITS = 4  # in a question
ANSWER_WORDS = 2 * DIGITS - 1  # of a full expression: digits and the signs between
LARGEST = 60  # total on the way, and target
Target = Annotated[int, Range(0, LARGEST)]
OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}
ALL_OPERATORS = "".join(OPERATORS)

WORDS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "make": "make",
        "from_": "from",
        "try_": "try",
        "check": "check",
        "wrong": "wrong",
        "right": "right",
        "wait": "wait",
        "so": "so",
        "stuck": "stuck",
        "fact": "fact",
        "answer": "answer",
        "makes": "makes",
    },
    "es": {
        "make": "forma",
        "from_": "con",
        "try_": "prueba",
        "check": "revisa",
        "wrong": "mal",
        "right": "bien",
        "wait": "espera",
        "so": "entonces",
        "stuck": "atascado",
        "fact": "dato",
        "answer": "respuesta",
        "makes": "da",
    },
}
LANGUAGES = tuple(WORDS)
# word -> its language, for each word that has one
LANGUAGE: Mapping[str, str] = {
    **dict.fromkeys(WORDS["en"].values(), "en"),
    **dict.fromkeys(WORDS["es"].values(), "es"),
}

THINK = "<think>"
END_THINK = "</think>"
ANSWER = "<answer>"
END_ANSWER = "</answer>"
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)

END_TEXT = "<|end|>"
NUMBERS = tuple(str(number) for number in range(100))
# A word's place is its token id. Trained models depend on it: add words at the end.
VOCABULARY = (END_TEXT, *NUMBERS, *OPERATORS, "=", ";", "A", *TAGS, *LANGUAGE)

# A hash puts each digit tuple into one of 128 bins; a split is a range of bins.
BINS = 128
SPLITS = {"train": range(24, BINS), "dev": range(16, 24), "test": range(0, 16)}
MOST_ALIKE = 2  # a digit occurs at most so often in a tuple


@dataclass(frozen=True)
class Problem:
    """One question: hit `target` with `digits`, asked and to be answered in `language`.

    digits: a tuple of four whole numbers from 1 to 9; target: from 0 to 60; language:
    "en" or "es". Raises InputError, which names the field, for what cannot be asked.
    Whether the target can be hit is not checked.
    """

    digits: tuple[int, ...]
    target: int
    language: str = "en"

    def __post_init__(self) -> None:
        need(
            _can_be_asked(self.digits),
            "digits",
            self.digits,
            f"give a tuple of {DIGITS} whole numbers from 1 to 9",
        )
        check("target", self.target, Target)
        check_language(self.language)

    @property
    def prompt(self) -> str:
        """The question in words, up to the `A` that an answer follows.

        >>> Problem((6, 7, 3, 8), 24, "es").prompt
        'forma 24 con 6 7 3 8 A'
        """
        lexicon = WORDS[self.language]
        digits = " ".join(map(str, self.digits))
        return f"{lexicon['make']} {self.target} {lexicon['from_']} {digits} A"


def _can_be_asked(digits: object) -> bool:
    if type(digits) is not tuple or len(digits) != DIGITS:
        return False
    return all(type(digit) is int and 1 <= digit <= 9 for digit in digits)


def check_language(language: str) -> None:
    """Raise InputError unless `language` is one that the task is asked in."""
    known = isinstance(language, str) and language in WORDS
    need(known, "language", language, f"use one of {', '.join(map(repr, WORDS))}")


def check_operators(operators: str) -> None:
    """Raise InputError unless `operators` is a string of one or more of + - *."""
    known = isinstance(operators, str) and set(operators) <= set(OPERATORS)
    need(
        known and len(operators) > 0,
        "operators",
        operators,
        f"give a string of one or more of {' '.join(OPERATORS)}",
    )


def chain(expression: str) -> list[int]:
    """The totals of an expression from left to right, its first digit included.

    Only for expressions that this package wrote or checked, never for a model's text.

    >>> chain("2 * 6 + 9")
    [2, 12, 21]
    >>> chain("1 + 2 * 3")
    [1, 3, 9]
    """
    first, *rest = expression.split()
    totals = [int(first)]
    for sign, digit in zip(rest[::2], rest[1::2], strict=True):
        totals.append(OPERATORS[sign](totals[-1], int(digit)))
    return totals


def worked(expression: str) -> str:
    """An expression with its total after each digit, as people write it in thoughts.

    >>> worked("2 * 6 + 9")
    '2 * 6 = 12 + 9 = 21'
    """
    first, *rest = expression.split()
    totals = chain(expression)[1:]
    written = [first]
    for sign, digit, total in zip(rest[::2], rest[1::2], totals, strict=True):
        written.append(f"{sign} {digit} = {total}")
    return " ".join(written)


@functools.cache
def candidates(
    digits: tuple[int, ...], operators: str = ALL_OPERATORS
) -> Mapping[str, int]:
    """Every allowed expression of `digits` and its value; the mapping is read-only.

    An expression with a total outside 0..60 on the way is not allowed, though its end
    may be. Raises InputError for operators other than + - * and for none.

    Of the four below, 9 - 8 - 2 ends below 0, and 9 * 8 passes 60.

    >>> dict(candidates((9, 8, 2), "-*"))
    {'9 - 8 * 2': 2}
    """
    check_operators(operators)
    found = {}
    for signs in itertools.product(operators, repeat=len(digits) - 1):
        words = [str(digits[0])]
        for sign, digit in zip(signs, digits[1:], strict=True):
            words += [sign, str(digit)]
        expression = " ".join(words)
        totals = chain(expression)
        if all(0 <= total <= LARGEST for total in totals):
            found[expression] = totals[-1]
    return MappingProxyType(found)


@functools.cache
def tuples(split: str) -> tuple[tuple[int, ...], ...]:
    """The digit tuples of "train", "dev" or "test", in ascending order.

    The splits are disjoint: a hash of the tuple alone decides, so that no target, no
    language and no seed carries a tuple of one split into another. A digit occurs at
    most twice in a tuple. Raises InputError for another split.
    """
    need(split in SPLITS, "split", split, f"use one of {', '.join(map(repr, SPLITS))}")
    chosen = []
    for digits in itertools.product(range(1, 10), repeat=DIGITS):
        code = hashlib.sha256(repr(digits).encode()).digest()[0] % BINS
        alike = max(map(digits.count, digits))
        if code in SPLITS[split] and alike <= MOST_ALIKE:
            chosen.append(digits)
    return tuple(chosen)


def problems(
    split: str,
    n: int,
    seed: int,
    operators: str = ALL_OPERATORS,
    language: str | None = None,
) -> list[Problem]:
    """n problems that can be solved with `operators`; the first m of n are those of m.

    They depend on split, seed and operators alone. A tuple may come more than once.
    English and Spanish take turns, unless one language is named. Raises InputError for
    a split, number, operators or language that cannot be.
    """
    check("n", n, Whole)
    check("seed", seed, int)
    check_operators(operators)
    if language is not None:
        check_language(language)

    rng = random.Random(f"{split} {seed} {operators}")
    drawn = []
    for i in range(n):
        digits, values = draw_digits(rng, split, operators)
        target = rng.choice(sorted(set(values.values())))
        turn = LANGUAGES[i % len(LANGUAGES)]
        drawn.append(Problem(digits, target, language or turn))
    return drawn


def draw_digits(
    rng: random.Random, split: str, operators: str
) -> tuple[tuple[int, ...], Mapping[str, int]]:
    """A digit tuple of the split that has candidates, and its `candidates`.

    With + and - every tuple of digits has some; with * alone few products stay within
    60, and tuples are drawn until one does.
    """
    while True:
        digits = rng.choice(tuples(split))
        values = candidates(digits, operators)
        if values:
            return digits, values


def tokenizer() -> Tokenizer:
    """A tokenizer with one id for each word of VOCABULARY; id 0 is <|end|>.

    Texts are split at white space. A word outside VOCABULARY cannot be encoded: the
    library raises an Exception that says that the unknown token is missing.
    """
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    by_word = Tokenizer(models.WordLevel(ids))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    by_word.add_special_tokens([END_TEXT])
    return by_word
