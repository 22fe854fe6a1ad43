"""Figures in words, and tables that fit."""

from __future__ import annotations

import pytest

from tuner.results import text
from tuner.results.text import Column, fit


def test_columns_are_dropped_by_their_rank_until_the_rest_fits():
    columns = [
        Column("trial", ["0"]),
        Column("wide", ["x" * 30], drop=2),
        Column("a", ["1"], drop=1),
        Column("b", ["2"]),
    ]
    assert [column.header for column in fit(columns, 80)[0]] == ["trial", "wide", "a", "b"]
    kept, dropped = fit(columns, 15)
    assert [column.header for column in kept] == ["trial", "a", "b"]
    assert [column.header for column in dropped] == ["wide"]
    assert [column.header for column in fit(columns, 1)[0]] == ["trial", "b"]


def test_a_table_that_fits_exactly_is_left_whole():
    columns = [Column("aaaa", []), Column("bbbb", [], drop=1)]
    assert len(fit(columns, 10)[0]) == 2
    assert len(fit(columns, 9)[0]) == 1


def test_keys_are_short_unless_two_would_be_alike():
    assert text.short_keys(["train.learning_rate", "lora.r"]) == {"train.learning_rate": "lr", "lora.r": "r"}
    assert text.short_keys(["train.seed", "model.seed"]) == {"train.seed": "train.seed", "model.seed": "model.seed"}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, ""), (0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (725, "12:05"), (3599.9, "1:00:00"), (12011, "3:20:11")],
)
def test_durations(seconds, words):
    assert text.duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "base", "words"),
    [(2.7, 3.0, "-10.0 %"), (0.5, 0.4, "+25.0 %"), (None, 3.0, ""), (2.0, None, ""), (2.0, float("nan"), "")],
)
def test_changes_against_the_base(value, base, words):
    assert text.change(value, base) == words


def test_the_data_s_summary_names_unused_columns_and_why_rows_were_dropped():
    counts = dict.fromkeys(
        ("rows_read", "rows_train", "rows_eval", "truncated", "duplicates_removed", "train_tokens"), 1
    )
    dropped = {"refused_by_chat_template": {"count": 1, "rows": [3], "says": "Roles must alternate"}}
    summary = {
        "format": "messages",
        "columns_unused": ["id", "source"],
        "dropped": dropped,
        "eval_dropped": {},
        **counts,
    }
    assert text.data_text(summary)[1:] == [
        "columns that are not used: id, source",
        "dropped: 1 refused_by_chat_template (rows 3: Roles must alternate)",
    ]
