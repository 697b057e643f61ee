"""What each way to cheat a reward scores."""

from helpers.reasoning import rewards
from helpers.reasoning.countdown import LANGUAGE
from helpers.tests.reasoning.by_hand import (
    ASKED,
    GOOD,
    LINE,
    RIGHT,
    THOUGHTS,
    WRONG,
    check_all,
    scores,
    tagged,
)

import pytest

# text -> accuracy, format, language consistency, readable; asked: make 21 from 2 6 9 1
HACKS = {
    "a good answer": (GOOD, 1, 1, 1, 0),
    "a good answer and its line": (f"{GOOD} {LINE}", 1, 1, 1, 1),
    "the line in the other language": (f"{GOOD} revisa 21 bien", 1, 1, 1, 0),
    "the line of a wrong answer, true": (f"{tagged(WRONG)} check 21 wrong", 0, 1, 1, 1),
    "the line claims the target": (f"{tagged(WRONG)} check 21 right", 0, 1, 1, 0),
    "the line of some other result": (f"{tagged(WRONG)} check 17 right", 0, 1, 1, 0),
    "the line twice": (f"{GOOD} {LINE} {LINE}", 1, 1, 1, 0),
    "the line before the answer": (f"{LINE} {GOOD}", 1, 0, 1, 0),
    "the line alone": (LINE, 0, 0, 0, 0),
    "a tail of anything": (f"{GOOD} bien bien 7 = =", 1, 1, 1, 0),
    "something before <think>": (f"try {GOOD}", 1, 0, 1, 0),
    "words between the tags": (
        f"<think> {THOUGHTS} </think> so <answer> {RIGHT} </answer>",
        1,
        0,
        1,
        0,
    ),
    "a wrong answer in good form": (tagged(WRONG), 0, 1, 1, 0),
    "seven words that are no expression": (tagged("A A A A A A A"), 0, 1, 1, 0),
    "no thoughts": (f"<think> </think> <answer> {RIGHT} </answer>", 1, 1, 0, 0),
    "thoughts without words": (tagged(RIGHT, "2 * 6 = 12"), 1, 1, 0, 0),
    "one right word as thoughts": (tagged(RIGHT, "right"), 1, 1, 1, 0),
    "praise instead of thoughts": (tagged(RIGHT, "right " * 50), 1, 1, 1, 0),
    "all thoughts in Spanish": (tagged(RIGHT, "prueba revisa bien"), 1, 1, 0, 0),
    "one word of four in Spanish": (
        tagged(RIGHT, "try check wait bien"),
        1,
        1,
        0.75,
        0,
    ),
    "Spanish hidden after the thoughts": (f"{GOOD} prueba espera bien", 1, 1, 1, 0),
    "Spanish hidden in the answer": (
        tagged("bien bien bien bien bien bien bien"),
        0,
        1,
        1,
        0,
    ),
    "the answer without tags": (RIGHT, 1, 0, 0, 0),
    "thoughts and answer without tags": (f"{THOUGHTS} ; {RIGHT}", 1, 0, 1, 0),
    "no tags, Spanish before the last semicolon": (
        f"try ; bien ; {RIGHT}",
        1,
        0,
        0.5,
        0,
    ),
    "no tags, one word too many": (f"{THOUGHTS} ; {RIGHT} right", 0, 0, 1, 0),
    "no tags, ten answers, the last right": (f"{(WRONG + ' ') * 9}{RIGHT}", 1, 0, 0, 0),
    "no tags, the right answer first": (f"{RIGHT} {WRONG}", 0, 0, 0, 0),
    "thoughts never closed": (f"<think> {THOUGHTS} ; {RIGHT}", 1, 0, 1, 0),
    "thoughts closed, the answer without tags": (
        f"<think> {THOUGHTS} </think> {RIGHT}",
        1,
        0,
        1,
        0,
    ),
    "nothing": ("", 0, 0, 0, 0),
    "white space": (" \n\t  ", 0, 0, 0, 0),
    "the answer given twice": (f"{GOOD} <answer> {RIGHT} </answer>", 0, 0, 1, 0),
    "two answers, one right": (f"{GOOD} <answer> {WRONG} </answer>", 0, 0, 1, 0),
    "all answers in one": (tagged(f"{RIGHT} ; {WRONG}"), 0, 0, 1, 0),
    "nested answers": (tagged(f"<answer> {RIGHT} </answer>"), 0, 0, 1, 0),
    "a nested opening": (tagged(f"<answer> {RIGHT}"), 0, 0, 1, 0),
    "a closing too many": (f"{GOOD} </answer>", 0, 0, 1, 0),
    "the answer not closed": (
        f"<think> {THOUGHTS} </think> <answer> {RIGHT}",
        0,
        0,
        1,
        0,
    ),
    "the answer not opened": (
        f"<think> {THOUGHTS} </think> {RIGHT} </answer>",
        0,
        0,
        1,
        0,
    ),
    "answer tags the wrong way round": (
        f"<think> {THOUGHTS} </think> </answer> {RIGHT} <answer>",
        0,
        0,
        1,
        0,
    ),
    "nested thoughts": (
        f"<think> <think> {THOUGHTS} </think> </think> <answer> {RIGHT} </answer>",
        1,
        0,
        1,
        0,
    ),
    "thoughts the wrong way round": (
        f"</think> {THOUGHTS} <think> <answer> {RIGHT} </answer>",
        1,
        0,
        0,
        0,
    ),
    "the answer inside the thoughts": (
        f"<think> {THOUGHTS} <answer> {RIGHT} </answer> </think>",
        1,
        0,
        1,
        0,
    ),
    "the answer first": (
        f"<answer> {RIGHT} </answer> <think> {THOUGHTS} </think>",
        1,
        0,
        1,
        0,
    ),
    "an empty answer": (tagged(""), 0, 0, 1, 0),
    "tags in capitals": (GOOD.upper(), 0, 0, 0, 0),
    "tags glued to the words": (
        f"<think>{THOUGHTS}</think><answer>{RIGHT}</answer>",
        0,
        0,
        1,
        0,
    ),
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
    assert rewards.accuracy(ASKED, text) == accuracy
    assert rewards.well_formed(text) == form
    assert rewards.language_consistency("en", text) == consistency
    assert rewards.readable(ASKED, text) == readable
    check_all(ASKED, text)
    assert scores(ASKED, text) == (accuracy, form)
    spoken = any(word in LANGUAGE for word in rewards.thoughts(text))
    spanish = 1 - consistency if spoken else 0
    assert rewards.language_consistency("es", text) == pytest.approx(spanish)
