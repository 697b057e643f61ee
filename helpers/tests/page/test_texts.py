import html
import re

from helpers.checks import InputError
from helpers.page.texts import coloured
from helpers.reasoning.writers import answer_text

import pytest

GOOD = answer_text("try 2 + 3 = 5 check 5 right", "2 + 3")
MARKUP = re.compile("</?(?:span|u|b|i)(?: [^<>]*)?>")


def test_a_coloured_text_shows_every_word_and_no_markup_of_the_model():
    text = f"{GOOD} bien <script> &"
    shown = coloured(text)
    assert html.unescape(MARKUP.sub("", shown)) == text
    assert "<script>" not in shown
    assert re.search("<u [^>]*>bien</u>", shown)
    assert not re.search("<u [^>]*>right</u>", shown)
    assert re.search("<b [^>]*>&lt;think&gt;</b>", shown)


def test_a_long_text_is_cut_and_says_so():
    shown = coloured("try " * 1000)
    assert shown.endswith("<i>… and 870 more words</i>")
    assert shown.count("try") == 130
    assert coloured("try " * 130).count("try") == 130
    assert "more words" not in coloured("try " * 130)
    assert coloured("try wait so", 1).endswith("and 2 more words</i>")


@pytest.mark.parametrize("longest", [-1, 2.5, True, None])
def test_a_length_that_cannot_be_is_named(longest):
    with pytest.raises(InputError, match="^longest="):
        coloured("try", longest)
