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
TRIES = 10  # of a search, before its writer gives up
# An expression is drawn by softmax(-|its value - target| / width): a wider one guesses.
TRY_WIDTH = 12
GUESS_WIDTH = 20
# Of those who do not verify, so many write the answer down at once; the rest try once.
AT_ONCE = 0.35 / 0.65
FACTS_DRAWN_RIGHT = 0.5


@dataclass(frozen=True)
class Writers:
    """The habits of the people who wrote a corpus. All are shares from 0 to 1.

    Whether somebody verifies and gives up goes by the language of the *question*.
    Raises InputError, which names the field, for what cannot be.
    """

    # of the answers: tries, checks, and goes on after a wrong check
    verify: dict[str, float] = field(default_factory=lambda: {"en": 0.45, "es": 0.35})
    # after a wrong check: is stuck, and answers with it
    give_up: dict[str, float] = field(default_factory=lambda: {"en": 0.25, "es": 0.28})
    # of the tries of one who verifies: the language changes with this try
    switch: float = 0.05
    # of the answers: begun in another language than the question's
    other_language: float = 0.06
    # of the answers: `thoughts ; answer` instead of tags
    untagged: float = 0.35
    # of the documents: no question, only an expression and a check. Half are drawn to
    # be right; of the others some are by chance.
    facts: float = 0.12
    operators: str = ALL_OPERATORS

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("verify", "give_up"):
            _check_shares(name, getattr(self, name))
        for name in ("switch", "other_language", "untagged", "facts"):
            check(name, getattr(self, name), Share)
        check_operators(self.operators)
