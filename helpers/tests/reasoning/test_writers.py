import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import helpers
from helpers.checks import InputError
from helpers.reasoning import countdown, rewards, writers
from helpers.reasoning.countdown import Problem
from helpers.reasoning.writers import Writers
from helpers.tests.reasoning.by_hand import ASKED, left_to_right
from helpers.training.corpus import END

import pytest

WORDS_OF = {name: set(words.values()) for name, words in countdown.WORDS.items()}
CHECKS = {"check", "revisa"}
TRIES = {"try", "prueba"}
STUCK = ("stuck", "atascado")


# -------------------------------------------------------------------------- a search


def try_of(text):
    """(expression, target said, verdict, language) of one try, all of it checked."""
    words = text.split()
    assert words[0] in TRIES
    language = "en" if words[0] == "try" else "es"
    check = next(i for i, word in enumerate(words) if word in CHECKS)
    sums = words[1:check]
    expression = [sums[0]]
    for i in range(1, len(sums), 4):
        assert sums[i + 2] == "="
        expression += sums[i : i + 2]
    totals = left_to_right(expression)
    assert totals[1:] == [int(total) for total in sums[4::4]]
    target, verdict, *rest = words[check + 1 :]
    assert {words[check], verdict} <= WORDS_OF[language]
    assert rest in ([], ["wait"], ["espera"], ["stuck"], ["atascado"])
    return " ".join(expression), int(target), verdict in ("right", "bien"), language


def tries_of(thoughts):
    """`try_of` each try of a chain of thought."""
    return [try_of(part) for part in re.split(r" (?=(?:try|prueba) )", thoughts)]


@pytest.mark.parametrize(
    "tries, give_up, switch",
    [(10, 0.25, 0.05), (27, 0.0, 0.0), (1, 0.0, 0.0), (3, 0.9, 1.0)],
)
def test_a_search_is_truthful_never_repeats_and_ends_as_it_says(tries, give_up, switch):
    rng = random.Random(0)
    for problem in countdown.problems("train", 300, 1):
        text, expression = writers.search(problem, rng, switch, give_up, tries)
        found = tries_of(text)
        tried = [e for e, _, _, _ in found]
        assert len(set(tried)) == len(tried) <= tries
        candidates = countdown.candidates(problem.digits)
        assert set(tried) <= set(candidates)
        values = [candidates[e] for e in tried]
        assert {target for _, target, _, _ in found} == {problem.target}
        verdicts = [right for _, _, right, _ in found]
        assert verdicts == [value == problem.target for value in values]
        assert expression == tried[-1]
        assert not any(verdicts[:-1])
        assert (text.split()[-1] in STUCK) == (values[-1] != problem.target)
        if tries == 27:
            assert values[-1] == problem.target


@pytest.mark.parametrize("switch", [0.0, 1.0])
def test_a_search_keeps_its_language_or_changes_it_with_every_try(switch):
    rng = random.Random(0)
    other = {"en": "es", "es": "en"}
    for problem in countdown.problems("train", 100, 1):
        text, _ = writers.search(problem, rng, switch)
        language = problem.language
        for _, _, _, found in tries_of(text):
            if switch:
                language = other[language]
            assert found == language


def test_a_search_uses_the_operators_it_is_given():
    rng = random.Random(0)
    for problem in countdown.problems("train", 50, 1, "+-"):
        text, expression = writers.search(problem, rng, tries=8, operators="+-")
        assert "*" not in text.split()
        assert countdown.chain(expression)[-1] == problem.target


@pytest.mark.parametrize("tries", [27, 28, 1000])
def test_a_search_that_goes_on_tries_every_candidate(tries):
    """A target that cannot be hit: all are tried, and then the writer is stuck."""
    candidates = countdown.candidates((2, 6, 9, 1))
    target = next(n for n in range(61) if n not in candidates.values())
    problem = Problem((2, 6, 9, 1), target)
    text, _ = writers.search(problem, random.Random(0), tries=tries)
    assert {e for e, _, _, _ in tries_of(text)} == set(candidates)
    assert text.split()[-1] == "stuck"


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"tries": 0}, "tries"),
        ({"tries": 2.0}, "tries"),
        ({"switch": 1.1}, "switch"),
        ({"switch": math.nan}, "switch"),
        ({"give_up": -0.1}, "give_up"),
        ({"operators": ""}, "operators"),
    ],
)
def test_a_search_that_cannot_be_is_named(arguments, name):
    with pytest.raises(InputError, match=f"^{name}=.* cannot work: "):
        writers.search(ASKED, random.Random(0), **arguments)


def test_a_search_without_a_candidate_says_so():
    problem = Problem((9, 9, 8, 7), 21)
    with pytest.raises(InputError, match=r"operators='\*'.*leaves 0..60"):
        writers.search(problem, random.Random(0), operators="*")


@pytest.mark.slow
def test_tries_switch_and_give_up_at_their_rates():
    rng = random.Random(0)
    tries = 0
    switched = 0
    wrong = 0
    gave_up = 0
    for problem in countdown.problems("train", 3000, 2):
        text, _ = writers.search(problem, rng, 0.05, 0.25)
        found = tries_of(text)
        languages = [problem.language, *(language for _, _, _, language in found)]
        tries += len(found)
        for before, after in zip(languages, languages[1:], strict=False):
            switched += before != after
        wrong += sum(not right for _, _, right, _ in found[:9])
        gave_up += len(found) < 10 and text.split()[-1] in STUCK
    for seen, n, p in ((switched, tries, 0.05), (gave_up, wrong, 0.25)):
        assert abs(seen / n - p) < 4 * math.sqrt(p * (1 - p) / n), (seen, n, p)


def test_answer_texts_by_hand():
    text = writers.answer_text("so", "2 + 3", last_line="check 5 right")
    assert text == "<think> so </think> <answer> 2 + 3 </answer> check 5 right"
    without = writers.answer_text("", "2 + 3")
    assert without == "<think> </think> <answer> 2 + 3 </answer>"
    assert writers.answer_text("so", "2 + 3", tagged=False) == "so ; 2 + 3"
    assert writers.answer_text("", "2 + 3", tagged=False) == "; 2 + 3"
    assert writers.summary(ASKED, "2 * 6 + 9 * 1") == "check 21 right"
    assert writers.summary(ASKED, "2 + 6 + 9 + 1") == "check 21 wrong"


# ------------------------------------------------------------------------- documents


def take_apart(document):
    """What one document of the corpus is; everything in it is checked.

    -> kind, asked (language of the question), right, digits, and of an answer: tagged,
    said (language of its first word), gave_up and wrong checks if it verifies.
    """
    words = document.split()
    assert set(words) <= set(countdown.VOCABULARY[1:]), "no end, no other word"
    if words[0] in ("fact", "dato"):
        return take_fact_apart(words)

    language = "en" if words[0] == "make" else "es"
    problem = Problem(tuple(map(int, words[3:7])), int(words[1]), language)
    assert " ".join(words[:8]) == problem.prompt
    answer = " ".join(words[8:])
    tagged = "<answer>" in words
    form = r"(?:(.*) )?; (.*)"
    if tagged:
        form = r"<think>(.*) </think> <answer> (.*) </answer>"
    thoughts, expression = re.fullmatch(form, answer).groups()
    thoughts = (thoughts or "").strip()
    assert left_to_right(expression.split()) is not None
    assert expression in countdown.candidates(problem.digits)
    assert rewards.thoughts(answer) == thoughts.split()
    assert rewards.final_answer(answer) == expression.split()
    assert rewards.well_formed(answer) == tagged
    seen = {
        "asked": problem.language,
        "right": rewards.accuracy(problem, answer),
        "tagged": tagged,
        "digits": problem.digits,
    }
    return seen | take_thoughts_apart(thoughts, expression)


def take_fact_apart(words):
    language = "en" if words[0] == "fact" else "es"
    opening = countdown.WORDS[language]["try_"]
    expression, target, right, said = try_of(" ".join([opening, *words[1:]]))
    assert said == language
    assert right == (left_to_right(expression.split())[-1] == target)
    digits = tuple(map(int, expression.split()[::2]))
    return {"kind": "fact", "asked": language, "right": right, "digits": digits}


def take_thoughts_apart(thoughts, expression):
    words = thoughts.split()
    languages = [countdown.LANGUAGE[w] for w in words if w in countdown.LANGUAGE]
    said = languages[0] if languages else None
    if not words:
        return {"kind": "direct", "said": said}
    if not CHECKS & set(words):
        assert words[-1] in ("so", "entonces")
        return {"kind": "one try", "said": said}
    found = tries_of(thoughts)
    assert found[-1][0] == expression
    assert len(found) <= 10
    return {
        "kind": "verify",
        "said": said,
        "gave_up": len(found) < 10 and not found[-1][2],
        "wrong": sum(not right for _, _, right, _ in found[:9]),
    }


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    return [take_apart(writers.document(Writers(), rng)) for _ in range(6000)]


def check_share(rows, of, p):
    """The share of `rows` with `of` is p within four standard errors."""
    found = sum(map(of, rows)) / len(rows)
    error = math.sqrt(max(p * (1 - p), 1e-4) / len(rows))
    assert len(rows) > 100
    assert abs(found - p) < 4 * error, (found, p, len(rows))


@pytest.mark.slow
def test_the_writers_write_the_shares_that_they_say(documents):
    answers = [d for d in documents if d["kind"] != "fact"]
    check_share(documents, lambda d: d["kind"] == "fact", 0.12)
    check_share(documents, lambda d: d["asked"] == "es", 0.5)
    check_share(answers, lambda d: not d["tagged"], 0.35)
    one_try = [d for d in answers if d["kind"] == "one try"]
    check_share(one_try, lambda d: d["said"] != d["asked"], 0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    "language, verify, give_up", [("en", 0.45, 0.25), ("es", 0.35, 0.28)]
)
def test_each_language_has_its_habits(documents, language, verify, give_up):
    answers = [d for d in documents if d["kind"] != "fact" and d["asked"] == language]
    check_share(answers, lambda d: d["kind"] == "verify", verify)
    others = [d for d in answers if d["kind"] != "verify"]
    check_share(others, lambda d: d["kind"] == "direct", 0.35 / 0.65)
    careful = [d for d in answers if d["kind"] == "verify"]
    wrong = sum(d["wrong"] for d in careful)
    gave_up = sum(d["gave_up"] for d in careful) / wrong
    assert abs(gave_up - give_up) < 4 * math.sqrt(give_up * (1 - give_up) / wrong)


@pytest.mark.slow
def test_verifying_pays_in_the_corpus(documents):
    answers = [d for d in documents if d["kind"] != "fact"]
    verified = [d["right"] for d in answers if d["kind"] == "verify"]
    others = [d["right"] for d in answers if d["kind"] != "verify"]
    assert sum(verified) / len(verified) > 2 * sum(others) / len(others) > 0


@pytest.mark.slow
def test_half_of_the_facts_are_drawn_right(documents):
    """The other half is drawn like a try, which can be right by chance."""
    facts = [d for d in documents if d["kind"] == "fact"]
    assert 0.5 < sum(d["right"] for d in facts) / len(facts) < 0.7


@pytest.mark.slow
def test_the_corpus_asks_nothing_of_the_other_splits(documents):
    assert {d["digits"] for d in documents} <= set(countdown.tuples("train"))


NOBODY = {"en": 0.0, "es": 0.0}
EVERYBODY = {"en": 1.0, "es": 1.0}
THE_ENGLISH = {"en": 1.0, "es": 0.0}


def never_past_a_wrong_check(d):
    return d["right"] or d["wrong"] == 1


def english_give_up_and_spanish_do_not(d):
    return not d["gave_up"] if d["asked"] == "es" else never_past_a_wrong_check(d)


@pytest.mark.parametrize(
    "change, test",
    [
        ({"facts": 1.0}, lambda d: d["kind"] == "fact"),
        ({}, lambda d: d["kind"] != "fact"),
        ({"verify": NOBODY}, lambda d: d["kind"] in ("direct", "one try")),
        (
            {"verify": THE_ENGLISH},
            lambda d: (d["kind"] == "verify") == (d["asked"] == "en"),
        ),
        ({"verify": EVERYBODY, "give_up": EVERYBODY}, never_past_a_wrong_check),
        (
            {"verify": EVERYBODY, "give_up": THE_ENGLISH},
            english_give_up_and_spanish_do_not,
        ),
        ({"untagged": 1.0}, lambda d: not d["tagged"]),
        ({"untagged": 0.0}, lambda d: d["tagged"]),
        ({"other_language": 1.0, "switch": 0.0}, lambda d: d["said"] != d["asked"]),
        (
            {"other_language": 0.0, "switch": 0.0},
            lambda d: d["said"] in (d["asked"], None),
        ),
    ],
    ids=lambda value: "" if callable(value) else "-".join(value) or "no facts",
)
def test_each_share_at_its_ends(change, test):
    rng = random.Random(0)
    arm = replace(Writers(facts=0.0), **change)
    for _ in range(200):
        assert test(take_apart(writers.document(arm, rng)))


def test_a_corpus_without_products_has_none():
    rng = random.Random(0)
    arm = Writers(operators="+-")
    for _ in range(300):
        assert "*" not in writers.document(arm, rng).split()


def test_a_corpus_of_products_alone_finds_the_few_tuples_that_have_some():
    rng = random.Random(0)
    arm = Writers(operators="*")
    for _ in range(300):
        assert not {"+", "-"} & set(writers.document(arm, rng).split())


@pytest.mark.parametrize(
    "change, name",
    [
        ({"switch": 1.5}, "switch"),
        ({"switch": "0.5"}, "switch"),
        ({"other_language": -0.1}, "other_language"),
        ({"untagged": True}, "untagged"),
        ({"facts": math.nan}, "facts"),
        ({"verify": 0.5}, "verify"),
        ({"verify": {"en": 0.5}}, "verify"),
        ({"verify": {"en": 0.5, "es": 0.5, "fr": 0.5}}, "verify"),
        ({"verify": {"en": 2, "es": 0.5}}, r"verify\['en'\]"),
        ({"give_up": {"en": 0.5, "es": None}}, r"give_up\['es'\]"),
    ],
)
def test_writers_that_cannot_be_are_named(change, name):
    with pytest.raises(InputError, match=f"^{name}=.* cannot work: "):
        Writers(**change)


# ------------------------------------------------------------------------ the corpus


def documents_of(corpus, stream):
    """The texts of a stream of tokens."""
    borders = (stream == END).nonzero().flatten() + 1
    parts = stream.tensor_split(borders)[:-1]
    return [corpus.tokenizer.decode(part.tolist()) for part in parts]


def test_a_corpus_is_whole_documents_and_the_same_every_time():
    corpus = writers.corpus(Writers(), 3000, 1, 500)
    again = writers.corpus(Writers(), 3000, 1, 500)
    assert corpus.hash == again.hash
    assert corpus.train.equal(again.train)
    assert corpus.valid.equal(again.valid)
    for stream, least in ((corpus.train, 3000), (corpus.valid, 500)):
        assert least <= len(stream) < least + 200
        assert stream[-1] == END
        assert 0 <= stream.min() <= stream.max() < corpus.vocab_size
    train = documents_of(corpus, corpus.train)
    valid = documents_of(corpus, corpus.valid)
    rng = random.Random("train 1")
    assert train == [writers.document(Writers(), rng) for _ in train]
    assert not set(train) & set(valid)
    assert corpus.valid_bytes == len(" ".join(f"{text} <|end|>" for text in valid))


def test_the_corpora_are_those_of_the_first_edition():
    """Trained bases and recorded results rest on them: same draws, texts and hashes."""
    expected = {
        "+-*": "0e74bd9fb7f6ad8c",
        "+-": "c8a64f4b5f252fed",
    }
    for operators, fingerprint in expected.items():
        arm = Writers(operators=operators)
        assert writers.corpus(arm, 3000, 0, 500).hash == fingerprint
    question = "forma 1 con 6 6 2 1 A"
    thoughts = "prueba 6 + 6 = 12 - 2 = 10 * 1 = 10 entonces"
    answer = f"<think> {thoughts} </think> <answer> 6 + 6 - 2 * 1 </answer>"
    first = writers.document(Writers(), random.Random(0))
    assert first == f"{question} {answer}"


def test_the_hash_of_a_corpus_changes_with_all_that_makes_it(monkeypatch):
    changes = {
        "verify": {"en": 0.4, "es": 0.35},
        "give_up": {"en": 0.25, "es": 0.2},
        "switch": 0.02,
        "other_language": 0.0,
        "untagged": 0.3,
        "facts": 0.1,
        "operators": "+-",
    }
    assert set(changes) == {f.name for f in fields(Writers)}
    arms = [Writers(**{name: value}) for name, value in changes.items()]
    hashes = [writers.corpus(arm, 300, 0, 100).hash for arm in [Writers(), *arms]]
    for tokens, seed, valid_tokens in ((300, 1, 100), (900, 0, 100), (300, 0, 400)):
        hashes.append(writers.corpus(Writers(), tokens, seed, valid_tokens).hash)
    # the same words by another writer of the code
    monkeypatch.setattr(writers, "worked", lambda expression: expression)
    hashes.append(writers.corpus(Writers(), 300, 0, 100).hash)
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"tokens": 0}, "tokens"),
        ({"tokens": 1e6}, "tokens"),
        ({"valid_tokens": -1}, "valid_tokens"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_a_corpus_that_cannot_be_is_named(arguments, name):
    with pytest.raises(InputError, match=f"^{name}="):
        writers.corpus(Writers(), **({"tokens": 300, "seed": 0} | arguments))


CODE = """
import json
from helpers.reasoning import countdown, writers
corpus = writers.corpus(writers.Writers(), 500, 3, 100)
prompts = [problem.prompt for problem in countdown.problems("dev", 9, 4)]
print(json.dumps([corpus.hash, prompts]))
"""


@pytest.mark.slow
def test_another_process_with_another_hash_seed_draws_the_same():
    out = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=Path(helpers.__file__).parent.parent,
        env=os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    corpus = writers.corpus(Writers(), 500, 3, 100)
    prompts = [problem.prompt for problem in countdown.problems("dev", 9, 4)]
    assert json.loads(out.stdout) == [corpus.hash, prompts]
