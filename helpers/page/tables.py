"""A table on a page: a pandas frame with formats, and a caption that says what."""

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd
from IPython.display import display

NUMBERS = "{:,.4g}"
STYLES = [
    {"selector": "caption", "props": "caption-side: top; text-align: left;"},
    {"selector": "td, th", "props": "text-align: left; padding: 0.2em 0.8em;"},
]


def table(
    frame: pd.DataFrame,
    caption: str,
    formats: Mapping[Any, str] | None = None,
) -> None:
    """Display `frame`. A missing number is a dash.

    formats: {column: format}, such as {"loss": "{:.3f}", "share": "{:.0%}"}; other
    floats get four significant digits. With columns of two levels a format belongs to
    both, {("naive", "seconds"): "{:.1f}"}. Text is escaped.
    """
    chosen: dict[Hashable, str] = {}
    for name, kind in frame.dtypes.items():
        if pd.api.types.is_float_dtype(kind):
            chosen[name] = NUMBERS
        elif pd.api.types.is_integer_dtype(kind):
            chosen[name] = "{:,}"
    chosen |= formats or {}
    # a fixed uuid: the same table is the same HTML, so that git shows real changes only
    looks = frame.style.format(chosen, na_rep="–", escape="html")
    looks = looks.set_caption(caption).set_table_styles(STYLES).set_uuid("table")
    display({"text/html": looks.to_html(), "text/plain": str(frame)}, raw=True)
