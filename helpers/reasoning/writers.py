"""Who wrote the corpus of the reasoning task: people with habits, drawn at known rates.

R1-Zero's reward can only strengthen what the base model sometimes does. So the corpus
holds some writers who try, check and go on, beside others who guess, and the notebooks
can say how often. Every document comes from a `random.Random` alone.
"""

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from helpers.checks import Count, Share, check, check_fields, need
from helpers.reasoning.countdown import (
    ALL_OPERATORS,
    ANSWER,
    END_ANSWER,
    END_THINK,
    LANGUAGES,
    LARGEST,
    THINK,
    VOCABULARY,
    WORDS,
    Problem,
    candidates,
    chain,
    check_operators,
    draw_digits,
    tokenizer,
    worked,
)
from helpers.training.corpus import END, Corpus
from helpers.training.runs import key

import torch
from torch import Tensor

OTHER = {"en": "es", "es": "en"}
TRIES = 10  # of a search in the corpus at most
# An expression is drawn by softmax(-|its value - target| / width): a wider one guesses.
TRY_WIDTH = 12
GUESS_WIDTH = 20
# Of those who do not verify, so many write the answer down at once; the rest try once.
AT_ONCE = 0.35 / 0.65
FACTS_DRAWN_RIGHT = 0.5


@dataclass(frozen=True)
class Writers:
    """The habits of the people who wrote a corpus, as shares from 0 to 1.

    Whether somebody verifies and gives up goes by the language of the question, also
    where the answer is in the other one. Raises InputError, which names the field, for
    what cannot be.
    """

    # of the answers: tries, checks, and goes on after a wrong check
    verify: dict[str, float] = field(default_factory=lambda: {"en": 0.45, "es": 0.35})
    # of the wrong checks: is stuck, and answers with this try
    give_up: dict[str, float] = field(default_factory=lambda: {"en": 0.25, "es": 0.28})
    # of the tries of those who verify: the language changes with this try
    switch: Share = 0.05
    # of the answers: begun in the language that was not asked in
    other_language: Share = 0.06
    # of the answers: `thoughts ; expression` instead of tags
    untagged: Share = 0.35
    # of the documents: no question, only an expression and a check. Half of them are
    # drawn to be right; of the others some are by chance.
    facts: Share = 0.12
    operators: str = ALL_OPERATORS

    def __post_init__(self) -> None:
        check_fields(self)
        _check_shares("verify", self.verify)
        _check_shares("give_up", self.give_up)
        check_operators(self.operators)


def _check_shares(name: str, shares: dict[str, float]) -> None:
    """One share for each language, and for no other."""
    languages = " and ".join(map(repr, LANGUAGES))
    need(set(shares) == set(LANGUAGES), name, shares, f"give a share for {languages}")
    for language, share in shares.items():
        check(f"{name}[{language!r}]", share, Share)


def search(
    problem: Problem,
    rng: random.Random,
    switch: float = 0.0,
    give_up: float = 0.0,
    tries: int = TRIES,
    operators: str = ALL_OPERATORS,
) -> tuple[str, str]:
    """Try, check, wait, try again -> the thoughts, and the expression to answer with.

    No candidate comes twice, and the expression is that of the last try. The search
    ends at the first candidate that hits the target. Otherwise its writer is "stuck":
    after any wrong check with the chance `give_up`, after `tries` tries for certain,
    and when no candidate is left. Four digits have at most 27 candidates, so with 27
    tries and give_up=0 a target that can be hit is hit. `switch` is the chance that the
    language changes with a try. Raises InputError for what cannot be searched.

    >>> thoughts, expression = search(Problem((2, 6, 9, 1), 21), random.Random(10))
    >>> first, second = thoughts.split(" wait ")
    >>> first
    'try 2 * 6 = 12 + 9 = 21 + 1 = 22 check 21 wrong'
    >>> second
    'try 2 * 6 = 12 + 9 = 21 * 1 = 21 check 21 right'
    >>> expression
    '2 * 6 + 9 * 1'
    """
    check("tries", tries, Count)
    check("switch", switch, Share)
    check("give_up", give_up, Share)
    untried = dict(candidates(problem.digits, operators))
    need(
        len(untried) > 0,
        "operators",
        operators,
        f"every expression of {problem.digits} leaves 0..{LARGEST} with these",
    )

    language = problem.language
    thoughts = []
    for n in range(1, tries + 1):
        if rng.random() < switch:
            language = OTHER[language]
        lexicon = WORDS[language]
        expression = _pick(rng, untried, problem.target, TRY_WIDTH)
        right = untried.pop(expression) == problem.target
        thoughts += [lexicon["try_"], worked(expression)]
        thoughts.append(_verdict(language, problem.target, right))
        if right:
            break

        last_try = n == tries or not untried
        if last_try or rng.random() < give_up:
            thoughts.append(lexicon["stuck"])
            break
        thoughts.append(lexicon["wait"])
    return " ".join(thoughts), expression


def _pick(
    rng: random.Random, values: Mapping[str, int], target: int, width: float
) -> str:
    """One expression of {expression: value}, by softmax(-|value - target| / width)."""
    weights = [math.exp(-abs(value - target) / width) for value in values.values()]
    return rng.choices(list(values), weights)[0]


def _verdict(language: str, target: int, right: bool) -> str:
    lexicon = WORDS[language]
    verdict = lexicon["right"] if right else lexicon["wrong"]
    return f"{lexicon['check']} {target} {verdict}"


def summary(problem: Problem, expression: str) -> str:
    """The verdict on an answer in the language of the question: a reader's last line.

    >>> summary(Problem((2, 6, 9, 1), 21), "2 * 6 + 9 * 1")
    'check 21 right'
    >>> summary(Problem((2, 6, 9, 1), 21, "es"), "2 + 6 + 9 + 1")
    'revisa 21 mal'
    """
    right = chain(expression)[-1] == problem.target
    return _verdict(problem.language, problem.target, right)


def answer_text(
    thoughts: str, expression: str, tagged: bool = True, last_line: str = ""
) -> str:
    """The whole answer, with tags or without; `last_line` stands after tags only.

    >>> answer_text("try 2 + 3 = 5 so", "2 + 3", last_line="check 5 right")
    '<think> try 2 + 3 = 5 so </think> <answer> 2 + 3 </answer> check 5 right'
    >>> answer_text("try 2 + 3 = 5 so", "2 + 3", tagged=False)
    'try 2 + 3 = 5 so ; 2 + 3'
    """
    if tagged:
        parts = [THINK, thoughts, END_THINK, ANSWER, expression, END_ANSWER, last_line]
    else:
        parts = [thoughts, ";", expression]
    return " ".join(part for part in parts if part)


def document(writers: Writers, rng: random.Random) -> str:
    """One document: a question of the training split with an answer, or a fact.

    The order of the draws from `rng` is part of every corpus: a draw more or less makes
    all the documents after it others.
    """
    digits, values = draw_digits(rng, "train", writers.operators)
    language = rng.choice(LANGUAGES)
    target = rng.choice(sorted(set(values.values())))
    problem = Problem(digits, target, language)
    if rng.random() < writers.facts:
        return _fact(problem, values, rng)

    thoughts, expression = _solve(writers, problem, values, rng)
    tagged = rng.random() >= writers.untagged
    return f"{problem.prompt} {answer_text(thoughts, expression, tagged)}"


def _fact(problem: Problem, values: Mapping[str, int], rng: random.Random) -> str:
    """`fact 2 * 6 = 12 + 9 = 21 check 21 right`."""
    if rng.random() < FACTS_DRAWN_RIGHT:
        right = [e for e, value in values.items() if value == problem.target]
        expression = rng.choice(right)
    else:
        expression = _pick(rng, values, problem.target, TRY_WIDTH)
    opening = WORDS[problem.language]["fact"]
    return f"{opening} {worked(expression)} {summary(problem, expression)}"


def _solve(
    writers: Writers, problem: Problem, values: Mapping[str, int], rng: random.Random
) -> tuple[str, str]:
    """Somebody's thoughts about a problem, and the expression answered."""
    habits = problem.language
    language = problem.language
    if rng.random() < writers.other_language:
        language = OTHER[language]

    if rng.random() < writers.verify[habits]:
        understood = replace(problem, language=language)
        give_up = writers.give_up[habits]
        return search(
            understood, rng, writers.switch, give_up, operators=writers.operators
        )
    if rng.random() < AT_ONCE:
        return "", _pick(rng, values, problem.target, GUESS_WIDTH)
    expression = _pick(rng, values, problem.target, TRY_WIDTH)
    lexicon = WORDS[language]
    return f"{lexicon['try_']} {worked(expression)} {lexicon['so']}", expression


def corpus(
    writers: Writers, tokens: int, seed: int, valid_tokens: int = 50_000
) -> Corpus:
    """About `tokens` tokens of documents, whole ones, for `training.pretrain`.

    The validation documents are others by the same writers, about questions of the same
    split. Raises InputError for numbers of tokens below 1.
    """
    check("tokens", tokens, Count)
    check("seed", seed, int)
    check("valid_tokens", valid_tokens, Count)
    train = _stream(writers, tokens, random.Random(f"train {seed}"))
    valid = _stream(writers, valid_tokens, random.Random(f"valid {seed}"))
    by_word = tokenizer()
    valid_text = by_word.decode(valid.tolist(), skip_special_tokens=False)
    fingerprint = key(
        writers=writers,
        seed=seed,
        vocabulary=VOCABULARY,
        tokens=tokens,
        valid=valid_tokens,
        content=hashlib.sha256(train.numpy().tobytes()).hexdigest(),
    )
    return Corpus(
        name="ordered Countdown",
        tokenizer=by_word,
        train=train,
        valid=valid,
        valid_bytes=len(valid_text.encode()),
        hash=fingerprint,
        files={},
    )


def _stream(writers: Writers, tokens: int, rng: random.Random) -> Tensor:
    """Documents with END after each, int32, until there are at least `tokens`."""
    id_of = {word: i for i, word in enumerate(VOCABULARY)}
    ids: list[int] = []
    while len(ids) < tokens:
        ids += [id_of[word] for word in document(writers, rng).split()]
        ids.append(END)
    return torch.tensor(ids, dtype=torch.int32)
