"""Filters, order, tables and documents over records."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
from made_by_hand import NAN, TRIALS, Made, make_spec, make_sweep
from servers import PASSWORD, PASSWORD_VARIABLE

from tuner.errors import SpecError
from tuner.results import query
from tuner.results.record import TrialRecord
from tuner.results.report import markdown_report


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def store(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        if request.param == "postgresql":
            environment.setenv(PASSWORD_VARIABLE, PASSWORD)
            environment.setenv("TUNER_TEST_STUDY", request.getfixturevalue("postgres_server").new_study())
        return make_sweep(tmp_path_factory.mktemp("runs"))


def numbers(store, **arguments):
    return [record.number for record in query.select(store.trials(), store.spec, **arguments)]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("lora.r>=16", [0, 2, 5, 3]),
        ("lora.r >= 16 and outcome == COMPLETED", [0, 2]),
        ("lora.r<16", [1, 4]),
        ("lora.r!=16", [2, 1, 3, 4]),
        ("train.learning_rate > 1e-3", [2, 3]),
        ("train.packing==none", [1, 5]),
        ("train.packing != 'none' and lora.r == 8", [4]),
        ('reason == "asha at 500 tokens"', [1]),
        ("reason == null", [0, 2, 5]),
        ("cause != null and lora.r <= 16", [1, 4]),
        ("eval_loss<2.65 and eval_loss>=2.5", [0, 3]),
        ("reached == 1_000", [0, 2]),
        ("train.max_length == 256 and number > 3", [5, 4]),
        ("lora.lora_alpha == 64", [2, 3]),
        ("outcome==completed", []),
        ("lora.r == '16'", []),
        ("started > '2020-01-01' and outcome==FAILED", [4]),
    ],
)
def test_where_finds(store, where, found):
    assert numbers(store, where=where) == found


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("lora.R >= 16", "did you mean lora.r"),
        ("eval_los < 3", "did you mean eval_loss"),
        ("nothing == 1", "train.packing"),
        ("lora.r", "KEY OP VALUE"),
        ("lora.r = 16", "KEY OP VALUE"),
        ("", None),
        ("lora.r >= 16 and", "KEY OP VALUE"),
        ("lora.r >= 16 or lora.r == 8", "got or lora.r == 8"),
        ("lora.r >= 16 lora.r == 8", "between two conditions"),
        ("lora.r >= big", "a number to compare lora.r with"),
        ("train.packing < 3", "a text to compare train.packing with"),
        ("__import__('os').system('true') == 0", "KEY OP VALUE"),
    ],
)
def test_where_that_is_wrong_says_what_would_be_right(store, where, message):
    if message is None:
        assert numbers(store, where=where) == numbers(store)
        return
    with pytest.raises(SpecError) as error:
        numbers(store, where=where)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({}, [0, 2, 1, 5, 3, 4]),
        ({"sort": "number"}, [0, 1, 2, 3, 4, 5]),
        ({"sort": "-number"}, [5, 4, 3, 2, 1, 0]),
        ({"sort": "eval_loss"}, [4, 3, 0, 2, 1, 5]),
        ({"sort": "train.learning_rate", "top": 2}, [1, 5]),
        ({"sort": "reason"}, [1, 3, 4, 0, 2, 5]),
        ({"sort": "-reason"}, [4, 3, 1, 0, 2, 5]),
        ({"top": 1}, [0]),
        ({"top": 99}, [0, 2, 1, 5, 3, 4]),
        ({"where": "lora.r==8", "sort": "-eval_loss", "top": 1}, [1]),
    ],
)
def test_trials_are_ordered_and_cut(store, arguments, found):
    assert numbers(store, **arguments) == found


@pytest.mark.parametrize("arguments", [{"where": "rouge > 0.5"}, {"sort": "-rouge"}], ids=str)
def test_a_metric_that_is_not_there_is_an_error_that_names_those_present(store, arguments):
    with pytest.raises(SpecError) as error:
        numbers(store, **arguments)
    (problem,) = error.value.problems
    present = problem.allowed.split(", ")
    assert problem.got == "rouge"
    assert {"eval_loss", "mean_token_accuracy", "tokens_per_s", *store.spec.space} <= set(present)


def test_sorting_by_an_unknown_key_names_the_nearest(store):
    with pytest.raises(SpecError, match=r"--sort: got lora\.rr; .*did you mean lora\.r"):
        numbers(store, sort="-lora.rr")


def test_a_key_that_only_some_trials_have_holds_for_those():
    spec = make_spec("/runs", space={"train.x": {"type": "choice", "values": [1]}})  # type: ignore[arg-type]
    records = [TrialRecord(0, "COMPLETED", {"train.x": 1}, {}), TrialRecord(1, "COMPLETED", {}, {})]
    assert [one.number for one in query.select(records, spec, where="train.x >= 1")] == [0]
    assert [one.number for one in query.select(records, spec, where="train.x != 1")] == [1]
    assert [one.number for one in query.select(records, spec, where="train.x == null")] == [1]
    assert [one.number for one in query.select(records, spec, sort="-train.x")] == [0, 1]


def test_the_json_document_is_pinned(store):
    document = query.document(store.spec, store.status(), store.trials())
    assert list(document) == ["sweep", "status", "objective", "baseline", "best", "trials"]
    assert document["sweep"] == "pydoc-lora"
    assert document["status"] == "finished"
    assert document["objective"] == "eval_loss"
    assert document["baseline"] == {"eval_loss": 3.0, "mean_token_accuracy": 0.41}
    assert document["best"] == 0
    assert [trial["number"] for trial in document["trials"]] == [0, 2, 1, 5, 3, 4]
    winner = document["trials"][0]
    assert list(winner) == [
        "number",
        "outcome",
        "reason",
        "config",
        "eval_loss",
        "mean_token_accuracy",
        "tokens",
        "step",
        "duration_s",
        "tokens_per_s",
        "adapter_path",
    ]
    assert winner.pop("duration_s") >= 0
    assert winner == {
        "number": 0,
        "outcome": "COMPLETED",
        "reason": None,
        "config": {"train.learning_rate": 0.00021, "train.packing": "bfd", "lora.r": 16, "lora.alpha_ratio": 2},
        "eval_loss": 2.6,
        "mean_token_accuracy": 0.5,
        "tokens": 750,
        "step": 7,
        "tokens_per_s": pytest.approx(310.0),
        "adapter_path": "/runs/tokens-750",
    }
    json.dumps(document, allow_nan=False)


def test_the_json_document_has_null_for_what_is_not_there_or_not_finite(tmp_path):
    store = make_sweep(tmp_path, [Made([NAN], "INFEASIBLE", "diverged", "nan")])
    store.set_prepared(1000, {}, {"eval_loss": math.inf})
    document = query.document(store.spec, store.status(), store.trials())
    assert document["best"] is None
    assert document["baseline"] == {"eval_loss": None, "mean_token_accuracy": None}
    trial = document["trials"][0]
    assert [trial[key] for key in ("eval_loss", "mean_token_accuracy", "tokens", "step", "adapter_path")] == [None] * 5


def test_the_best_of_the_document_is_that_of_all_trials_even_when_few_are_shown(store):
    records = store.trials()
    document = query.document(store.spec, store.status(), records, shown=records[3:4])
    assert document["best"] == 0
    assert [trial["number"] for trial in document["trials"]] == [3]


def test_the_frame_of_trials_has_a_row_a_trial_and_a_column_a_searched_key(store):
    frame = query.trials_frame(store.trials())
    assert list(frame.columns) == [*query.COLUMNS, "train.learning_rate", "train.packing", "lora.r", "lora.alpha_ratio"]
    assert list(frame["number"]) == [0, 1, 2, 3, 4, 5]
    assert list(frame["lora.r"]) == [16, 8, 32, 32, 8, 16]
    assert frame["eval_loss"].idxmin() == 4


def test_the_frame_of_reports_has_a_row_an_evaluation(store):
    frame = query.reports_frame(store.trials())
    assert len(frame) == sum(len(made.losses) for made in TRIALS)
    assert list(frame[frame["trial"] == 0]["eval_loss"]) == TRIALS[0].losses
    assert {"tokens", "train_loss", "grad_norm", "peak_memory_bytes", "adapter_path"} <= set(frame.columns)


@pytest.mark.parametrize("records", ["all", "none"])
def test_csv_and_parquet_hold_what_the_frame_holds(store, tmp_path, records):
    frame = query.trials_frame(store.trials() if records == "all" else [])
    query.write_frame(frame, "csv", tmp_path / "trials.csv")
    query.write_frame(frame, "parquet", tmp_path / "trials.parquet")
    from_csv, from_parquet = pd.read_csv(tmp_path / "trials.csv"), pd.read_parquet(tmp_path / "trials.parquet")
    assert list(from_csv.columns) == list(from_parquet.columns) == list(frame.columns)
    assert len(from_csv) == len(from_parquet) == len(frame)
    for key in ("number", "outcome", "eval_loss", "tokens"):
        assert list(from_csv[key]) == list(from_parquet[key]) == list(frame[key])
    if records == "all":
        assert list(from_parquet["train.packing"]) == [made.packing for made in TRIALS]
        assert list(from_parquet["lora.r"]) == [made.r for made in TRIALS]


def test_a_choice_of_mixed_types_goes_into_parquet_as_text(tmp_path):
    records = [TrialRecord(k, "STOPPED", {"train.x": value}, {}) for k, value in enumerate([1, "all", None, True])]
    query.write_frame(query.trials_frame(records), "parquet", tmp_path / "mixed.parquet")
    back = pd.read_parquet(tmp_path / "mixed.parquet")["train.x"]
    assert [None if pd.isna(value) else value for value in back] == ["1", "all", None, "True"]


def test_importances_add_up_to_one_and_need_two_completed_trials(store, tmp_path):
    shares, why_none = query.importances(store.study)
    assert set(shares) == set(store.spec.space)
    assert sum(shares.values()) == pytest.approx(1)
    assert why_none is None
    few = make_sweep(tmp_path, [TRIALS[0], TRIALS[1]])
    assert query.importances(few.study) == ({}, "importances need at least 2 completed trials; there are 1")


def test_the_report_says_what_was_asked_what_won_and_why_the_others_ended(store):
    store.set_promoted({"refused": ["not better than production v3"]})
    page = markdown_report(store.spec, store.status(), store.trials(), {"lora.r": 0.75}, None)
    for text in [
        "# Sweep pydoc-lora",
        "Not promoted: not better than production v3.",
        "| `train.learning_rate` | 1e-05 to 0.003 (log) |",
        "baseline (untuned): eval_loss 3.0000, accuracy 0.4100",
        "Trial 0: eval_loss 2.6000, accuracy 0.5000 (eval_loss -13.3 % against the base).",
        "Scored at 750 tokens, step 7; adapter `/runs/tokens-750`.",
        "| base |",
        "| *0 | 0.00021 | bfd | 16 | 2 | 2.6000 |",
        "| `lora.r` | 0.75 |",
        "- trial 4 FAILED: worker-lost: the worker died",
        "2 COMPLETED, 1 STOPPED, 1 RUNNING, 1 INFEASIBLE, 1 FAILED",
    ]:
        assert text in page, text


def test_the_report_of_a_sweep_without_trials_can_be_written(tmp_path):
    store = make_sweep(tmp_path, [], status="failed")
    page = markdown_report(store.spec, store.status(), [], *query.importances(store.study))
    assert "no trial completed its budget" in page
    assert "importances need at least 2 completed trials" in page
