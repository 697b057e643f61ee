import html
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import countdown, data
from helpers.countdown import Problem, Writers

RIGHT = "2 * 6 + 9 * 1"
ASKED = Problem((2, 6, 9, 1), 21)
THOUGHTS = "try 2 * 6 = 12 + 9 = 21 * 1 = 21 check 21 right"
GOOD = f"<think> {THOUGHTS} </think> <answer> {RIGHT} </answer>"
WORDS_OF = {language: set(words.values()) for language, words in countdown.WORDS.items()}
CHECKS, TRIES = {"check", "revisa"}, {"try", "prueba"}


def left_to_right(words):
    """The totals of an expression, or None when its words are not digit, sign, digit, ...; an evaluator that shares no code with ours."""
    if len(words) % 2 == 0 or not all(re.fullmatch("[1-9]", d) for d in words[::2]) or not all(s in ("+", "-", "*") for s in words[1::2]):
        return None
    totals = ["0123456789".index(words[0])]
    for i in range(1, len(words), 2):
        other = "0123456789".index(words[i + 1])
        totals.append(totals[-1] + other if words[i] == "+" else totals[-1] - other if words[i] == "-" else totals[-1] * other)
    return totals


def by_hand(problem, text):
    """Accuracy and format, written another way: regular expressions over the words."""
    words = text.split()
    line = " ".join(words)
    tags = Counter(word for word in words if word in countdown.TAGS)
    if not tags["<answer>"] and not tags["</answer>"]:
        answer = words[-7:]
    else:
        inside = re.search(r"(?:^| )<answer>((?: \S+)*?) </answer>(?: |$)", line) if tags["<answer>"] == tags["</answer>"] == 1 else None
        answer = inside[1].split() if inside else []
    totals = left_to_right(answer)
    right = (len(answer) == 7 and totals is not None and answer[::2] == [str(d) for d in problem.digits]
             and min(totals) >= 0 and max(totals) <= 60 and totals[-1] == problem.target)
    whole = re.fullmatch(r"<think>(?: \S+)* </think> <answer>(?: \S+){7} </answer>(?: \S+)*", line)
    return float(right), float(bool(whole) and all(tags[tag] == 1 for tag in countdown.TAGS))


def check_all(problem, text):
    """Every reward: no exception, and a number in its range."""
    for found in (countdown.accuracy(problem, text), countdown.well_formed(text), countdown.readable(problem, text)):
        assert type(found) is float and found in (0.0, 1.0)
    consistency = countdown.language_consistency(problem.language, text)
    assert type(consistency) is float and 0 <= consistency <= 1
    seen, words = countdown.behaviour(problem, text), len(text.split())
    assert (seen["accuracy"], seen["format"]) == (countdown.accuracy(problem, text), countdown.well_formed(text))
    assert all(seen[name] in (0, 1) for name in ("accuracy", "format", "readable", "verify", "mixed"))
    assert all(0 <= seen[name] <= words for name in ("tries", "waits"))
    assert (consistency == 0 if math.isnan(seen["consistency"]) else seen["consistency"] == consistency)
    assert seen["mixed"] == (not math.isnan(consistency) and 0 < consistency < 1)


# ---------------------------------------------------------------------------------------------------------------------- the problems


def test_the_splits_are_disjoint_and_hold_every_tuple_with_a_digit_at_most_twice():
    splits = {name: countdown.tuples(name) for name in ("train", "dev", "test")}
    together = [digits for name in splits for digits in splits[name]]
    assert len(together) == len(set(together)) == 9**4 - 9 - 9 * 8 * 4  # without four and without three alike
    assert all(len(digits) == 4 and set(digits) <= set(range(1, 10)) and max(Counter(digits).values()) <= 2 for digits in together)
    for name, share in (("test", 16 / 128), ("dev", 8 / 128), ("train", 104 / 128)):
        assert len(splits[name]) / len(together) == pytest.approx(share, abs=0.015)
        assert {digits[0] for digits in splits[name]} == set(range(1, 10)), "the parts do not go by a digit"
    with pytest.raises(ValueError, match="split='valid'.*'train', 'dev' or 'test'"):
        countdown.tuples("valid")


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_problems_can_be_solved_and_come_from_split_and_seed_alone(split):
    drawn = countdown.problems(split, 300, 5)
    random.seed(1)
    assert drawn == countdown.problems(split, 300, 5) and countdown.problems(split, 40, 5) == drawn[:40]
    assert drawn != countdown.problems(split, 300, 6)
    allowed = set(countdown.tuples(split))
    for i, problem in enumerate(drawn):
        assert problem.digits in allowed and problem.language == ("en", "es")[i % 2]
        assert problem.target in countdown.candidates(problem.digits).values()
        assert len(problem.prompt.split()) == 8 and set(problem.prompt.split()) <= set(countdown.VOCABULARY)
    assert {p.language for p in countdown.problems(split, 20, 5, language="es")} == {"es"}
    assert len({p.target for p in drawn}) > 40
    for problem in countdown.problems(split, 50, 5, operators="+-"):
        assert problem.target in countdown.candidates(problem.digits, "+-").values()


def test_prompts_by_hand():
    assert ASKED.prompt == "make 21 from 2 6 9 1 A" and Problem((6, 7, 3, 8), 24, "es").prompt == "forma 24 con 6 7 3 8 A"


@pytest.mark.parametrize("digits, target, language, name", [
    ((1, 2, 3), 5, "en", "digits"), ((1, 2, 3, 10), 5, "en", "digits"), ((0, 1, 2, 3), 5, "en", "digits"), ((1, 2, 3, 4.0), 5, "en", "digits"),
    ((True, 2, 3, 4), 5, "en", "digits"), (("1", "2", "3", "4"), 5, "en", "digits"), ((1, 2, 3, 4), 61, "en", "target"),
    ((1, 2, 3, 4), -1, "en", "target"), ((1, 2, 3, 4), 5.0, "en", "target"), ((1, 2, 3, 4), True, "en", "target"),
    ((1, 2, 3, 4), 5, "fr", "language")])
def test_what_cannot_be_asked_is_named(digits, target, language, name):
    with pytest.raises(ValueError, match=f"{name}="):
        Problem(digits, target, language)


def test_candidates_are_those_of_brute_force():
    """Every sign between every digit, evaluated by Python with brackets that force left to right."""
    for digits in [*countdown.tuples("test"), (1, 1, 9, 9), (9, 9, 9, 9), (1, 2, 3, 4)]:
        a, b, c, d = digits
        expected = {}
        for x in "+-*":
            for y in "+-*":
                for z in "+-*":
                    totals = [eval(e) for e in (f"{a}{x}{b}", f"({a}{x}{b}){y}{c}", f"(({a}{x}{b}){y}{c}){z}{d}")]
                    if all(0 <= total <= 60 for total in totals):
                        expected[f"{a} {x} {b} {y} {c} {z} {d}"] = totals[-1]
        assert countdown.candidates(digits) == expected
        plain = {e: v for e, v in expected.items() if "*" not in e}
        assert countdown.candidates(digits, "+-") == plain
        for expression, value in expected.items():
            assert countdown.chain(expression) == left_to_right(expression.split()) and countdown.chain(expression)[-1] == value


def test_a_chain_by_hand():
    assert countdown.chain("2 * 6 + 9") == [2, 12, 21] and countdown.chain(RIGHT) == [2, 12, 21, 21] and countdown.chain("7") == [7]
    assert countdown.chain("1 - 5 * 9 + 2") == [1, -4, -36, -34]


# ------------------------------------------------------------------------------------------------------------------------ the writers


def tries_of(thoughts):
    """[(expression, target said, verdict, language), ...] of the tries of a chain of thought, its sums checked."""
    found = []
    for part in re.split(r" (?=(?:try|prueba) )", thoughts):
        words = part.split()
        assert words[0] in TRIES
        check = next(i for i, word in enumerate(words) if word in CHECKS)
        sums = words[1:check]
        expression = [sums[0]]
        for i in range(1, len(sums), 4):
            assert sums[i + 2] == "="
            expression += sums[i : i + 2]
        assert left_to_right(expression)[1:] == [int(total) for total in sums[4::4]]
        language = "en" if words[0] == "try" else "es"
        assert words[check] in WORDS_OF[language] and words[check + 2] in WORDS_OF[language] and words[check + 3 :] in (
            [], ["wait"], ["espera"], ["stuck"], ["atascado"])
        found.append((" ".join(expression), int(words[check + 1]), words[check + 2] in ("right", "bien"), language))
    return found


@pytest.mark.parametrize("tries, give_up, switch", [(10, 0.25, 0.05), (27, 0.0, 0.0), (1, 0.0, 0.0), (3, 0.9, 1.0)])
def test_a_search_is_truthful_never_repeats_a_candidate_and_ends_as_it_says(tries, give_up, switch):
    rng = random.Random(0)
    for problem in countdown.problems("train", 300, 1):
        text, expression = countdown.search(problem, rng, switch, give_up, tries)
        found = tries_of(text)
        tried = [e for e, _, _, _ in found]
        assert len(set(tried)) == len(tried) <= tries and set(tried) <= set(countdown.candidates(problem.digits))
        values = [countdown.candidates(problem.digits)[e] for e in tried]
        assert [target for _, target, _, _ in found] == [problem.target] * len(found)
        assert [right for _, _, right, _ in found] == [value == problem.target for value in values]
        assert expression == tried[-1] and not any(right for _, _, right, _ in found[:-1])
        assert (text.split()[-1] in ("stuck", "atascado")) == (values[-1] != problem.target)
        if tries == 27:
            assert values[-1] == problem.target
        languages = [language for _, _, _, language in found]
        if switch in (0.0, 1.0):
            turn = {"en": "es", "es": "en"}
            expected = [problem.language if not switch or n % 2 else turn[problem.language] for n in range(len(found))]
            assert languages == expected


def test_a_search_uses_the_operators_it_is_given():
    rng = random.Random(0)
    for problem in countdown.problems("train", 50, 1, "+-"):
        text, expression = countdown.search(problem, rng, tries=8, operators="+-")
        assert "*" not in text.split() and countdown.chain(expression)[-1] == problem.target


def test_try_and_answer_switch_and_give_up_at_their_rates():
    rng, tries, switched, wrong, gave_up = random.Random(0), 0, 0, 0, 0
    for problem in countdown.problems("train", 3000, 2):
        found = tries_of(text := countdown.search(problem, rng, 0.05, 0.25)[0])
        languages = [problem.language, *(language for _, _, _, language in found)]
        tries, switched = tries + len(found), switched + sum(a != b for a, b in zip(languages, languages[1:], strict=False))
        wrong += sum(not right for _, _, right, _ in found[:9])
        gave_up += len(found) < 10 and text.split()[-1] in ("stuck", "atascado")
    for seen, n, p in ((switched, tries, 0.05), (gave_up, wrong, 0.25)):
        assert abs(seen / n - p) < 4 * math.sqrt(p * (1 - p) / n), (seen, n, p)


def take_apart(document):
    """What one document of the corpus is: kind, language of question and answer, right or not, tagged or not; everything in it checked."""
    words = document.split()
    assert set(words) <= set(countdown.VOCABULARY[1:]), "only words of the vocabulary, and no end"
    if words[0] in ("fact", "dato"):
        language = "en" if words[0] == "fact" else "es"
        [(expression, target, right, said)] = tries_of(" ".join([countdown.WORDS[language]["try_"], *words[1:]]))
        assert said == language and right == (left_to_right(expression.split())[-1] == target)
        return {"kind": "fact", "asked": language, "right": right, "digits": tuple(map(int, expression.split()[::2]))}
    problem = Problem(tuple(map(int, words[3:7])), int(words[1]), "en" if words[0] == "make" else "es")
    assert " ".join(words[:8]) == problem.prompt
    answer = " ".join(words[8:])
    tagged = "<answer>" in words
    if tagged:
        thoughts, expression = re.fullmatch(r"<think>(.*) </think> <answer> (.*) </answer>", answer).groups()
    else:
        thoughts, expression = re.fullmatch(r"(?:(.*) )?; (.*)", answer).groups()
    thoughts = (thoughts or "").strip()
    assert left_to_right(expression.split()) is not None and expression in countdown.candidates(problem.digits)
    assert countdown.thoughts(answer) == thoughts.split() and countdown.final_answer(answer) == expression.split()
    assert countdown.well_formed(answer) == tagged
    seen = {"asked": problem.language, "right": countdown.accuracy(problem, answer), "tagged": tagged, "digits": problem.digits}
    said = next((countdown.LANGUAGE[word] for word in thoughts.split() if word in countdown.LANGUAGE), None)
    kind = "verify" if CHECKS & set(thoughts.split()) else "one try" if thoughts else "direct"
    if kind == "verify":
        found = tries_of(thoughts)
        assert found[-1][0] == expression and len(found) <= 10
        seen |= {"gave_up": len(found) < 10 and not found[-1][2], "wrong": sum(not right for _, _, right, _ in found[:9])}
    if kind == "one try":
        assert thoughts.split()[-1] in ("so", "entonces")
    return seen | {"kind": kind, "said": said}


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    return [take_apart(countdown.document(Writers(), rng)) for _ in range(6000)]


def share(rows, of, p):
    """Whether the share of `rows` with `of` is p within four standard errors."""
    found = sum(map(of, rows)) / len(rows)
    assert len(rows) > 100 and abs(found - p) < 4 * math.sqrt(max(p * (1 - p), 1e-4) / len(rows)), (found, p, len(rows))


def test_the_writers_write_the_shares_that_they_say(documents):
    answers = [d for d in documents if d["kind"] != "fact"]
    share(documents, lambda d: d["kind"] == "fact", 0.12)
    share(documents, lambda d: d["asked"] == "es", 0.5)
    share(answers, lambda d: not d["tagged"], 0.35)
    for language, verify, give_up in (("en", 0.45, 0.25), ("es", 0.35, 0.28)):
        asked = [d for d in answers if d["asked"] == language]
        share(asked, lambda d: d["kind"] == "verify", verify)
        share([d for d in asked if d["kind"] != "verify"], lambda d: d["kind"] == "direct", 0.35 / 0.65)
        careful = [d for d in asked if d["kind"] == "verify"]
        wrong = sum(d["wrong"] for d in careful)
        assert abs(sum(d["gave_up"] for d in careful) / wrong - give_up) < 4 * math.sqrt(give_up * (1 - give_up) / wrong)
    share([d for d in answers if d["kind"] == "one try"], lambda d: d["said"] != d["asked"], 0.06)
    verified = [d["right"] for d in answers if d["kind"] == "verify"]
    others = [d["right"] for d in answers if d["kind"] != "verify"]
    assert sum(verified) / len(verified) > 2 * sum(others) / len(others) > 0, "verifying pays in the corpus"


def test_half_of_the_facts_are_drawn_right(documents):
    """The other half is drawn like a try, which can be right by chance."""
    facts = [d for d in documents if d["kind"] == "fact"]
    assert 0.5 < sum(d["right"] for d in facts) / len(facts) < 0.7


def test_the_corpus_asks_nothing_of_the_other_splits(documents):
    assert {d["digits"] for d in documents} <= set(countdown.tuples("train"))


@pytest.mark.parametrize("change, test", [
    ({"facts": 1.0}, lambda d: d["kind"] == "fact"), ({"facts": 0.0}, lambda d: d["kind"] != "fact"),
    ({"facts": 0.0, "verify": {"en": 0.0, "es": 0.0}}, lambda d: d["kind"] in ("direct", "one try")),
    ({"facts": 0.0, "verify": {"en": 1.0, "es": 0.0}}, lambda d: (d["kind"] == "verify") == (d["asked"] == "en")),
    ({"facts": 0.0, "verify": {"en": 1.0, "es": 1.0}, "give_up": {"en": 1.0, "es": 1.0}}, lambda d: d["right"] or d["wrong"] == 1),
    ({"facts": 0.0, "verify": {"en": 1.0, "es": 1.0}, "give_up": {"en": 1.0, "es": 0.0}},
     lambda d: not d["gave_up"] if d["asked"] == "es" else d["right"] or d["wrong"] == 1),
    ({"facts": 0.0, "untagged": 1.0}, lambda d: not d["tagged"]), ({"facts": 0.0, "untagged": 0.0}, lambda d: d["tagged"]),
    ({"facts": 0.0, "other_language": 1.0, "switch": 0.0}, lambda d: d["said"] != d["asked"]),
    ({"facts": 0.0, "other_language": 0.0, "switch": 0.0}, lambda d: d["said"] in (d["asked"], None)),
], ids=lambda value: "" if callable(value) else "-".join(value))
def test_each_share_at_its_ends(change, test):
    rng, writers = random.Random(0), replace(Writers(), **change)
    assert all(test(take_apart(countdown.document(writers, rng))) for _ in range(200))


def test_a_corpus_without_products_has_none():
    rng, writers = random.Random(0), Writers(operators="+-")
    assert not any("*" in countdown.document(writers, rng).split() for _ in range(300))


# ------------------------------------------------------------------------------------------------------------- tokenizer and corpus


def test_one_token_a_word_and_back(documents):
    words = countdown.tokenizer()
    assert words.get_vocab_size() == len(countdown.VOCABULARY) == len(set(countdown.VOCABULARY)) and words.token_to_id("<|end|>") == data.END == 0
    assert [words.token_to_id(word) for word in countdown.VOCABULARY] == list(range(len(countdown.VOCABULARY)))
    rng = random.Random(3)
    for _ in range(100):
        document = countdown.document(Writers(), rng)
        found = words.encode(document).ids
        assert len(found) == len(document.split()) and words.decode(found) == document
    assert words.decode([data.END]) == "" and countdown.VOCABULARY[5] == "4"


def test_a_corpus_is_whole_documents_and_the_same_every_time():
    corpus = countdown.corpus(Writers(), 3000, 1, 500)
    again = countdown.corpus(Writers(), 3000, 1, 500)
    assert corpus.hash == again.hash and corpus.train.equal(again.train) and corpus.valid.equal(again.valid)
    for stream, least in ((corpus.train, 3000), (corpus.valid, 500)):
        assert least <= len(stream) < least + 200 and stream[-1] == data.END and 0 <= stream.min() <= stream.max() < corpus.vocab_size
    texts = [[corpus.tokenizer.decode(part.tolist()) for part in stream.tensor_split((stream == data.END).nonzero().flatten() + 1)[:-1]]
             for stream in (corpus.train, corpus.valid)]
    rng = random.Random("train 1")
    assert texts[0] == [countdown.document(Writers(), rng) for _ in texts[0]]
    assert len(set(texts[0]) & set(texts[1])) == 0
    assert corpus.valid_bytes == len(" ".join(f"{text} <|end|>" for text in texts[1]))


def test_the_hash_of_a_corpus_changes_with_all_that_makes_it(monkeypatch):
    changes = {"verify": {"en": 0.4, "es": 0.35}, "give_up": {"en": 0.25, "es": 0.2}, "switch": 0.02, "other_language": 0.0, "untagged": 0.3,
               "facts": 0.1, "operators": "+-"}
    assert set(changes) == {f.name for f in fields(Writers)}
    hashes = [countdown.corpus(writers, 300, 0, 100).hash for writers in [Writers(), *(replace(Writers(), **{k: v}) for k, v in changes.items())]]
    hashes += [countdown.corpus(Writers(), *sizes).hash for sizes in ((300, 1, 100), (900, 0, 100), (300, 0, 400))]
    monkeypatch.setattr(countdown, "_worked", lambda expression: expression)  # the same words by another writer of the code
    hashes.append(countdown.corpus(Writers(), 300, 0, 100).hash)
    assert len(set(hashes)) == len(hashes)


def test_another_process_with_another_hash_seed_draws_the_same():
    code = ("import json; from helpers import countdown as c\n"
            "print(json.dumps([c.corpus(c.Writers(), 500, 3, 100).hash, [p.prompt for p in c.problems('dev', 9, 4)]]))")
    env = os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    root = Path(countdown.__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == [countdown.corpus(Writers(), 500, 3, 100).hash, [p.prompt for p in countdown.problems("dev", 9, 4)]]


# ------------------------------------------------------------------------------------------------------- rewards: what each hack scores


def tagged(expression, thoughts=THOUGHTS):
    return f"<think> {thoughts} </think> <answer> {expression} </answer>"


LINE = "check 21 right"
HACKS = {  # text -> accuracy, format, language consistency, readable; the problem is ASKED: make 21 from 2 6 9 1
    "a good answer": (GOOD, 1, 1, 1, 0),
    "a good answer and its line": (f"{GOOD} {LINE}", 1, 1, 1, 1),
    "the line in the other language": (f"{GOOD} revisa 21 bien", 1, 1, 1, 0),
    "the line of a wrong answer, true": (f"{tagged('2 + 6 + 9 + 1')} check 21 wrong", 0, 1, 1, 1),
    "the line claims the target": (f"{tagged('2 + 6 + 9 + 1')} check 21 right", 0, 1, 1, 0),
    "the line of some other result": (f"{tagged('2 + 6 + 9 + 1')} check 17 right", 0, 1, 1, 0),
    "the line twice": (f"{GOOD} {LINE} {LINE}", 1, 1, 1, 0),
    "the line before the answer": (f"{LINE} {GOOD}", 1, 0, 1, 0),
    "the line alone": (LINE, 0, 0, 0, 0),
    "a tail of anything": (f"{GOOD} bien bien 7 = =", 1, 1, 1, 0),
    "something before <think>": (f"try {GOOD}", 1, 0, 1, 0),
    "words between the tags": (f"<think> {THOUGHTS} </think> so <answer> {RIGHT} </answer>", 1, 0, 1, 0),
    "a wrong answer in good form": (tagged("2 + 6 + 9 + 1"), 0, 1, 1, 0),
    "seven words that are no expression": (tagged("A A A A A A A"), 0, 1, 1, 0),
    "no thoughts": (f"<think> </think> <answer> {RIGHT} </answer>", 1, 1, 0, 0),
    "thoughts without words": (tagged(RIGHT, "2 * 6 = 12"), 1, 1, 0, 0),
    "one right word as thoughts": (tagged(RIGHT, "right"), 1, 1, 1, 0),
    "praise instead of thoughts": (tagged(RIGHT, "right " * 50), 1, 1, 1, 0),
    "all thoughts in Spanish": (tagged(RIGHT, "prueba revisa bien"), 1, 1, 0, 0),
    "one word of four in Spanish": (tagged(RIGHT, "try check wait bien"), 1, 1, 0.75, 0),
    "Spanish hidden after the thoughts": (f"{GOOD} prueba espera bien", 1, 1, 1, 0),
    "Spanish hidden in the answer": (tagged("bien bien bien bien bien bien bien"), 0, 1, 1, 0),
    "the answer without tags": (RIGHT, 1, 0, 0, 0),
    "thoughts and answer without tags": (f"{THOUGHTS} ; {RIGHT}", 1, 0, 1, 0),
    "no tags, Spanish before the last semicolon": (f"try ; bien ; {RIGHT}", 1, 0, 0.5, 0),
    "no tags, one word too many": (f"{THOUGHTS} ; {RIGHT} right", 0, 0, 1, 0),
    "no tags, ten answers, the last right": (f"{'2 + 6 + 9 + 1 ' * 9}{RIGHT}", 1, 0, 0, 0),
    "no tags, the right answer first": (f"{RIGHT} 2 + 6 + 9 + 1", 0, 0, 0, 0),
    "thoughts never closed": (f"<think> {THOUGHTS} ; {RIGHT}", 1, 0, 1, 0),
    "thoughts closed, the answer without tags": (f"<think> {THOUGHTS} </think> {RIGHT}", 1, 0, 1, 0),
    "nothing": ("", 0, 0, 0, 0),
    "white space": (" \n\t  ", 0, 0, 0, 0),
    "the answer given twice": (f"{GOOD} <answer> {RIGHT} </answer>", 0, 0, 1, 0),
    "two answers, one right": (f"{GOOD} <answer> 2 + 6 + 9 + 1 </answer>", 0, 0, 1, 0),
    "all answers in one": (tagged(f"{RIGHT} ; 2 + 6 + 9 + 1"), 0, 0, 1, 0),
    "nested answers": (tagged(f"<answer> {RIGHT} </answer>"), 0, 0, 1, 0),
    "a nested opening": (tagged(f"<answer> {RIGHT}"), 0, 0, 1, 0),
    "a closing too many": (f"{GOOD} </answer>", 0, 0, 1, 0),
    "the answer not closed": (f"<think> {THOUGHTS} </think> <answer> {RIGHT}", 0, 0, 1, 0),
    "the answer not opened": (f"<think> {THOUGHTS} </think> {RIGHT} </answer>", 0, 0, 1, 0),
    "answer tags the wrong way round": (f"<think> {THOUGHTS} </think> </answer> {RIGHT} <answer>", 0, 0, 1, 0),
    "nested thoughts": (f"<think> <think> {THOUGHTS} </think> </think> <answer> {RIGHT} </answer>", 1, 0, 1, 0),
    "thoughts the wrong way round": (f"</think> {THOUGHTS} <think> <answer> {RIGHT} </answer>", 1, 0, 0, 0),
    "the answer inside the thoughts": (f"<think> {THOUGHTS} <answer> {RIGHT} </answer> </think>", 1, 0, 1, 0),
    "the answer first": (f"<answer> {RIGHT} </answer> <think> {THOUGHTS} </think>", 1, 0, 1, 0),
    "an empty answer": (tagged(""), 0, 0, 1, 0),
    "tags in capitals": (GOOD.upper(), 0, 0, 0, 0),
    "tags glued to the words": (f"<think>{THOUGHTS}</think><answer>{RIGHT}</answer>", 0, 0, 1, 0),
    "the question copied": (ASKED.prompt, 0, 0, 1, 0),
    "the question as the answer": (tagged("make 21 from 2 6 9 1"), 0, 1, 1, 0),
    "the digits copied": (tagged("2 6 9 1"), 0, 0, 1, 0),
    "the target": (tagged("21"), 0, 0, 1, 0),
    "the target in seven words": (tagged("21 = 21 = 21 = 21"), 0, 1, 1, 0),
    "another answer that hits, other digits": (tagged("3 * 6 + 2 + 1"), 0, 1, 1, 0),
    "digits in another order": (tagged("6 * 2 + 9 * 1"), 0, 1, 1, 0),
    "a digit left out": (tagged("2 * 6 + 9"), 0, 0, 1, 0),
    "an extra operation": (tagged(f"{RIGHT} + 0"), 0, 0, 1, 0),
    "an extra sign": (tagged("2 * 6 + + 9 * 1"), 0, 0, 1, 0),
    "a sign in front": (tagged(f"+ {RIGHT}"), 0, 0, 1, 0),
    "division": (tagged("2 * 6 + 9 / 1"), 0, 1, 1, 0),
    "a power": (tagged("2 ** 6 + 9 * 1"), 0, 1, 1, 0),
    "brackets": (tagged("( 2 * 6 ) + 9 * 1"), 0, 0, 1, 0),
    "the chain as the answer": (tagged("2 * 6 = 12 + 9 = 21 * 1 = 21"), 0, 0, 1, 0),
    "an equals sign at the end": (tagged(f"{RIGHT} = 21"), 0, 0, 1, 0),
    "no spaces": (tagged("2*6+9*1"), 0, 0, 1, 0),
    "leading zeros": (tagged("02 * 06 + 09 * 01"), 0, 1, 1, 0),
    "floats": (tagged("2.0 * 6.0 + 9.0 * 1.0"), 0, 1, 1, 0),
    "underscores": (tagged("2_ * 6 + 9 * 1"), 0, 1, 1, 0),
    "Arabic-Indic digits": (tagged("٢ * ٦ + ٩ * ١"), 0, 1, 1, 0),
    "Devanagari digits": (tagged("२ * ६ + ९ * १"), 0, 1, 1, 0),
    "full-width digits": (tagged("２ * ６ + ９ * １"), 0, 1, 1, 0),
    "superscripts": (tagged("² * ⁶ + ⁹ * ¹"), 0, 1, 1, 0),
    "another multiplication sign": (tagged("2 × 6 + 9 × 1"), 0, 1, 1, 0),
    "a zero-width space": (tagged("2\u200b * 6 + 9 * 1"), 0, 1, 1, 0),
    "a NUL": (tagged("2\0 * 6 + 9 * 1"), 0, 1, 1, 0),
    "white space of other kinds": (GOOD.replace(" ", "\u2003\n\x1f"), 1, 1, 1, 0),
    "code": (tagged("__import__ ( 'os' ) . system ('true')"), 0, 1, 1, 0),
    "code in one word": (tagged("__import__('os')._exit(3)"), 0, 0, 1, 0),
    "a format string": (tagged("%s {0} {problem.target} %n * 6 +"), 0, 1, 1, 0),
    "a huge number": (tagged(f"{'9' * 100_000} * 6 + 9 * 1"), 0, 1, 1, 0),
    "huge powers": (tagged("9**9**9**9 * 6 + 9 * 1"), 0, 1, 1, 0),
    "infinity": (tagged("inf * nan + 1e999 * 1"), 0, 1, 1, 0),
}


@pytest.mark.parametrize("name", HACKS)
def test_what_a_hack_scores(name):
    text, accuracy, form, consistency, readable = HACKS[name]
    assert countdown.accuracy(ASKED, text) == accuracy and countdown.well_formed(text) == form
    assert countdown.language_consistency("en", text) == consistency and countdown.readable(ASKED, text) == readable
    check_all(ASKED, text)
    assert by_hand(ASKED, text) == (accuracy, form)
    spoken = any(word in countdown.LANGUAGE for word in countdown.thoughts(text))
    assert countdown.language_consistency("es", text) == pytest.approx(1 - consistency if spoken else 0)


@pytest.mark.parametrize("problem, expression", [
    (Problem((9, 8, 9, 3), 60), "9 * 8 - 9 - 3"),  # 72 on the way
    (Problem((1, 5, 9, 2), 10), "1 - 5 + 9 * 2"),  # -4 on the way
    (Problem((7, 9, 8, 5), 50), "7 * 9 - 8 - 5"),  # 63 on the way
])
def test_a_total_outside_the_range_on_the_way_is_wrong_though_the_end_is_right(problem, expression):
    assert left_to_right(expression.split())[-1] == problem.target
    assert countdown.accuracy(problem, expression) == countdown.accuracy(problem, tagged(expression)) == 0


def test_sixty_and_zero_on_the_way_are_allowed():
    assert countdown.accuracy(Problem((6, 9, 6, 1), 59), "6 * 9 + 6 - 1") == 1
    assert countdown.accuracy(Problem((3, 3, 4, 5), 9), "3 - 3 + 4 + 5") == 1


def test_operators_that_were_not_allowed_are_wrong():
    assert countdown.accuracy(ASKED, RIGHT, "+-") == 0 and countdown.accuracy(Problem((2, 6, 9, 1), 18), "2 + 6 + 9 + 1", "+-") == 1
    assert countdown.behaviour(ASKED, GOOD, "+-")["accuracy"] == 0


def test_every_candidate_that_hits_is_right_and_no_other():
    for problem in countdown.problems("test", 200, 0):
        for expression, value in countdown.candidates(problem.digits).items():
            for text in (expression, tagged(expression), countdown.answer_text("try", expression, False)):
                assert countdown.accuracy(problem, text) == (value == problem.target)
            for language in ("en", "es"):
                line = countdown.summary(countdown.Problem(problem.digits, problem.target, language), expression)
                text = countdown.answer_text("try", expression, True, line)
                assert text.endswith(line) and countdown.readable(problem, text) == (language == problem.language) and countdown.well_formed(text)


def test_behaviour_by_hand():
    text = tagged(RIGHT, "try 2 + 6 = 8 check 21 wrong wait prueba 2 * 6 = 12 revisa 21 mal espera espera try so")
    assert countdown.behaviour(ASKED, text) == pytest.approx({
        "accuracy": 1, "format": 1, "readable": 0, "tries": 3, "verify": 1, "waits": 3, "mixed": 1, "consistency": 6 / 11})
    silent = countdown.behaviour(ASKED, tagged(RIGHT, "2 * 6"))
    assert math.isnan(silent.pop("consistency")) and silent == {
        "accuracy": 1, "format": 1, "readable": 0, "tries": 0, "verify": 0, "waits": 0, "mixed": 0}
    after = countdown.behaviour(ASKED, f"{tagged(RIGHT, 'try')} wait espera check")
    assert (after["tries"], after["waits"], after["verify"], after["mixed"]) == (1, 0, 0, 0), "only the chain of thought counts"
    assert countdown.behaviour(Problem((2, 6, 9, 1), 21, "es"), text)["consistency"] == pytest.approx(5 / 11)


def test_a_coloured_text_shows_every_word_and_no_markup_of_the_model():
    shown = countdown.coloured(f"{GOOD} bien <script> &")
    plain = html.unescape(re.sub("</?(?:span|u|b|i)(?: [^<>]*)?>", "", shown))
    assert plain == f"{GOOD} bien <script> &" and "<script>" not in shown
    assert re.search("<u [^>]*>bien</u>", shown) and not re.search("<u [^>]*>right</u>", shown) and re.search("<b [^>]*>&lt;think&gt;</b>", shown)
    assert "and 870 more words" in countdown.coloured("try " * 1000) and countdown.coloured("try " * 1000).count("try") == 130


# ------------------------------------------------------------------------------------------------------- rewards: any text whatever

ODD = ["٢", "９", "²", "−", "×", "\0", "\x1b[31m", "\u200b", "\u202e", "\ud800", "9" * 400, "1e999", "nan", "**", "//", "__import__('os')",
       "<Answer>", "<answer", "</think></answer>", "%s", "{}", "\\", "\U0001f600", "é", "-1", "2.0", "+2", "100", "<|end|>"]
SPACES = [" ", " ", " ", " ", " ", "\n", "  ", "\t", "\u2003", "\r\n", "", "\x85"]


def mutated(rng, words):
    """Some words repeated, dropped, swapped, replaced, doubled as a block."""
    words = list(words)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        i, j = (rng.randrange(len(words) + 1) for _ in range(2))
        i, j = min(i, j), max(i, j)
        kind = rng.randrange(6)
        if kind == 0:
            words[i:j] = words[i:j] * rng.randrange(3)
        elif kind == 1:
            words[i : i + 1] = []
        elif kind == 2:
            words.insert(i, rng.choice(countdown.VOCABULARY))
        elif kind == 3:
            words.insert(i, rng.choice(ODD))
        elif kind == 4:
            words.insert(i, rng.choice(countdown.TAGS))
        elif i < j < len(words):
            words[i], words[j] = words[j], words[i]
    return words


def test_a_hundred_thousand_random_and_mutated_texts():
    rng, asked, seen, longest = random.Random(0), countdown.problems("test", 500, 0), Counter(), 0.0
    for n in range(110_000):
        problem = asked[n % len(asked)]
        kind = rng.randrange(4)
        if kind == 0:
            words = rng.choices(countdown.VOCABULARY, k=rng.randrange(40))
        elif kind == 1:
            words = rng.choices([*countdown.TAGS, *map(str, problem.digits), *"+-*;", "try", "espera"], k=rng.randrange(30))
        elif kind == 2:
            right = [e for e, v in countdown.candidates(problem.digits).items() if v == problem.target]
            thoughts = rng.choice(("", "try", "try prueba check right", "A ;"))
            line = rng.choice(("", countdown.summary(problem, right[0])))
            words = mutated(rng, countdown.answer_text(thoughts, rng.choice(right), rng.random() < 0.7, line).split())
        else:
            words = mutated(rng, rng.choices([*countdown.VOCABULARY[100:], *ODD], k=rng.randrange(20)))
        space = rng.choice(SPACES)
        text = space.join(words)
        began = time.process_time()
        accuracy, form = countdown.accuracy(problem, text), countdown.well_formed(text)
        longest = max(longest, time.process_time() - began)
        assert (accuracy, form) == by_hand(problem, text), text
        check_all(problem, text)
        seen.update(accuracy=accuracy, form=form, readable=countdown.readable(problem, text), wrong_in_form=form and not accuracy)
    assert seen["accuracy"] > 5000 and seen["form"] > 5000 and seen["readable"] > 2000 and seen["wrong_in_form"] > 300, seen
    assert longest < 0.5


a_text = st.one_of(st.text(st.characters()), st.lists(st.sampled_from([*countdown.VOCABULARY, *ODD]), max_size=60).map(" ".join),
                   st.lists(st.sampled_from([*countdown.TAGS, *RIGHT.split(), ";", "try", "bien"]), max_size=40).map(" ".join),
                   st.integers(0, 2**32).map(lambda seed: " ".join(mutated(random.Random(seed), f"{GOOD} {LINE}".split()))))


@settings(max_examples=400, deadline=None)
@given(a_text, st.sampled_from(countdown.problems("dev", 20, 0) + [ASKED]))
def test_texts_that_nobody_thought_of(text, problem):
    check_all(problem, text)
    assert (countdown.accuracy(problem, text), countdown.well_formed(text)) == by_hand(problem, text)
    once = " ".join(text.split())
    for number in (countdown.accuracy, countdown.readable):
        assert number(problem, text) == number(problem, once), "only the words count, not the white space between them"
    for language in ("en", "es"):
        assert countdown.language_consistency(language, text) == countdown.language_consistency(language, once)


MEGABYTE = {name: text[:1_000_000] for name, text in {
    "one word": "a" * 10**6, "spaces": " " * 10**6, "control characters": "\0\x1b" * 500_000, "one number": "9" * 10**6,
    "tabs and words": "\ttry" * 250_000,
    "opened thoughts": "<think> " * 125_000, "closed thoughts": "</think> " * 111_112, "opened answers": "<answer> " * 111_112,
    "open and close": "<think> </think> <answer> </answer> " * 28_000, "nested": "<think> " * 60_000 + "</think> " * 60_000,
    "semicolons": "; " * 500_000, "good answers": f"{GOOD} " * 12_000, "good thoughts": f"<think> {(THOUGHTS + ' ') * 21_000}",
    "a long chain": "1 + " * 250_000, "wait": "wait espera " * 84_000,
    "letters far apart": "<answer>" + " a" * 500_000, "emoji": "\U0001f600 " * 500_000,
}.items()}
MEGABYTE["a good answer after a megabyte of thoughts"] = tagged(RIGHT, "wait " * 199_980)
MEGABYTE["a good answer before a megabyte"] = f"{GOOD} " + "wait " * 199_980


@pytest.mark.parametrize("name", MEGABYTE)
def test_a_megabyte_is_no_slow_case(name):
    text = MEGABYTE[name]
    assert len(text) > 990_000
    for number in (lambda: countdown.accuracy(ASKED, text), lambda: countdown.well_formed(text), lambda: countdown.readable(ASKED, text),
                   lambda: countdown.language_consistency("en", text), lambda: countdown.behaviour(ASKED, text)):
        began = time.process_time()
        found = number()
        assert time.process_time() - began < 1
        assert all(math.isnan(n) or 0 <= n <= len(text) for n in (found.values() if type(found) is dict else [found]))
    if name.startswith("a good answer"):
        assert countdown.accuracy(ASKED, text) == countdown.well_formed(text) == 1
