"""Ordered Countdown in English and Spanish: a reasoning task whose answers a few lines can check, its writers, and the rewards.

Four digits in a fixed order, + - * between them, calculated strictly from left to right, every total in 0..60: hit the target.
`make 21 from 2 6 9 1 A` asks; `<think> try 2 * 6 = 12 + 9 = 21 + 1 = 22 check 21 wrong wait try ... </think> <answer> 2 * 6 + 9 * 1 </answer>`
is a full answer. Texts are words with a space between; no text is ever evaluated as code."""
import functools
import hashlib
import html
import itertools
import math
import operator
import random
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers import data, store

LARGEST = 60
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
# the last two of each language are in no text
WORDS = {"en": dict(make="make", from_="from", try_="try", check="check", wrong="wrong", right="right", wait="wait", so="so", stuck="stuck",
                    fact="fact", answer="answer", makes="makes"),
         "es": dict(make="forma", from_="con", try_="prueba", check="revisa", wrong="mal", right="bien", wait="espera", so="entonces",
                    stuck="atascado", fact="dato", answer="respuesta", makes="da")}
LANGUAGE = {word: language for language, words in WORDS.items() for word in words.values()}  # of each word that has one
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
VOCABULARY = ["<|end|>", *map(str, range(100)), *OPERATORS, "=", ";", "A", *TAGS, *LANGUAGE]
_WHERE = {"test": range(0, 16), "dev": range(16, 24), "train": range(24, 128)}  # of 128 parts of the digit tuples


@dataclass(frozen=True)
class Problem:
    """`digits` (four of 1..9), the `target`, the `language` it is asked in ("en", "es"). ValueError for what cannot be asked."""
    digits: tuple[int, ...]
    target: int
    language: str = "en"

    def __post_init__(self) -> None:
        if type(self.digits) is not tuple or len(self.digits) != 4 or not all(type(d) is int and 1 <= d <= 9 for d in self.digits):
            raise ValueError(f"digits={self.digits!r} cannot be asked: give a tuple of four whole numbers from 1 to 9")
        if type(self.target) is not int or not 0 <= self.target <= LARGEST:
            raise ValueError(f"target={self.target!r} cannot be asked: give a whole number from 0 to {LARGEST}")
        if self.language not in WORDS:
            raise ValueError(f"language={self.language!r} is not known: use 'en' or 'es'")

    @property
    def prompt(self) -> str:
        words = WORDS[self.language]
        return f"{words['make']} {self.target} {words['from_']} {' '.join(map(str, self.digits))} A"


@functools.cache
def candidates(digits: tuple[int, ...], operators: str = "+-*") -> dict[str, int]:
    """Every allowed expression of `digits` and its value; those with a total outside 0..60 on the way are left out."""
    found = {}
    for signs in itertools.product(operators, repeat=len(digits) - 1):
        expression = " ".join(itertools.chain([str(digits[0])], *zip(signs, map(str, digits[1:]), strict=True)))
        totals = chain(expression)
        if all(0 <= total <= LARGEST for total in totals):
            found[expression] = totals[-1]
    return found


def chain(expression: str) -> list[int]:
    """The totals of "2 * 6 + 9" from left to right: [2, 12, 21]. Only for expressions that this module wrote or checked."""
    first, *rest = expression.split()
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return list(itertools.accumulate(pairs, lambda total, pair: OPERATORS[pair[0]](total, int(pair[1])), initial=int(first)))


@functools.cache
def tuples(split: str) -> list[tuple[int, ...]]:
    """The digit tuples of "train", "dev" or "test" (a digit at most twice); disjoint, by a hash of the tuple alone."""
    if split not in _WHERE:
        raise ValueError(f"split={split!r} is not known: use 'train', 'dev' or 'test'")
    part = {d: hashlib.sha256(repr(d).encode()).digest()[0] % 128 for d in itertools.product(range(1, 10), repeat=4)}
    return [d for d in part if part[d] in _WHERE[split] and max(map(d.count, d)) <= 2]


def problems(split: str, n: int, seed: int, operators: str = "+-*", language: str | None = None) -> list[Problem]:
    """n problems that can be solved, drawn from (split, seed) alone; languages alternate unless one is named."""
    rng = random.Random(f"{split} {seed} {operators}")
    drawn = []
    for i in range(n):
        values = []
        while not values:
            digits = rng.choice(tuples(split))
            values = sorted(set(candidates(digits, operators).values()))
        drawn.append(Problem(digits, rng.choice(values), language or ("en", "es")[i % 2]))
    return drawn


@dataclass(frozen=True)
class Writers:
    """Who wrote the corpus: per language the share of answers that verify, and how often such a writer gives up after a wrong try."""
    verify: dict[str, float] = field(default_factory=lambda: {"en": 0.45, "es": 0.35})
    give_up: dict[str, float] = field(default_factory=lambda: {"en": 0.25, "es": 0.28})
    switch: float = 0.05  # a verifying writer changes language at a try
    other_language: float = 0.06  # of answers
    untagged: float = 0.35
    facts: float = 0.12  # documents that are a chain and a check; half are drawn to be right, and of the others some are by chance
    operators: str = "+-*"


def _pick(rng: random.Random, values: dict[str, int], target: int, width: float) -> str:
    """One expression, by softmax(-|value - target| / width)."""
    return rng.choices(list(values), [math.exp(-abs(value - target) / width) for value in values.values()])[0]


def _worked(expression: str) -> str:
    """ "2 * 6 + 9" -> "2 * 6 = 12 + 9 = 21"."""
    first, *rest = expression.split()
    totals = chain(expression)[1:]
    return " ".join([first, *(f"{sign} {digit} = {total}" for sign, digit, total in zip(rest[::2], rest[1::2], totals, strict=True))])


def search(problem: Problem, rng: random.Random, switch: float = 0.0, give_up: float = 0.0, tries: int = 10,
           operators: str = "+-*") -> tuple[str, str]:
    """Try, check, wait, try again, no candidate twice -> the thoughts, and the expression answered (right unless given up)."""
    left, words, out = dict(candidates(problem.digits, operators)), WORDS[problem.language], []
    for n in range(1, tries + 1):
        if rng.random() < switch:
            words = WORDS["es" if words is WORDS["en"] else "en"]
        expression = _pick(rng, left, problem.target, 12)
        right = left.pop(expression) == problem.target
        out.append(f"{words['try_']} {_worked(expression)} {words['check']} {problem.target} {words['right' if right else 'wrong']}")
        if right:
            break
        if n == tries or not left or rng.random() < give_up:
            out.append(words["stuck"])
            break
        out.append(words["wait"])
    return " ".join(out), expression


def answer_text(thoughts: str, expression: str, tagged: bool = True, summary: str = "") -> str:
    """The whole answer, `<think> thoughts </think> <answer> expression </answer> summary`, or `thoughts ; expression`."""
    parts = [*TAGS[:1], thoughts, *TAGS[1:3], expression, TAGS[3], summary] if tagged else [thoughts, ";", expression]
    return " ".join(part for part in parts if part)


def summary(problem: Problem, expression: str) -> str:
    """The line a reader wants last, the verdict on the answer in the language of the question: `check 21 right`."""
    words = WORDS[problem.language]
    return f"{words['check']} {problem.target} {words['right' if chain(expression)[-1] == problem.target else 'wrong']}"


def document(writers: Writers, rng: random.Random) -> str:
    """One document of the corpus: a question of the training split with somebody's answer, or a fact."""
    digits = rng.choice(tuples("train"))
    values = candidates(digits, writers.operators)
    if not values:
        return document(writers, rng)
    care = language = rng.choice(["en", "es"])
    target = rng.choice(sorted(set(values.values())))
    problem = Problem(digits, target, language)
    if rng.random() < writers.facts:
        expression = rng.choice([e for e in values if values[e] == target]) if rng.random() < 0.5 else _pick(rng, values, target, 12)
        return f"{WORDS[language]['fact']} {_worked(expression)} {summary(problem, expression)}"
    if rng.random() < writers.other_language:
        language = "es" if language == "en" else "en"
    if rng.random() < writers.verify[care]:
        asked = Problem(digits, target, language)
        thoughts, expression = search(asked, rng, writers.switch, writers.give_up[care], operators=writers.operators)
    elif rng.random() < 0.35 / 0.65:
        thoughts, expression = "", _pick(rng, values, target, 20)
    else:
        expression = _pick(rng, values, target, 12)
        thoughts = f"{WORDS[language]['try_']} {_worked(expression)} {WORDS[language]['so']}"
    return f"{problem.prompt} {answer_text(thoughts, expression, rng.random() >= writers.untagged)}"


def tokenizer() -> Tokenizer:
    """One id a word of VOCABULARY; `data.END` is <|end|>."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<|end|>"])
    return words


def corpus(writers: Writers, tokens: int, seed: int, valid_tokens: int = 50_000) -> data.Corpus:
    """About `tokens` tokens of documents by `writers`, for `train.run`; the validation documents are others of the same writers."""
    words, streams = tokenizer().get_vocab(), {}
    for split, size in (("train", tokens), ("valid", valid_tokens)):
        rng, ids = random.Random(f"{split} {seed}"), []
        while len(ids) < size:
            ids += [*(words[word] for word in document(writers, rng).split()), data.END]
        streams[split] = torch.tensor(ids, dtype=torch.int32)
    valid_bytes = len(tokenizer().decode(streams["valid"].tolist(), skip_special_tokens=False).encode())
    fingerprint = store.key(writers=writers, seed=seed, vocabulary=VOCABULARY, tokens=tokens, valid=valid_tokens,
                            content=hashlib.sha256(streams["train"].numpy().tobytes()).hexdigest())
    return data.Corpus("ordered Countdown", tokenizer(), streams["train"], streams["valid"], valid_bytes, fingerprint, {})


def final_answer(text: str) -> list[str]:
    """The words of the one <answer>; without any answer tag the last seven words. Empty when a tag is missing, repeated or out of order."""
    words = text.split()
    if TAGS[2] not in words and TAGS[3] not in words:
        return words[-7:]
    if words.count(TAGS[2]) != 1 or words.count(TAGS[3]) != 1:
        return []
    return words[words.index(TAGS[2]) + 1 : words.index(TAGS[3])]


def accuracy(problem: Problem, text: str, operators: str = "+-*") -> float:
    """1 if the final answer uses the digits in order, known operators, no total outside 0..60, and hits the target; else 0."""
    return float(candidates(problem.digits, operators).get(" ".join(final_answer(text))) == problem.target)


def well_formed(text: str) -> float:
    """1 for `<think> ... </think> <answer> seven words </answer>`, each tag once, nothing before it; a last line may follow. Else 0."""
    words = text.split()
    if not all(words.count(tag) == 1 for tag in TAGS):
        return 0.0
    places = [words.index(tag) for tag in TAGS]
    return float(places[0] == 0 and places[1] > 0 and places[2] == places[1] + 1 and places[3] == places[2] + 8)


def readable(problem: Problem, text: str) -> float:
    """1 if the text ends with the `summary` of its own answer, in the language of the question, whether right or wrong; else 0."""
    answer = " ".join(final_answer(text))
    known = answer in candidates(problem.digits) and text.split().count(TAGS[3]) == 1
    return float(known and " ".join(text.split()[text.split().index(TAGS[3]) + 1 :]) == summary(problem, answer))


def thoughts(text: str) -> list[str]:
    """The words of the chain of thought: between the first <think> and the </think> after it; without tags, all before the last `;`."""
    words = text.split()
    if TAGS[0] in words:
        words = words[words.index(TAGS[0]) + 1 :]
        return words[: words.index(TAGS[1])] if TAGS[1] in words else words
    return words[: len(words) - words[::-1].index(";") - 1] if ";" in words else words[:-7]


def language_consistency(language: str, text: str) -> float:
    """Words of `language` in the chain of thought / words of any language in it (R1 v2, eq. 7); 0 for a chain without words."""
    spoken = [LANGUAGE[word] for word in thoughts(text) if word in LANGUAGE]
    return spoken.count(language) / len(spoken) if spoken else 0.0


def behaviour(problem: Problem, text: str, operators: str = "+-*") -> dict[str, float]:
    """What the curves show of one answer: accuracy, format, consistency (nan without words), and counts of tries, checks, waits; mixed 0/1."""
    said = [word for word in thoughts(text) if word in LANGUAGE]
    count = {name: sum(said.count(WORDS[language][name]) for language in WORDS) for name in ("try_", "check", "wait")}
    return {"accuracy": accuracy(problem, text, operators), "format": well_formed(text), "readable": readable(problem, text),
            "tries": count["try_"], "verify": float(count["check"] > 0), "waits": count["wait"], "mixed": float(len({*map(LANGUAGE.get, said)}) == 2),
            "consistency": language_consistency(problem.language, text) if said else math.nan}


def coloured(text: str, longest: int = 130) -> str:
    """HTML of a text: English words blue, Spanish ones orange and underlined, tags bold, numbers and signs grey; cut after `longest` words."""
    looks = {"en": '<span style="color:#0072B2">{}</span>', "es": '<u style="color:#B84A00">{}</u>', "tag": '<b style="color:#222">{}</b>'}
    words, plain = text.split(), '<span style="color:#6b6b6b">{}</span>'
    shown = [looks.get("tag" if word in TAGS else LANGUAGE.get(word), plain).format(html.escape(word)) for word in words[:longest]]
    return " ".join(shown) + (f" <i>… and {len(words) - longest} more words</i>" if len(words) > longest else "")
