"""What the trainer sees: equal to a stock SFTTrainer's own preparation, made once, and never silently less."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen2_5_chat_template

from tuner.errors import DataError
from tuner.spec.sweep import DataSpec, SweepSpec
from tuner.training.dataset import Prepared, eval_max_length, prepare
from tuner.training.tokens import Masking, configure_tokenizer, tokenize

Rows = list[dict[str, Any]]
Prepare = Callable[..., Prepared]

PYDOC = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "search_spaces" / "data" / "pydoc.jsonl").read_text().splitlines()
]
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_rows(count: int) -> Rows:
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in PYDOC[:count]]


def conversations(count: int) -> Rows:
    pairs = [row["prompt"] + row["completion"] for row in PYDOC[: 2 * count]]
    return [{"messages": first + second} for first, second in zip(pairs[::2], pairs[1::2], strict=True)]


def plain_rows(count: int) -> Rows:
    asked = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in PYDOC[:count]]
    return [{"prompt": f"Q: {question}\nA:", "completion": f" {answer}"} for question, answer in asked]


def texts(count: int) -> Rows:
    return [{"text": row["completion"][0]["content"]} for row in PYDOC[:count]]


def tokenized(count: int) -> Rows:
    return [
        {"input_ids": list(range(n, 2 * n)), "completion_mask": [0] * (n // 2) + [1] * (n - n // 2)}
        for n in range(2, count + 2)
    ]


HELD_OUT: dict[str, dict[str, Any]] = {
    "text": {"text": "held out", "body": "held out"},
    "prompt": {"prompt": "held", "completion": "out"},
    "messages": {"messages": [{"role": "user", "content": "held"}, {"role": "assistant", "content": "out"}]},
    "input_ids": {"input_ids": [1, 2, 3]},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def prepare_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Prepare:
    """Prepare rows written to a file, all of them for training; one row of the same kind is held out."""

    def run(rows: Rows, train: dict[str, Any], held_out: Rows | None = None, max_length: Any = 1024) -> Prepared:
        kind = next(key for key in HELD_OUT if key in rows[0])
        for name, content in (("rows", rows), ("held_out", held_out or [HELD_OUT[kind]])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        data = DataSpec(path=str(tmp_path / "rows.jsonl"), eval_path=str(tmp_path / "held_out.jsonl"))
        return prepare(data.model_dump(), train, deepcopy(tokenizer), tmp_path / "cache", max_length)

    return run


@pytest.fixture
def stock(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., datasets.Dataset]:
    """What SFTTrainer makes of the same rows by itself."""

    def run(rows: Rows, train: dict[str, Any]) -> datasets.Dataset:
        fields = dict(train)
        packing = fields.pop("packing", "none")
        strategy = {} if packing == "none" else {"packing": True, "packing_strategy": packing}
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_dir),
            args=SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, **strategy, **fields),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        )
        return trainer.train_dataset

    return run


def load(folder: Path) -> datasets.Dataset:
    return datasets.load_from_disk(str(folder))


def assert_equal(ours: Path, theirs: datasets.Dataset) -> None:
    mine = load(ours)
    theirs = theirs.select_columns(mine.column_names)
    assert mine.features == theirs.features
    assert mine.to_dict() == theirs.to_dict()


# --- equality with TRL


KINDS: dict[str, tuple[Rows, dict[str, Any]]] = {
    "text": (texts(40), {}),
    "text with another eos": (texts(40), {"eos_token": "<|endoftext|>"}),
    "other column": (
        [{"text": "-", "body": row["text"]} for row in texts(9)],
        {"dataset_text_field": "body"},
    ),
    "plain": (plain_rows(40), {}),
    "plain, all tokens": (plain_rows(40), {"completion_only_loss": False}),
    "chat": (chat_rows(40), {}),
    "chat, all tokens": (chat_rows(40), {"completion_only_loss": False}),
    "messages": (conversations(20), {}),
    "tokenized": (tokenized(20), {}),
    "tokenized, completions": (tokenized(20), {"completion_only_loss": True}),
    "cut at the end": (texts(60), {"max_length": 32}),
    "cut at the start": (chat_rows(60), {"max_length": 48, "truncation_mode": "keep_end"}),
    "never cut": (texts(20), {"max_length": None}),
    "shuffled": (chat_rows(40), {"shuffle_dataset": True, "seed": 7}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_a_stock_sft_trainer_prepares(kind: str, prepare_rows: Prepare, stock: Any) -> None:
    rows, train = KINDS[kind]
    assert_equal(prepare_rows(rows, train).train, stock(rows, train))


@pytest.mark.parametrize("template", [MARKED_TEMPLATE, qwen2_5_chat_template], ids=["marked", "known to TRL"])
@pytest.mark.parametrize("rows", [conversations(15), chat_rows(15)], ids=["messages", "chat"])
def test_assistant_only_loss_masks_as_a_stock_sft_trainer_does(
    template: str, rows: Rows, tmp_path: Path, prepare_rows: Prepare, stock: Any
) -> None:
    (tmp_path / "chat.jinja").write_text(template)
    train = {"assistant_only_loss": True, "chat_template_path": str(tmp_path / "chat.jinja")}
    prepared = prepare_rows(rows, train, [HELD_OUT["messages"]])
    assert_equal(prepared.train, stock(rows, train))
    assert 0 < prepared.summary["target_tokens"] < prepared.summary["train_tokens"]


def test_a_chat_template_is_taken_over_from_another_tokenizer(
    tmp_path: Path, tiny_model_dir: Path, prepare_rows: Prepare, stock: Any
) -> None:
    other = AutoTokenizer.from_pretrained(tiny_model_dir)
    other.chat_template = MARKED_TEMPLATE
    other.eos_token = "<|endoftext|>"
    other.save_pretrained(tmp_path / "other")
    train = {"chat_template_path": str(tmp_path / "other")}
    assert_equal(prepare_rows(chat_rows(10), train).train, stock(chat_rows(10), train))
    assert_equal(prepare_rows(texts(10), train).train, stock(texts(10), train))


@pytest.mark.parametrize("packing", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_packs_are_what_a_stock_sft_trainer_packs(
    packing: str, shuffle: bool, prepare_rows: Prepare, stock: Any
) -> None:
    rows = [{"text": row["prompt"][0]["content"]} for row in PYDOC[:1100]]  # TRL packs a thousand rows at a time
    train = {"packing": packing, "max_length": 14, "shuffle_dataset": shuffle, "seed": 3}
    prepared = prepare_rows(rows, train)
    assert_equal(prepared.train, stock(rows, train))
    assert ("seq_lengths" in load(prepared.train).column_names) == (packing != "wrapped")


@pytest.mark.parametrize("packing", ["none", "bfd"])
def test_a_row_whose_answer_is_cut_off_is_dropped_and_named(packing: str, prepare_rows: Prepare, stock: Any) -> None:
    rows = chat_rows(40)
    rows[3] = {**rows[3], "prompt": [{"role": "user", "content": "why? " * 100}]}
    train = {"packing": packing, "max_length": 80}
    prepared = prepare_rows(rows, train)
    assert prepared.summary["dropped"] == {"answer_cut_off": {"count": 1, "rows": [4]}}
    assert prepared.summary["rows_train"] == 39
    assert prepared.summary["truncated"] > 0
    assert_equal(prepared.train, stock(rows[:3] + rows[4:], train))
    untouched = prepare_rows(rows, {**train, "packing": "bfd_split"}).summary
    assert untouched["dropped"] == {}
    assert untouched["truncated"] == 0


def test_plain_and_chat_rows_may_stand_in_one_file(prepare_rows: Prepare) -> None:
    alone = [load(prepare_rows(rows, {}).train)[0] for rows in (plain_rows(1), chat_rows(1))]
    assert load(prepare_rows(plain_rows(1) + chat_rows(1), {}).train).to_list() == alone


# --- what is counted


def test_rows_that_teach_nothing_are_dropped_and_named(
    tmp_path: Path, prepare_rows: Prepare, tokenizer: PreTrainedTokenizerBase
) -> None:
    strict = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no') }}{% endif %}" + MARKED_TEMPLATE
    (tmp_path / "strict.jinja").write_text(strict)
    rows = conversations(3)
    odd = [{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    unknown = [{"messages": [{"role": "user", "content": "a"}, {"role": "critic", "content": "b"}]}]
    train = {"assistant_only_loss": True, "chat_template_path": str(tmp_path / "strict.jinja")}
    assert prepare_rows([*rows, *odd, *unknown], train).summary["dropped"] == {
        "refused_by_chat_template": {"count": 1, "rows": [4], "says": "no"},
        "unknown_role": {"count": 1, "rows": [5], "says": "the chat template knows no role 'critic'"},
    }
    foreign = [*tokenized(2), {"input_ids": [len(tokenizer)]}, {"input_ids": [1, 2], "labels": [-100, -100]}]
    assert prepare_rows(foreign, {}).summary["dropped"] == {
        "not_a_token": {"count": 1, "rows": [3]},
        "no_target": {"count": 1, "rows": [4]},
    }


def test_padded_rows_have_the_targets_of_the_same_rows_without_padding(prepare_rows: Prepare) -> None:
    padded = [{"input_ids": [100, 101, 102, 103, 2, 2, 2, 2], "attention_mask": [1] * 4 + [0] * 4}]
    summary = prepare_rows(padded, {}).summary
    assert (summary["train_tokens"], summary["target_tokens"]) == (4, 4)


def test_a_text_that_says_bos_and_eos_itself_has_them_once(tokenizer: PreTrainedTokenizerBase) -> None:
    bos, eos = str(tokenizer.bos_token), str(tokenizer.eos_token)
    ends = {bos: tokenizer.bos_token_id, eos: tokenizer.eos_token_id}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": eos, "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in ends.items()},
    }
    made = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))
    adding = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos)
    rules = Masking(completion_only=True, assistant_only=False, template=None)
    expected = [ends[bos], *tokenizer("Hi there")["input_ids"], ends[eos]]
    for text in ("Hi there", f"{bos}Hi there", f"Hi there{eos}", f"{bos}Hi there{eos}\n"):
        tokens = tokenize({"text": text}, adding, rules)
        assert tokens == (expected, expected)
    pairs = [tokenize({"prompt": f"{start}Hi", "completion": " there"}, adding, rules) for start in ("", bos)]
    assert pairs[0] == pairs[1]


def test_the_summary_counts_rows_and_tokens(prepare_rows: Prepare) -> None:
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6], "labels": [-100, 6]}, {"note": "x"}, {"input_ids": []}]
    held_out = [{"input_ids": [9, 8, 7], "labels": [9, 8, 7]}, {"input_ids": [9, 8], "labels": [-100, 8]}]
    summary = prepare_rows(rows, {"max_length": 3}, held_out).summary
    fingerprints = summary.pop("fingerprints")
    assert summary == {
        "format": "tokenized",
        "columns_unused": ["note"],
        "prompting": {"kind": "tokens"},
        "rows_read": 4,
        "eval_format": "tokenized",
        "eval_rows_read": 2,
        "rows_train": 2,
        "rows_eval": 2,
        "duplicates_removed": 0,
        "dropped": {"missing_column": {"count": 1, "rows": [3]}, "empty": {"count": 1, "rows": [4]}},
        "eval_dropped": {},
        "truncated": 1,
        "eval_truncated": 0,
        "sequences": 2,
        "train_tokens": 5,
        "target_tokens": 4,
        "eval_tokens": 3,
    }
    assert {name: len(value) for name, value in fingerprints.items()} == {"data": 64, "eval": 64}


@pytest.mark.parametrize(
    ("rows", "train", "message"),
    [
        (chat_rows(5), {"max_length": 4}, "nothing left to train on with max_length 4; dropped: 5 answer_cut_off"),
        ([{"input_ids": [1], "labels": [-100]}], {}, r"nothing left to train on of 1 rows; dropped: 1 no_target"),
        (texts(5), {"packing": "bfd", "max_length": None}, "train.max_length: packing bfd needs a length to fill"),
        (texts(5), {"assistant_only_loss": True}, "the data is text without chat messages"),
        (chat_rows(5), {"assistant_only_loss": True}, "the chat template does not mark where the assistant speaks"),
        (texts(5), {"eos_token": "<none>"}, "train.eos_token: '<none>' is not in the tokenizer's vocabulary"),
        (texts(5), {"chat_template_path": "/none/chat.jinja"}, "train.chat_template_path: no file /none/chat.jinja"),
        (texts(5), {"chat_template_path": "/none/folder"}, "train.chat_template_path: /none/folder: "),
    ],
)
def test_what_cannot_be_trained_on_is_refused(prepare_rows: Prepare, rows: Rows, train: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_rows(rows, train)


def test_an_evaluation_set_without_targets_is_refused(prepare_rows: Prepare) -> None:
    with pytest.raises(DataError, match="nothing left to evaluate on with max_length 4; dropped: 1 answer_cut_off"):
        prepare_rows(chat_rows(5), {}, PYDOC[9:10], max_length=4)
    with pytest.raises(DataError, match="nothing left to evaluate on with max_length 4; none dropped"):
        prepare_rows([{"input_ids": [1, 2]}], {}, [{"input_ids": [5]}], max_length=4)


def test_chat_data_needs_a_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(5)))
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        prepare(DataSpec(path=str(path)).model_dump(), {}, bare, tmp_path / "cache", 1024)


def test_a_template_with_tokens_that_the_base_lacks_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    other = AutoTokenizer.from_pretrained(tiny_model_dir)
    other.add_tokens(["<|new|>"])
    other.save_pretrained(tmp_path)
    base = AutoTokenizer.from_pretrained(tiny_model_dir)
    with pytest.raises(DataError, match=r"has tokens that the base lacks \(<\|new\|>\)"):
        configure_tokenizer(base, {"chat_template_path": str(tmp_path)})


# --- the evaluation set is one


def test_every_trial_of_a_sweep_is_scored_on_the_same_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(60)))
    data = DataSpec(path=str(path), eval_fraction=0.2).model_dump()
    trials: list[dict[str, Any]] = [
        {},
        {"packing": "bfd", "max_length": 64, "seed": 5},
        {"packing": "wrapped", "max_length": 32, "shuffle_dataset": True},
        {"max_length": 96, "learning_rate": 1e-3, "per_device_train_batch_size": 2},
    ]
    prepared = [prepare(data, train, tokenizer, tmp_path / "cache", 128) for train in trials]
    assert len({trial.eval for trial in prepared}) == 1
    assert len({trial.train for trial in prepared}) == 4
    assert {trial.summary["fingerprints"]["eval"] for trial in prepared} == {
        prepared[0].summary["fingerprints"]["eval"]
    }
    rows = load(prepared[0].eval)
    assert rows.column_names == ["input_ids", "labels"]
    assert max(map(len, rows["input_ids"])) <= 128
    predicted = sum(label != -100 for labels in rows["labels"] for label in labels[1:])
    assert predicted == prepared[0].summary["eval_tokens"]


@pytest.mark.parametrize(
    ("train", "searched", "expected"),
    [
        ({}, None, 1024),
        ({"max_length": 256}, None, 256),
        ({"max_length": None}, None, None),
        ({}, {"type": "choice", "values": [128, 512, 256]}, 512),
        ({}, {"type": "choice", "values": [128, None]}, None),
        ({}, {"type": "int", "low": 64, "high": 320}, 320),
        ({}, {"type": "int", "low": 64, "high": 320, "when": {"train.packing": ["bfd"]}}, 1024),
    ],
)
def test_the_evaluation_set_is_as_long_as_the_longest_trial_may_be(train: Any, searched: Any, expected: Any) -> None:
    space = {"train.packing": {"type": "choice", "values": ["none", "bfd"]}}
    spec = SweepSpec.model_validate(
        {
            "name": "a",
            "model": {"name": "m"},
            "data": {"path": "d"},
            "train": train,
            "space": space | ({"train.max_length": searched} if searched else {}),
            "budget": {"trials": 1, "tokens_per_trial": 1},
        }
    )
    assert eval_max_length(spec) == expected


# --- the cache


def entries(cache: Path) -> dict[str, int]:
    """Every finished entry, with the time it was made."""
    return {path.parent.name: path.stat().st_mtime_ns for path in cache.glob("data/*/complete.json")}


def test_what_two_trials_share_is_made_once(prepare_rows: Prepare, tmp_path: Path) -> None:
    first = prepare_rows(chat_rows(20), {"max_length": 64})
    made = entries(tmp_path / "cache")
    assert sorted(name.split("-")[0] for name in made) == ["eval", "rows", "tokens", "train"]
    assert prepare_rows(chat_rows(20), {"max_length": 64, "seed": 9, "learning_rate": 1.0}) == first
    assert entries(tmp_path / "cache") == made
    prepare_rows(chat_rows(20), {"max_length": 64, "packing": "bfd"})
    after = entries(tmp_path / "cache")
    assert made.items() < after.items()
    assert len(after) == 5


def test_the_last_use_of_a_tokenizer_changes_nothing(prepare_rows: Prepare, tokenizer: PreTrainedTokenizerBase) -> None:
    first = prepare_rows(texts(5), {})
    tokenizer(["a b c", "d"], padding=True, truncation=True, max_length=2)
    assert prepare_rows(texts(5), {}).train == first.train


@pytest.mark.parametrize("damage", ["truncated", "a bit turned", "missing", "no record"])
def test_a_damaged_entry_is_made_anew(damage: str, prepare_rows: Prepare) -> None:
    whole = prepare_rows(texts(20), {})
    content = load(whole.train).to_dict()
    file = next(whole.train.glob("*.arrow"))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "a bit turned":
        turned = bytearray(file.read_bytes())
        turned[-500] ^= 1
        file.write_bytes(turned)
    elif damage == "missing":
        file.unlink()
    else:
        (whole.train.parent / "complete.json").unlink()
    assert prepare_rows(texts(20), {}) == whole
    assert load(whole.train).to_dict() == content


def test_other_content_or_another_formatter_is_another_entry(
    prepare_rows: Prepare, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = prepare_rows(texts(5), {})
    assert prepare_rows(texts(6), {}).train != first.train
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.add_tokens(["wordy"])
    data = DataSpec(path=str(tmp_path / "rows.jsonl"), eval_path=str(tmp_path / "held_out.jsonl")).model_dump()
    again = prepare(data, {}, tokenizer, tmp_path / "cache", 1024)
    assert prepare(data, {}, other, tmp_path / "cache", 1024).train != again.train


def test_several_processes_tokenise_to_the_same_rows(prepare_rows: Prepare, tmp_path: Path) -> None:
    alone = load(prepare_rows(chat_rows(30), {}).train).to_dict()
    shutil.rmtree(tmp_path / "cache")
    assert load(prepare_rows(chat_rows(30), {"dataset_num_proc": 2}).train).to_dict() == alone


def test_nothing_is_written_outside_the_cache(
    prepare_rows: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "elsewhere")
    prepared = prepare_rows(texts(20), {"packing": "bfd", "shuffle_dataset": True})
    assert not (tmp_path / "elsewhere").exists()
    assert not list((tmp_path / "cache").rglob("work"))
    assert not list((tmp_path / "cache").rglob("*.tmp-*"))
    assert "examples/s" not in capfd.readouterr().err
    assert str(tmp_path) not in (prepared.train / "dataset_info.json").read_text()


def test_progress_is_told_for_every_stage(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(150)))
    told: list[tuple[str, int, int]] = []
    data = DataSpec(path=str(path)).model_dump()
    prepare(data, {}, tokenizer, tmp_path / "cache", 1024, lambda *event: told.append(event))
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["Reading the data", "Tokenising", "Packing"]
    steps = [(done, total) for stage, done, total in told if stage == "Tokenising"]
    assert steps == sorted(steps)
    assert steps[0] == (100, 150)
    assert steps[-1] == (150, 150)


FORMATTER = """
import os
def text(row):
    with open(os.environ["FORMATTED"], "a") as log:
        log.write("x\\n")
    return {"text": row["body"]}
"""
PREPARE = """
import json, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from tuner.training.dataset import prepare
data, model, cache, start = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(model)
start.with_suffix(f".{sys.argv[5]}").touch()
while not start.exists():
    time.sleep(0.01)
print(json.dumps(prepare(data, {}, tokenizer, cache, 256).summary))
"""


def test_two_processes_at_once_make_the_data_once(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "counting_formatter.py").write_text(FORMATTER)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": row["text"]}) + "\n" for row in texts(300)))
    data = DataSpec(path=str(tmp_path / "rows.jsonl"), formatter="counting_formatter:text").model_dump()
    start = tmp_path / "start"
    environment = os.environ | {"FORMATTED": str(tmp_path / "formatted"), "PYTHONPATH": str(tmp_path)}
    command = [
        sys.executable,
        "-c",
        PREPARE,
        json.dumps(data),
        str(tiny_model_dir),
        str(tmp_path / "cache"),
        str(start),
    ]
    processes = [
        subprocess.Popen([*command, name], env=environment, stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    wait_for(lambda: all(start.with_suffix(f".{name}").exists() for name in "ab"))
    start.touch()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0])["rows_read"] == 300
    assert len((tmp_path / "formatted").read_text().split()) == 300


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
