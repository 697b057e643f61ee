"""Texts of the reasoning task as a page shows them."""

import html

from helpers.checks import Whole, check
from helpers.reasoning.countdown import LANGUAGE, TAGS

# Blue and orange are told apart by colour-blind readers; the underline is for print.
ENGLISH = '<span style="color:#0072B2">{}</span>'
SPANISH = '<u style="color:#B84A00">{}</u>'
TAG = '<b style="color:#222">{}</b>'
PLAIN = '<span style="color:#6b6b6b">{}</span>'


def coloured(text: str, longest: int = 130) -> str:
    """HTML of a text, every word escaped; cut after `longest` words, and it says so.

    English words are blue, Spanish ones orange and underlined, tags bold, all the rest
    (numbers, signs, and what is no word of the task) grey.
    """
    check("longest", longest, Whole)
    words = text.split()
    shown = [_look(word).format(html.escape(word)) for word in words[:longest]]
    if len(words) > longest:
        shown.append(f"<i>… and {len(words) - longest} more words</i>")
    return " ".join(shown)


def _look(word: str) -> str:
    if word in TAGS:
        return TAG
    by_language = {"en": ENGLISH, "es": SPANISH}
    return by_language.get(LANGUAGE.get(word, ""), PLAIN)
