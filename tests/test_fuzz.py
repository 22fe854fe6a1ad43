"""Whatever stands in a spec or a data file, only the house's own errors come out, in bounded time.

FUZZ=20 in the environment makes twenty times as many cases, and other ones each time.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.spec.conftest import GOOD
from tuner.errors import DataError, SpecError
from tuner.spec.check import check_values
from tuner.spec.fields import all_fields
from tuner.spec.load import check_file, dump_spec, parse_spec
from tuner.spec.sweep import DataSpec
from tuner.spec.text import parse_yaml, write_yaml


def cases(number: int) -> Any:
    """How many cases a test makes; always the same ones, unless there are to be more."""
    more = int(os.environ.get("FUZZ", "0"))
    return settings(
        max_examples=number * max(1, more),
        derandomize=not more,
        deadline=3000,  # milliseconds for one case
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
        database=None,
    )


# --- specs

SPEC: dict[str, Any] = parse_yaml(GOOD) | {
    "search": {"enqueue": [{"lora.r": 4}], "sampler": "grid"},
    "train": {"packing": "bfd", "max_length": 10, "assistant_only_loss": True, "chat_template_path": "x.jinja"},
    "lora": {"target_modules": ["a"], "r": 4, "use_dora": True},
    "resources": {"strategy": "zero2", "deepspeed": "x.json", "share_base": "off"},
    "objective": {"metric": "eval_loss"},
    "model": {"name": "org/model", "attn_implementation": "sdpa", "gguf_file": "x.gguf"},
    "data": {"path": "org/rows", "template": "{a}", "formatter": "a:b"},
    "promotion": {"server": "vllm"},
    "storage": {"study": "sqlite:///x", "root": "runs"},
    "stopping": {"type": "asha"},
}
ODD = [
    *(10**18, -1, 0, 1e308, float("inf"), float("nan"), "", "a\0b", "\ud800", "a" * 300, "../..", "/", "~nobody/x"),
    *("/dev/zero", "/dev/null/x", "{a:>99999999}", "org/kernel", 9_999_999_999, list(range(1, 300))),
    *("package:", "package:..", "s3://", "${X}", "${", "sqlite:///", "\u202e", "\uff0e\uff0e/x", "none", "1e5"),
    *({"type": "choice"}, {"type": "choice", "values": []}, {"type": "choice", "values": [[1]]}, {"type": []}),
    *({"type": "int", "low": 2, "high": 1}, {"type": "int", "low": 0, "high": 10**18, "step": 1}),
    *({"type": "uniform", "low": 0, "high": 1, "step": 1e-300}, {"type": "log_uniform", "low": 0, "high": 1}),
    *({"type": "log_uniform", "low": float("nan"), "high": float("inf")}, {"type": "choice", "values": [float("nan")]}),
    *({"type": "choice", "values": [4], "when": {"lora.r": [{}]}}, {"type": "choice", "values": [1], "when": {"a": 1}}),
]
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(ODD).map(copy.deepcopy)
)
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
keys = st.text(max_size=12) | st.sampled_from([*SPEC, *all_fields(), "type", "values", "low", "when", "a.b.c", "."])


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*place, key))


@st.composite
def broken_specs(draw: st.DrawFn) -> dict[str, Any]:
    """The spec with one to three things replaced, removed or added."""
    spec = copy.deepcopy(SPEC)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(list(_places(spec)) or [("name",)]))
        section = spec
        for key in way:
            section = section[key]
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "remove":
            del section[last]
        elif change == "add" and isinstance(section, dict) and isinstance(section.get(last), dict):
            section[last][draw(keys)] = draw(values)
        else:
            section[last] = draw(values)
    return spec


@cases(2000)
@given(broken_specs())
def test_a_spec_is_refused_with_problems_or_good_enough_to_be_written_and_read_again(tmp_path_factory, broken):
    folder = tmp_path_factory.getbasetemp()
    spec, problems = check_values(broken, folder)
    assert (spec is None) == bool(problems)
    assert all(str(problem) for problem in problems)
    if spec is not None:
        assert Path(spec.storage.root).is_absolute()
        assert parse_spec(parse_yaml(dump_spec(spec)), folder) == spec


TOKENS = ["&a ", "*a", "!x ", "!!python/object:os.system ", "- ", "? ", ": ", "{", "}", "[", "]", ",", "|\n", "'", '"']
TOKENS += ["\\x", "\\U0011ffff", "%YAML 9.9\n", "---\n", "...\n", "\t", "\r", "\n", "#", "<<: ", "\0", "\ufeff", "é"]
TOKENS += ["\u2028", "1" * 25, "1e999", "-.inf", "@", "`", "&", "*", "!", "%", "[" * 200, "{a: " * 100]


@st.composite
def broken_texts(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from([GOOD, "a: 1\nb: [1, {c: d}]\ne:\n  - f\n  - 'g'\n", ""]))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(TOKENS) | st.text(max_size=3)) + text[at + draw(st.integers(0, 4)) :]
    return text


@cases(2000)
@given(broken_texts())
def test_a_yaml_text_is_refused_or_reads_back_as_what_it_was_written_from(text):
    read = None
    with suppress(SpecError):
        read = parse_yaml(text)
    if isinstance(read, dict):
        assert repr(parse_yaml(write_yaml(read))) == repr(read)


@cases(1000)
@given(st.binary(max_size=200))
def test_a_file_of_any_bytes_is_no_spec(tmp_path, content):
    file = tmp_path / "spec.yaml"
    file.write_bytes(content)
    spec, problems = check_file(file)
    assert spec is None
    assert problems


# --- data

cells = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
turns = st.fixed_dictionaries({}, optional={"role": cells | st.just("user"), "content": cells, "tool_calls": cells})
rows = st.dictionaries(
    st.sampled_from(["text", "prompt", "completion", "messages", "conversations", "instruction", "output", "input_ids"])
    | st.text(max_size=5),
    cells | st.lists(turns | cells, max_size=3),
    max_size=3,
)
WHOLE = {"text": [{"text": "What is it?"}] * 9, "prompt": [{"prompt": "Is it?", "completion": " Yes."}] * 9}


@st.composite
def data_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A name, and content that is rows of any kind, cut or spliced somewhere, or no rows at all."""
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt"]))
    if draw(st.booleans()):
        return suffix, draw(st.binary(max_size=300))
    table = draw(st.lists(rows, max_size=4)) + draw(st.sampled_from([[], *WHOLE.values()]))
    lines = [json.dumps(row) for row in table]
    content = ("\n".join(lines) if suffix != ".json" else f"[{','.join(lines)}]").encode()
    at = draw(st.integers(0, len(content)))
    return suffix, content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 9)) :]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@cases(100)
@given(data_files())
def test_data_become_rows_to_train_on_or_are_refused_by_name(tmp_path_factory, tokenizer, file):
    from datasets import load_from_disk

    from tuner.training.dataset import prepare

    suffix, content = file
    folder = tmp_path_factory.mktemp("data")
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    data = DataSpec(path=str(path), eval_fraction=0.3).model_dump()
    with suppress(DataError):
        prepared = prepare(data, {"max_length": 16}, copy.deepcopy(tokenizer), folder / "cache", 16)
        trained = load_from_disk(str(prepared.train))
        assert len(trained) > 0
        assert all(len(row["input_ids"]) == len(row["labels"]) for row in trained)
