"""What a row means: bring it into one of TRL's three shapes, text, prompt and completion, or messages.

A fourth, `tokenized`, passes through. A row that fits its format yields an example, a plain dict with the keys TRL
knows; any other yields the reason why it cannot be used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tuner.training.data import Row

EMPTY = "empty"
WRONG_TYPE = "wrong_type"
MISSING = "missing_column"
TOO_LONG = "too_long"

COLUMNS_OF_FORMAT = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "tokenized": ("input_ids",),
}
OPTIONAL_COLUMNS = {
    "prompt_completion": ("tools", "chat_template_kwargs"),
    "messages": ("tools", "chat_template_kwargs"),
    "alpaca": ("input",),
    "sharegpt": ("tools", "chat_template_kwargs"),
    "tokenized": ("labels", "completion_mask", "assistant_masks", "attention_mask"),
}
_ROLE_OF_SHAREGPT = {"human": "user", "gpt": "assistant"}
_ASKING_ROLES = ("system", "developer", "user", "tool")

# The wording of stanford_alpaca, as in the `text` column of tatsu-lab/alpaca.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def to_example(kind: str, row: Any, text_field: str = "text") -> Row | str:
    """Return the example that a row of this format stands for, or why it is none: EMPTY, WRONG_TYPE or MISSING."""
    if not isinstance(row, dict):
        return WRONG_TYPE if row is not None else EMPTY
    needed = (text_field,) if kind == "text" else COLUMNS_OF_FORMAT[kind]
    if any(column not in row for column in needed):
        return MISSING
    if any(row[column] is None for column in needed):
        return EMPTY
    if kind == "text":
        return _problem_of_text(row[text_field]) or {"text": row[text_field]}
    return _CONVERTERS[kind](row)


def as_json(example: Row) -> str | None:
    """Return the example as one line of JSON, or None when no tokenizer takes it (bytes, half a character)."""
    try:
        text = json.dumps(example, ensure_ascii=False)
        text.encode("utf-8")
    except (TypeError, ValueError):
        return None
    return text


def _prompt_completion(row: Row) -> Row | str:
    prompt, completion = row["prompt"], row["completion"]
    example = {"prompt": prompt, "completion": completion}
    if isinstance(prompt, str):
        return _problem_of_text(completion) or example
    problem = _problem_of_chat(prompt) or _problem_of_chat(completion)
    return problem or (_with_tools(example, row) if _has_content(completion) else EMPTY)


def _messages(row: Row) -> Row | str:
    messages = row["messages"]
    problem = _problem_of_chat(messages)
    if problem:
        return problem
    answers = [message for message in messages if message["role"] not in _ASKING_ROLES]
    return _with_tools({"messages": messages}, row) if _has_content(answers) else EMPTY


def _alpaca(row: Row) -> Row | str:
    instruction, given, output = row["instruction"], row.get("input") or "", row["output"]
    problem = _problem_of_text(instruction) or _problem_of_text(output)
    if problem or not isinstance(given, str):
        return problem or WRONG_TYPE
    wording = _ALPACA_WITH_INPUT if given.strip() else _ALPACA
    return {"prompt": wording.format(instruction=instruction, input=given), "completion": output}


def _sharegpt(row: Row) -> Row | str:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return WRONG_TYPE
    if not all(isinstance(turn.get("from"), str) and "value" in turn for turn in turns):
        return WRONG_TYPE
    messages = [{"role": _ROLE_OF_SHAREGPT.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]
    return _messages({**row, "messages": messages})


def _tokenized(row: Row) -> Row | str:
    names = ("input_ids", "labels", "completion_mask", "assistant_masks")
    example = {name: row[name] for name in names if row.get(name) is not None}
    if not all(isinstance(values, list) and all(type(item) is int for item in values) for values in example.values()):
        return WRONG_TYPE
    if len({len(values) for values in example.values()}) > 1:
        return WRONG_TYPE
    return example if example["input_ids"] else EMPTY


_CONVERTERS: dict[str, Callable[[Row], Row | str]] = {
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "tokenized": _tokenized,
}


def _problem_of_text(value: Any) -> str | None:
    if not isinstance(value, str):
        return WRONG_TYPE
    return None if value.strip() else EMPTY


def _problem_of_chat(value: Any) -> str | None:
    if value == []:
        return EMPTY
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return WRONG_TYPE
    well_formed = all(
        isinstance(message.get("role"), str) and isinstance(message.get("content"), str | list | None)
        for message in value
    )
    return None if well_formed else WRONG_TYPE


def _has_content(messages: list[Row]) -> bool:
    def says_something(message: Row) -> bool:
        content = message.get("content")
        return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))

    return any(says_something(message) for message in messages)


def _with_tools(example: Row, row: Row) -> Row | str:
    """Keep what a chat template may be given beside the messages; `tools` may come as JSON text, as in TRL."""
    for name in ("tools", "chat_template_kwargs"):
        value = row.get(name)
        if isinstance(value, str) and name == "tools":
            try:
                value = json.loads(value)
            except ValueError:
                return WRONG_TYPE
        if value:
            example[name] = value
    return example
