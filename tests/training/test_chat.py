"""Chat rows, however a file spells them, in every chat template that TRL ships."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import trl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tuner.spec.drops import Drops, describe_drops
from tuner.spec.sweep import DataSpec
from tuner.training.examples import read_examples
from tuner.training.formats import to_example
from tuner.training.tokens import Masking, tokenize

TEMPLATES = {
    path.stem: path.read_text() for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
PLAIN = Masking(completion_only=False, assistant_only=False, template=None)
ASSISTANT = Masking(completion_only=False, assistant_only=True, template=None)
ARGUMENTS = {"town": "Köln", "days": [1, 2], "place": {"kind": "old town"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "Its name"}}},
    },
}
QUESTION, RESULT, ANSWER = "How is Köln?", '{"celsius": 12}', "It is 12 degrees."


def say(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def with_call(arguments: Any, as_parts: bool = False, **fields: Any) -> dict[str, Any]:
    """A chat of a question, a call, its result and an answer."""

    def content(text: str) -> Any:
        return [{"type": "text", "text": part} for part in (text[:4], text[4:])] if as_parts else text

    call = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        say("user", content(QUESTION)),
        say("assistant", None, tool_calls=[call], **fields),
        say("tool", content(RESULT), tool_call_id="call12345", name="weather"),
        say("assistant", content(ANSWER)),
    ]
    return {"messages": messages, "tools": [TOOL]}


def chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


@pytest.fixture(scope="module")
def smollm(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def using(smollm: PreTrainedTokenizerBase) -> Any:
    def copied(template: str) -> PreTrainedTokenizerBase:
        tokenizer = copy.copy(smollm)
        tokenizer.chat_template = template
        return tokenizer

    return copied


def learned(row: Any, tokenizer: PreTrainedTokenizerBase, rules: Masking = PLAIN, kind: str = "messages") -> Any:
    """(the whole text, the text that is not a target), or the problem."""
    example = to_example(kind, row)
    tokens = example if isinstance(example, str) else tokenize(example, tokenizer, rules)
    if isinstance(tokens, str):
        return tokens
    ids, labels = tokens
    assert all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode(ids), tokenizer.decode(
        [token for token, label in zip(ids, labels, strict=True) if label < 0]
    )


# --- every template


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_and_parts_are_rendered_alike_however_they_are_spelled(name: str, using: Any) -> None:
    tokenizer = using(TEMPLATES[name])
    spellings = [
        with_call(arguments, as_parts, **fields)
        for arguments in (ARGUMENTS, json.dumps(ARGUMENTS), json.dumps(json.dumps(ARGUMENTS)))
        for as_parts in (False, True)
        for fields in ({}, {"function_call": None, "weight": 1})
    ]
    first, *others = [learned(row, tokenizer) for row in spellings]
    assert all(other == first for other in others)
    if isinstance(first, str):  # no place for a call in the template, or it leaves it out
        assert first.partition(":")[0] in ("unknown_role", "left_out_by_chat_template")
        assert not (
            "tool_calls" in TEMPLATES[name] and "content'] is none" not in TEMPLATES[name] and name[:5] != "lfm2_"
        )
        return
    text, _ = first
    assert "[{'" not in text
    assert "{'" not in text
    assert '\\"town' not in text
    assert all(part in text for part in ("weather", "Köln", "old town", QUESTION, ANSWER))


def two_answers() -> list[dict[str, str]]:
    return [
        say("user", "First?"),
        say("assistant", "Not to be learned."),
        say("user", "Second?"),
        say("assistant", "Learned."),
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_of_weight_zero_is_not_learned_and_all_others_are(name: str, using: Any) -> None:
    tokenizer = using(TEMPLATES[name])
    turns = two_answers()
    whole, unmasked = learned(chat(*turns), tokenizer)
    assert unmasked == ""
    for spelling in ({"weight": 0}, {"train": False}, {"loss": False, "weight": 0.0}):
        text, masked = learned(chat(turns[0], turns[1] | spelling, *turns[2:]), tokenizer)
        assert text == whole
        assert "Not to be learned." in masked
        assert not any(part in masked for part in ("First", "Second", "Learned"))
    text, masked = learned(chat(turns[0], turns[1], turns[2], turns[3] | {"weight": 0}), tokenizer)
    assert "Learned." in masked
    assert not any(part in masked for part in ("First", "Second", "Not to"))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.endswith("_training")])
def test_what_is_not_learned_is_what_the_template_marks_as_that_turn(name: str, using: Any) -> None:
    tokenizer = using(TEMPLATES[name])
    turns = two_answers()
    row = chat(turns[0], turns[1] | {"weight": 0}, *turns[2:])
    ids, labels = tokenize(to_example("messages", row), tokenizer, ASSISTANT)
    others, all_labels = tokenize(to_example("messages", chat(*turns)), tokenizer, ASSISTANT)
    assert ids == others
    last = next(index for index in range(len(ids)) if "Second" in tokenizer.decode(ids[:index]))
    assert tokenizer.decode([label for label in labels if label >= 0]).count("earned") == 1
    first_turn = [index for index, label in enumerate(all_labels) if label >= 0 and index < last]
    assert first_turn
    assert all(labels[index] == -100 for index in first_turn)
    assert labels[last + 1 :] == all_labels[last + 1 :]
    _, plain = tokenize(to_example("messages", row), tokenizer, PLAIN)
    assert [index for index, label in enumerate(plain) if label < 0] == first_turn


def test_a_called_tool_of_weight_zero_is_not_learned_in_qwen3_and_llama(using: Any) -> None:
    for name in ("qwen3", "qwen3_5_think", "llama3_1", "deepseekv3", "glm4moe"):
        _, masked = learned(with_call(ARGUMENTS, weight=0), using(TEMPLATES[name]))
        assert "weather" in masked
        assert "old town" in masked
        assert not any(part in masked for part in (QUESTION, "celsius", ANSWER))


# --- six families, written by hand

CALL = [
    say("user", "Hi"),
    say(
        "assistant", "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": '{"a": {"b": true}}'}}]
    ),
    say("tool", "7", name="f"),
    say("assistant", [{"type": "text", "text": "Sev"}, {"type": "text", "text": "en."}]),
]
EXPECTED = {
    "qwen2_5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n"
    '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"a": {"b": true}}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\nSeven.<|im_end|>\n",
    "qwen3": "<|im_start|>user\nHi<|im_end|>\n"
    '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"a": {"b": true}}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\nSeven.<|im_end|>\n",
    "llama3_2": "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "f", "parameters": {"a": {"b": true}}}<|eot_id|>'
    '<|start_header_id|>ipython<|end_header_id|>\n\n"7"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\nSeven.<|eot_id|>",
    "glm4moe": "[gMASK]<sop><|user|>\nHi<|assistant|>\n<think></think>\n<tool_call>f\n<arg_key>a</arg_key>\n"
    '<arg_value>{"b": true}</arg_value>\n</tool_call><|observation|>\n<tool_response>\n7\n</tool_response>'
    "<|assistant|>\n<think></think>\nSeven.",
    "gptoss": '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": {"b": true}}<|call|>'
    '<|start|>functions.f to=assistant<|channel|>commentary<|message|>"7"<|end|>'
    "<|start|>assistant<|channel|>final<|message|>Seven.<|return|>",
    "deepseekv3": "<｜User｜>Hi<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
    '```json\n{"a": {"b": true}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
    "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>7<｜tool▁output▁end｜><｜tool▁outputs▁end｜>Seven.<｜end▁of▁sentence｜>",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_six_families_read_as_their_makers_write(name: str, using: Any) -> None:
    text, _ = learned(chat(*CALL), using(TEMPLATES[name]))
    assert text.endswith(EXPECTED[name])
    assert name in ("gptoss", "llama3_2", "deepseekv3") or text == EXPECTED[name]


def test_sharegpt_with_tools_reads_as_messages_with_tools_do(using: Any) -> None:
    turns = [("human", "Hi"), ("function_call", '{"name": "f", "arguments": {"a": {"b": true}}}'), ("observation", "7")]
    shared = {"conversations": [{"from": who, "value": said} for who, said in [*turns, ("gpt", "Seven.")]]}
    for name in ("qwen2_5", "qwen3", "glm4moe", "deepseekv3"):
        assert (
            learned(shared, using(TEMPLATES[name]), kind="sharegpt")[0]
            == learned(chat(*CALL), using(TEMPLATES[name]))[0]
        )
    legacy = [CALL[0], say("assistant", None, function_call={"name": "f", "arguments": '{"a": {"b": true}}'})]
    rest = [say("function", "7", name="f"), say("bot", "Seven.")]
    assert learned(chat(*legacy, *rest), using(TEMPLATES["qwen3"]))[0] == EXPECTED["qwen3"]


# --- one meaning, or a problem that says which


def test_spellings_of_one_meaning_become_one_example() -> None:
    plain = chat(say("user", "Hi"), say("assistant", "Hello"))
    shared = [{"from": "human", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"}]
    assert to_example("messages", {"messages": json.dumps(plain["messages"])}) == plain
    assert to_example("sharegpt", {"conversations": shared}) == plain
    assert to_example("sharegpt", {"conversations": plain["messages"]}) == plain
    assert (
        to_example("messages", chat(say("User", ["H", "i"]), say("model", "Hello", tool_calls=None, weight=1))) == plain
    )
    with_system = chat(say("system", "Be kind."), *plain["messages"])
    assert to_example("messages", {**plain, "system": "Be kind."}) == with_system
    assert to_example("messages", {**with_system, "system": "Be kind."}) == with_system
    assert to_example("messages", {**plain, "system": ""}) == plain
    asked = {"prompt": plain["messages"][:1], "completion": plain["messages"][1:], "system": "Be kind."}
    assert to_example("prompt_completion", asked)["prompt"] == with_system["messages"][:2]
    tools = {"type": "function", "function": {"name": "f"}}
    for spelled in (json.dumps([tools]), [tools], [{"name": "f", "strict": None}], [json.dumps(tools)]):
        assert to_example("messages", {**plain, "tools": spelled})["tools"] == [tools]


def problem(*messages: Any, **columns: Any) -> Any:
    return to_example("messages", chat(*messages, say("assistant", "Hello"), **columns))


def test_what_has_no_meaning_or_two_is_named() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{"}}
    assert problem(say("user", [{"type": "image", "url": "x"}])) == "not_text: a part of type 'image'"
    assert problem(say("user", [{"type": "input_audio"}])) == "not_text: a part of type 'input_audio'"
    assert problem(say("assistant", "", tool_calls=[call])) == "not_json: the arguments of 'f': '{'"
    assert problem(say("user", "Hi"), tools="[{") == "not_json: the tools: '[{'"
    assert problem(say("assistant", "No", weight=0.5)).startswith("unclear_weight: weight 0.5")
    assert (
        problem(say("assistant", "No", weight=1, train=False)) == "unclear_weight: weight and train of a message differ"
    )
    assert problem(say("assistant", "No", mask=True)).startswith("unclear_weight: 'mask'")
    assert problem(say("system", "A"), system="B").startswith("two_system_messages")
    assert problem(say("user", {"town": "Bonn"})) == "wrong_type"
    assert to_example("messages", {"messages": "Hi"}) == "not_json: the messages: 'Hi'"
    answered = chat(say("user", "Hi"), say("assistant", "Hello", weight=0))
    assert to_example("messages", answered) == "no_target: every answer has weight 0"


def test_a_role_that_the_template_does_not_know_is_named(using: Any, smollm: PreTrainedTokenizerBase) -> None:
    for role in ("narrator", "critic"):
        row = chat(say("user", "Hi"), say(role, "He waits."), say("assistant", "Hello"))
        assert learned(row, smollm) == f"unknown_role: the chat template knows no role {role!r}"
    row = chat(say("developer", "Be kind."), say("user", "Hi"), say("assistant", "Hello"))
    assert "system\nBe kind." in learned(row, using(TEMPLATES["qwen2_5"]))[0]
    assert "developer<|message|># Instructions\n\nBe kind." in learned(row, using(TEMPLATES["gptoss"]))[0]
    assert learned(with_call({}), smollm) == "unknown_role: the chat template knows no role 'tool'"


def test_a_template_that_leaves_out_or_refuses_is_quoted(using: Any) -> None:
    silent = using("{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    row = chat(say("system", "Be kind."), say("user", "Hi"), say("assistant", "Hello"))
    assert learned(row, silent) == "left_out_by_chat_template: the content of message 1 (system)"
    twice = chat(say("user", "Hi"), say("user", "You?"), say("assistant", "Hello"))
    refused = learned(twice, using(TEMPLATES["gemma"]))
    assert refused.startswith("refused_by_chat_template: Conversation roles must alternate")
    drops: Drops = {}
    from tuner.spec.drops import drop

    drop(drops, refused, 3)
    assert describe_drops(drops).startswith("dropped: 1 refused_by_chat_template (rows 3: Conversation roles must")


def test_keys_that_arrow_adds_are_not_rendered(tmp_path: Path, using: Any) -> None:
    other = json.loads(json.dumps(with_call({"unit": "C"})).replace("town", "unit").replace("weather", "units"))
    rows = [with_call({"town": "Bonn"}), other]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    filled = pa.Table.from_pylist(rows).to_pylist()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in filled))
    assert '"unit": null' in (tmp_path / "rows.jsonl").read_text()
    for name in ("rows.parquet", "rows.jsonl"):
        path = str(tmp_path / name)
        _, _, found = read_examples(DataSpec(path=path).model_dump(), path, "text", {})
        for (_, text), row in zip(found, rows, strict=True):
            tokenizer = using(TEMPLATES["qwen3"])
            whole = tokenizer.decode(tokenize(json.loads(text), tokenizer, PLAIN)[0])
            assert "null" not in whole
            assert "None" not in whole
            assert whole == learned(row, tokenizer)[0]
    explicit = with_call(json.dumps({"town": None}))
    assert '"town": null' in learned(explicit, using(TEMPLATES["qwen3"]))[0]
