"""What others wrote stays text in Markdown and in spreadsheets."""

from __future__ import annotations

import io

import pandas as pd
import pytest

from tuner.results.markdown import code, fenced, inline
from tuner.results.query import write_frame


@pytest.mark.parametrize("ticks", [0, 2, 3, 4, 9])
def test_a_block_ends_where_the_text_ends_whatever_ticks_are_in_it(ticks):
    text = "a\n" + "`" * ticks + "\n# no heading"
    first, *inner, last = fenced(text).splitlines()
    assert "\n".join(inner) == text
    assert first == last + "text"
    assert last not in text
    assert set(last) == {"`"}


def test_html_links_and_bars_in_a_paragraph_are_text():
    assert inline("<script>x</script>\n![i](u) | `c` *b*") == (
        "&lt;script&gt;x&lt;/script&gt; !\\[i\\](u) \\| \\`c\\` *b*"
    )
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"


def test_text_that_a_spreadsheet_would_run_is_text_in_csv_and_numbers_stay_numbers():
    frame = pd.DataFrame({"=1+1": ["=cmd()", "+1", "-a", "@b", "\tc", "\rd", "e\r=f()"], "n": [-1.5] * 7})
    file = io.BytesIO()
    write_frame(frame, "csv", file)
    file.seek(0)
    found = pd.read_csv(file)
    assert list(found.columns) == ["'=1+1", "n"]
    assert list(found["'=1+1"]) == ["'=cmd()", "'+1", "'-a", "'@b", "'\tc", "'\nd", "e\n=f()"]
    assert list(found["n"]) == [-1.5] * 7
