"""Tables on a page."""

from helpers.page import tables

import pandas as pd
import pytest


@pytest.fixture
def shown(monkeypatch):
    """What was displayed."""
    found = []
    monkeypatch.setattr(tables, "display", lambda data, raw: found.append(data))
    return found


def test_a_table_has_formats_a_caption_and_dashes(shown):
    frame = pd.DataFrame(
        {"loss": [1.23456, None], "share": [0.25, 0.5], "tokens": [1000, 2]},
        index=["a", "b"],
    )
    tables.table(frame, "Losses of both arms.", {"share": "{:.0%}"})
    [data] = shown
    html = data["text/html"]
    assert "Losses of both arms.</caption>" in html
    for cell in (">1.235<", ">–<", ">25%<", ">1,000<"):
        assert cell in html
    assert "loss" in data["text/plain"]


def test_text_is_escaped(shown):
    tables.table(pd.DataFrame({"text": ["<script>x</script>"]}), "Texts.")
    assert "<script>" not in shown[0]["text/html"]


def test_the_same_table_is_the_same_html(shown):
    frame = pd.DataFrame({"x": [1]})
    tables.table(frame, "One.")
    tables.table(frame, "One.")
    assert shown[0] == shown[1]
