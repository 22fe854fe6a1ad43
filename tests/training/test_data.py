"""Reading files, recognising rows, and splitting them: no tokenizer, no model."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from tuner.errors import DataError
from tuner.spec.sweep import DataSpec
from tuner.training.data import read_rows, source_fingerprint
from tuner.training.examples import read_examples
from tuner.training.formats import to_example
from tuner.training.split import build_rows, rows_key

ROWS = [{"text": "eins"}, {"text": "zwei ü"}, {"text": "drei\nvier"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def spec(path: Path | str, **fields: Any) -> dict[str, Any]:
    return DataSpec(path=str(path), **fields).model_dump()


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path, **fields: Any) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(spec(path, **fields), str(path))]


def error_of(path: Path, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **fields)
    return str(caught.value)


def examples(path: Path, **fields: Any) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    drops: dict[str, Any] = {}
    kind, _, found = read_examples(spec(path, **fields), str(path), "text", drops)
    return kind, [json.loads(text) for _, text in found], drops


def split(tmp_path: Path, path: Path, **fields: Any) -> tuple[list[Any], list[Any], dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    summary = build_rows(spec(path, **fields), "text", folder, lambda stage, done, total: None)
    parts = [datasets.load_from_disk(str(folder / name)) for name in ("train", "eval")]
    return *[[json.loads(row) for row in part["row"]] for part in parts], summary  # type: ignore[return-value]


# --- every kind of file


def make_file(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"rows.{kind.split('-')[0]}"
    table = pa.Table.from_pylist(ROWS)
    match kind:
        case "json":
            return write(path, json.dumps(ROWS, indent=2))
        case "json-columns":
            return write(path, json.dumps({"text": [row["text"] for row in ROWS]}))
        case "json-lines" | "jsonl" | "ndjson":
            return write_jsonl(path, ROWS)
        case "jsonl-bom":
            return write(path, b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, ROWS)).encode())
        case "csv":
            return write(path, 'text\neins\nzwei ü\n"drei\nvier"\n')
        case "tsv":
            return write(path, 'text\neins\n\nzwei ü\n"drei\nvier"')
        case "parquet":
            pyarrow.parquet.write_table(table, path)
        case "arrow-file":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        case "arrow-stream":
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        case "saved":
            datasets.Dataset.from_list(ROWS).save_to_disk(path)
        case "saved-dict":
            other = datasets.Dataset.from_list([{"text": "other"}])
            datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=other).save_to_disk(path)
    return path


KINDS = ["json", "json-columns", "json-lines", "jsonl", "jsonl-bom", "ndjson", "csv", "tsv"]
KINDS += ["parquet", "arrow-file", "arrow-stream", "saved", "saved-dict"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    assert read(make_file(tmp_path, kind)) == ROWS


def test_a_split_of_a_saved_dataset_dict_is_chosen_by_name(tmp_path: Path) -> None:
    path = make_file(tmp_path, "saved-dict")
    assert read(path, split="test") == [{"text": "other"}]
    assert "no split 'dev'; it has train, test" in error_of(path, split="dev")
    assert source_fingerprint(spec(path), str(path)) != source_fingerprint(spec(path, split="test"), str(path))


def test_a_key_that_arrow_filled_with_null_is_gone_and_null_content_stays(tmp_path: Path) -> None:
    calling = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"messages": CHAT}, {"messages": calling}]), path)
    assert [row["messages"] for row in read(path)] == [CHAT, calling]


def test_a_csv_field_may_be_longer_than_the_csv_module_allows_by_default(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", "text\n" + "x" * 200_000))[0]["text"] == "x" * 200_000


# --- unusable files: each names the place

GOOD = '{"text": "a"}\n'
BROKEN_FILES = {
    "a broken line": ("a.jsonl", GOOD * 6 + '{"text": ???}\n', "a.jsonl, line 7, column 10: not JSON"),
    "a line cut short": ("a.jsonl", GOOD + '{"text": "b', "a.jsonl, line 2, column 10: not JSON"),
    "a line that is no object": (
        "a.jsonl",
        GOOD + "[1]\n",
        "line 2: every line must be an object, got a list",
    ),
    "an endless nesting": ("a.jsonl", GOOD + "[" * 200_000, "a.jsonl, line 2: not usable JSON"),
    "a huge integer": ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "a.jsonl, line 1: not usable JSON"),
    "latin-1": (
        "a.jsonl",
        GOOD.encode() + b'{"text": "\xfc"}',
        "line 2, column 11: not UTF-8: byte 0xfc at offset 24",
    ),
    "broken json": ("a.json", '[\n {"text": "a"},\n {"text" "b"}\n]', "a.json, line 3, column 10: not JSON"),
    "json of numbers": ("a.json", '[{"text": "a"}, 3]', "a.json, item 2: every item must be an object, got a number"),
    "json of one string": ("a.json", '"a"', "a.json: expected a list of objects or an object of lists, got a string"),
    "one json object": (
        "a.json",
        '{"text": "a"}',
        "a list of objects or an object of lists, but 'text' is a string",
    ),
    "uneven columns": ("a.json", '{"a": [1], "b": [1, 2]}', "the columns have different lengths: {'a': 1, 'b': 2}"),
    "utf-16": ("a.csv", "text\na\n".encode("utf-16"), "a.csv, line 1, column 1: not UTF-8: byte 0xff at offset 0"),
    "too many fields": ("a.csv", 'a,b\n1,2\n"1\n1",2\n1,2,3\n', "a.csv, line 5: 3 fields where the header names 2"),
    "too few fields": ("a.csv", "a,b\n1,2\n1\n", "a.csv, line 3: 1 fields where the header names 2"),
    "an open quote": ("a.csv", 'a,b\n1,2\n1,"2\n', "a.csv, line 3: not CSV"),
    "a column twice": ("a.csv", "a,a\n1,2\n", "a.csv, line 1: the columns ['a'] stand twice"),
    "no header": ("a.csv", "", "a.csv, line 1: the first line must name every column"),
    "no parquet": ("a.parquet", "PAR1 nonsense", "a.parquet: cannot be read"),
    "no arrow": ("a.arrow", "nonsense, quite long nonsense", "a.arrow: cannot be read"),
    "another kind of file": ("a.xlsx", "", "a.xlsx: cannot tell what kind of file this is; allowed: .json, .jsonl"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_an_unusable_file_is_refused_with_the_place(tmp_path: Path, case: str) -> None:
    name, content, message = BROKEN_FILES[case]
    assert message in error_of(write(tmp_path / name, content))


HUGE = 50_000_000
MONSTERS: dict[str, tuple[str, Callable[[], str]]] = {
    "no json": ("line 2, column 1: not JSON", lambda: "x" * HUGE),
    "brackets": ("line 2: not usable JSON", lambda: "[" * HUGE),
    "one integer": ("line 2: not usable JSON", lambda: '{"text": ' + "9" * HUGE + "}"),
    "one list": ("dropped: 1 wrong_type (rows 2)", lambda: '{"text": [' + "1," * (HUGE // 2) + "1]}"),
    "one text": ("dropped: 1 too_long (rows 2)", lambda: '{"text": "' + "x" * HUGE + '"}'),
    "keys": ("rows of 1000001 columns; allowed: at most 1000", lambda: json.dumps(dict.fromkeys(range(1_000_000), 1))),
    "a csv header": ("rows of 25000001 columns; allowed: at most 1000", lambda: "c," * (HUGE // 2)),
    "a csv field": ("line 2: not CSV", lambda: 'text\n"' + "x" * HUGE),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", MONSTERS)
def test_a_line_of_50_mb_is_refused_or_dropped_in_seconds(tmp_path: Path, case: str) -> None:
    said, content = MONSTERS[case]
    suffix = "csv" if "csv" in case else "jsonl"
    path = write(tmp_path / f"a.{suffix}", content() if suffix == "csv" else GOOD + content() + "\n")
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        split(tmp_path, path)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("kind", ["parquet", "arrow-file", "arrow-stream"])
def test_a_truncated_binary_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = make_file(tmp_path, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"{path.name}: cannot be read" in error_of(path)


def test_a_damaged_saved_folder_is_refused_by_name(tmp_path: Path) -> None:
    path = make_file(tmp_path, "saved")
    (path / "state.json").write_text("{")
    assert "rows.saved: cannot be read" in error_of(path)
    assert "not a folder that datasets' save_to_disk wrote" in error_of(tmp_path)


@pytest.mark.parametrize("path", ["/no/such/file.jsonl", "missing.csv", "a/b/c", "../x"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(DataError, match=r"no such file or folder$"):
        read_rows(spec(path), path)


def test_a_hub_data_set_that_cannot_be_reached_is_a_data_error() -> None:
    with pytest.raises(DataError, match="nobody/nothing: no such file or folder, and not to be had from the hub"):
        read_rows(spec("nobody/nothing"), "nobody/nothing")


def test_a_hub_data_set_is_read_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real builder of datasets, with a folder per revision in the place of the hub."""
    for revision, rows in (("v1", ROWS), ("v2", ROWS[:1])):
        (tmp_path / revision).mkdir()
        write_jsonl(tmp_path / revision / "train.jsonl", rows)
    builder = datasets.load_dataset_builder

    def from_folder(path: str, name: str | None, revision: str) -> datasets.DatasetBuilder:
        return builder(str(tmp_path / revision), name, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", from_folder)
    prints = []
    for revision, rows in (("v1", ROWS), ("v2", ROWS[:1])):
        data = spec("someone/rows", revision=revision)
        assert list(read_rows(data, "someone/rows")) == list(enumerate(rows, start=1))
        prints.append(source_fingerprint(data, "someone/rows"))
    assert prints[0] != prints[1]
    with pytest.raises(DataError, match="someone/rows: no split 'dev'; it has train"):
        read_rows(spec("someone/rows", revision="v1", split="dev"), "someone/rows")


# --- formats

PLAIN = {"prompt": "2+2=", "completion": "4"}
FORMAT_EXAMPLES = {
    "text": ({"text": "a"}, {"text": "a"}),
    "prompt_completion": (PLAIN, PLAIN),
    "messages": (
        {"messages": CHAT, "tools": '[{"name": "f"}]'},
        {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        {
            "prompt": "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
            "### Input:\n2 2\n\n### Response:\n",
            "completion": "4",
        },
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": CHAT},
    ),
    "tokenized": ({"input_ids": [1, 2], "attention_mask": [1, 1]}, {"input_ids": [1, 2]}),
}


@pytest.mark.parametrize("kind", FORMAT_EXAMPLES)
def test_a_format_is_recognised_and_brought_into_trl_s_shape(tmp_path: Path, kind: str) -> None:
    row, example = FORMAT_EXAMPLES[kind]
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert examples(path) == (kind, [example], {})
    assert examples(path, format=kind) == (kind, [example], {})


def test_chat_prompts_stay_chat_and_alpaca_without_input_has_its_own_wording() -> None:
    chat = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    assert to_example("prompt_completion", chat) == chat
    example = to_example("alpaca", {"instruction": "Sing.", "input": "", "output": "La"})
    assert "### Input" not in example["prompt"]
    assert "describes a task. Write" in example["prompt"]


def test_columns_that_the_format_does_not_use_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**PLAIN, "id": 1}, {**PLAIN, "source": "x"}])
    assert read_examples(spec(path), str(path), "text", {})[1] == ["id", "source"]
    plain = write_jsonl(tmp_path / "b.jsonl", [{**PLAIN, "system": "Be kind."}])
    assert read_examples(spec(plain), str(plain), "text", {})[1] == ["system"]
    chat = write_jsonl(tmp_path / "c.jsonl", [{"messages": CHAT, "system": "Be kind."}])
    assert read_examples(spec(chat), str(chat), "text", {})[1] == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "q", "answer": 3}, "fits no known format; columns: question (str), answer (int)"),
        ({"text": "a", **PLAIN}, "fits more than one format (text, prompt_completion)"),
    ],
)
def test_what_cannot_be_recognised_is_refused_with_the_ways_out(tmp_path: Path, row: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        examples(write_jsonl(tmp_path / "a.jsonl", [row]))
    for part in (problem, "sharegpt (conversations)", "data.columns", "data.template", "data.formatter"):
        assert part in str(caught.value)


def test_a_format_that_the_columns_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not fit format messages; columns: text"):
        examples(write_jsonl(tmp_path / "a.jsonl", ROWS), format="messages")


def test_columns_are_renamed_before_the_format_is_recognised(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "2+2=", "answer": "4", "prompt": "unused"}])
    assert examples(path, columns={"prompt": "question", "completion": "answer"})[:2] == ("prompt_completion", [PLAIN])
    with pytest.raises(DataError, match=r"data.columns: a.jsonl has no column 'anwser'; it has question, answer"):
        examples(path, columns={"prompt": "question", "completion": "anwser"})


def test_a_template_makes_text_and_drops_rows_without_a_value(tmp_path: Path) -> None:
    rows = [{"q": "1+1", "the answer": 2}, {"q": "1+2", "the answer": None}, {"q": "2+2"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    kind, found, drops = examples(path, template="{q} = {the answer}{{}}")
    assert (kind, found) == ("text", [{"text": "1+1 = 2{}"}])
    assert drops == {"empty": {"count": 1, "rows": [2]}, "missing_column": {"count": 1, "rows": [3]}}


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{q} {b}", "data.template: a.jsonl has no column 'b'; it has q"),
        ("{q", "data.template: "),
        ("{}", "needs {column} fields"),
        ("{q.__class__}", "has no column 'q.__class__'"),
        ("{q:5.2f}", "a.jsonl, row 1: data.template"),
        ("{q:>99999999}", "data.template: '>99999999' is no width or precision below 1000"),
        ("{q:{q}}", "data.template: '{q}' is no width"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(tmp_path: Path, template: str, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        examples(write_jsonl(tmp_path / "a.jsonl", [{"q": "1"}]), template=template)
    assert problem in str(caught.value)


def test_a_formatter_converts_rows_and_its_errors_name_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = "def chat(row):\n    return {'prompt': row['q'], 'completion': str(1 // row['n'])}\n"
    write(tmp_path / "shaping_for_test.py", source)
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "a", "n": 1}, {"q": "b", "n": 0}])
    with pytest.raises(DataError, match=r"a.jsonl, row 2: shaping_for_test:chat raised ZeroDivisionError"):
        examples(path, formatter="shaping_for_test:chat")
    with pytest.raises(DataError, match="'shaping_for_test' has no function 'talk'"):
        examples(path, formatter="shaping_for_test:talk")
    with pytest.raises(DataError, match="'sys' is not a module with a source file"):
        rows_key(spec(path, formatter="sys:intern"), "text")
    with pytest.raises(DataError, match="cannot import 'no_such_module'"):
        examples(path, formatter="no_such_module:chat")
    one = write_jsonl(tmp_path / "b.jsonl", [{"q": "a", "n": 1}])
    assert examples(one, formatter="shaping_for_test:chat")[:2] == (
        "prompt_completion",
        [{"prompt": "a", "completion": "1"}],
    )
    before = rows_key(spec(one, formatter="shaping_for_test:chat"), "text")
    write(tmp_path / "shaping_for_test.py", source + "# changed\n")
    assert rows_key(spec(one, formatter="shaping_for_test:chat"), "text") != before


def test_rows_that_cannot_be_used_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    good = {"text": "good"}
    rows = [good, {"text": ""}, {"text": 3}, {"body": "a"}, {"text": " \n"}, {"text": None}, {"text": "\ud800"}]
    _, found, drops = examples(write_jsonl(tmp_path / "a.jsonl", rows + [{"text": ""}] * 5))
    assert found == [good]
    assert drops == {
        "empty": {"count": 8, "rows": [2, 5, 6, 8, 9]},
        "wrong_type": {"count": 2, "rows": [3, 7]},
        "missing_column": {"count": 1, "rows": [4]},
    }


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("prompt_completion", {"prompt": "a", "completion": " "}, "empty"),
        ("prompt_completion", {"prompt": "a", "completion": CHAT[1:]}, "wrong_type"),
        ("prompt_completion", {"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": ""}]}, "empty"),
        ("prompt_completion", {"prompt": [], "completion": CHAT[1:]}, "empty"),
        ("messages", {"messages": CHAT[:1]}, "empty"),
        ("messages", {"messages": "Hi"}, "not_json: the messages: 'Hi'"),
        ("messages", {"messages": [{"role": 1, "content": "a"}]}, "wrong_type"),
        ("messages", {"messages": CHAT, "tools": "{"}, "not_json: the tools: '{'"),
        ("alpaca", {"instruction": "a", "output": ""}, "empty"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "wrong_type"),
        ("sharegpt", {"conversations": "Hi"}, "not_json: the messages: 'Hi'"),
        ("sharegpt", {"conversations": []}, "empty"),
        ("tokenized", {"input_ids": []}, "empty"),
        ("tokenized", {"input_ids": [1, 2.0]}, "wrong_type"),
        ("tokenized", {"input_ids": [True, 2]}, "wrong_type"),
        ("tokenized", {"input_ids": [1, 2], "attention_mask": [1, 2]}, "wrong_type: a mask holds 0 and 1"),
        ("tokenized", {"input_ids": [1, 2], "labels": [1]}, "lengths_differ: 2 input_ids, 1 labels"),
        ("tokenized", {"input_ids": [1], "attention_mask": [1, 1]}, "lengths_differ: 1 input_ids, 2 attention_mask"),
        ("tokenized", {"input_ids": [1, 2], "attention_mask": [0, 0]}, "empty"),
        (
            "tokenized",
            {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]},
            "hole_in_attention_mask: masked tokens stand between others",
        ),
    ],
)
def test_a_row_without_an_answer_or_of_the_wrong_type_says_which(kind: str, row: Any, reason: str) -> None:
    assert to_example(kind, row) == reason


def test_padding_is_cut_from_tokens_and_all_that_goes_along_with_them() -> None:
    padded = {"input_ids": [2, 5, 6, 7, 2, 2], "labels": [-100, -100, 6, 7, 2, 2], "attention_mask": [0, 1, 1, 1, 0, 0]}
    assert to_example("tokenized", padded) == {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    masked = {"input_ids": [5, 6, 2], "completion_mask": [False, True, False], "attention_mask": [True, True, False]}
    assert to_example("tokenized", masked) == {"input_ids": [5, 6], "completion_mask": [0, 1]}


# --- the split


def numbered(tmp_path: Path, count: int, name: str = "a.jsonl") -> Path:
    return write_jsonl(tmp_path / name, [{"text": f"row {number}"} for number in range(count)])


def test_the_split_depends_on_the_data_and_its_seed_only(tmp_path: Path) -> None:
    path = numbered(tmp_path, 100)
    train, held_out, summary = split(tmp_path, path, eval_fraction=0.2)
    assert len(held_out) == 20
    assert len(train) == 80
    assert summary["duplicates_removed"] == 0
    assert split(tmp_path, path, eval_fraction=0.2) == (train, held_out, summary)
    texts = {row["text"] for row in train} | {row["text"] for row in held_out}
    assert texts == {f"row {number}" for number in range(100)}
    assert split(tmp_path, path, eval_fraction=0.2, seed=1)[1] != held_out
    # Pinned: a change of the split makes every earlier score incomparable.
    assert [row["text"] for row in held_out][:5] == ["row 2", "row 7", "row 8", "row 13", "row 16"]


def test_fewer_examples_are_a_seeded_choice_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = numbered(tmp_path, 100)
    train, held_out, _ = split(tmp_path, path, eval_fraction=0.5, max_eval_examples=7, max_train_examples=10)
    numbers = [int(row["text"].split()[1]) for row in train]
    assert len(held_out) == 7
    assert len(numbers) == 10
    assert numbers == sorted(numbers) != list(range(10))
    smaller = split(tmp_path, path, eval_fraction=0.5, max_eval_examples=3)[1]
    assert len(smaller) == 3
    assert all(row in held_out for row in smaller)


def test_rows_in_both_sets_are_dropped_from_training_and_counted(tmp_path: Path) -> None:
    own = [{"prompt": "a", "completion": "b"}, {"completion": "d", "prompt": "c"}, {"prompt": "e", "completion": "f"}]
    path = write_jsonl(tmp_path / "a.jsonl", [*own, own[1]])
    held = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "c", "completion": "d", "id": 7}])
    train, held_out, summary = split(tmp_path, path, eval_path=str(held))
    assert train == [own[0], own[2]]
    assert held_out == [{"prompt": "c", "completion": "d"}]
    assert summary["duplicates_removed"] == 2
    assert summary["rows_read"] == 4


def test_a_row_that_stands_twice_in_one_file_is_never_in_both_sets(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {number % 20}"} for number in range(60)])
    train, held_out, summary = split(tmp_path, path, eval_fraction=0.1)
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
    assert len(train) + len(held_out) + summary["duplicates_removed"] == 60
    assert summary["duplicates_removed"] > 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": ""}, {"text": 1}],
            r"no usable row; 2 rows read, dropped: 1 empty \(rows 1\), 1 wrong_type",
        ),
        ([{"text": "a"}, {"text": ""}], "one usable row cannot be both trained on and held out; 2 rows read"),
        ([{"text": 1}, {"text": ["a"]}, {"text": {}}], r"fits no known format; columns: text \(dict or int or list\)"),
        ([{"text": "a"}] * 3, "nothing left to train on: all 2 usable rows also stand in the evaluation set"),
    ],
)
def test_nothing_left_says_why(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows))


def test_an_evaluation_set_that_is_the_training_set_says_so(tmp_path: Path) -> None:
    path, other = numbered(tmp_path, 5), numbered(tmp_path, 5, "b.jsonl")
    with pytest.raises(DataError, match="all 5 usable rows also stand in the evaluation set"):
        split(tmp_path, path, eval_path=str(other))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.jsonl: holds no rows"):
        split(tmp_path, write(tmp_path / "a.jsonl", "\n\n"))


# --- the data that ships


def test_the_shipped_docstrings_are_chat_rows_without_repetition() -> None:
    path = Path(__file__).parents[2] / "search_spaces" / "data" / "pydoc.jsonl"
    kind, found, drops = examples(path)
    assert kind == "prompt_completion"
    assert drops == {}
    assert 1300 <= len(found) <= 1400
    answers = [row["completion"][0]["content"] for row in found]
    assert len(set(answers)) == len(answers)
    assert all(40 <= len(answer) <= 600 for answer in answers)
    assert path.stat().st_size < 1_500_000
