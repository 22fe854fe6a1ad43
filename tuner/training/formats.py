"""What a row means: bring it into one of TRL's three shapes, text, prompt and completion, or messages.

A fourth, `tokenized`, passes through. A row that fits its format yields an example, a plain dict with the keys TRL
knows; any other yields the reason why it cannot be used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tuner.training.chat import EMPTY, WRONG_TYPE, Message, says_something, to_messages, to_tools
from tuner.training.data import Row

NO_TARGET = "no_target"
LENGTHS_DIFFER = "lengths_differ"
HOLE_IN_MASK = "hole_in_attention_mask"
MISSING = "missing_column"
TOO_LONG = "too_long"

_BESIDE_CHAT = ("tools", "chat_template_kwargs", "system")
COLUMNS_OF_FORMAT = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "tokenized": ("input_ids",),
}
OPTIONAL_COLUMNS = {
    "prompt_completion": _BESIDE_CHAT,
    "messages": _BESIDE_CHAT,
    "alpaca": ("input",),
    "sharegpt": _BESIDE_CHAT,
    "tokenized": ("labels", "completion_mask", "assistant_masks", "attention_mask"),
}
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
    """Return the example that a row of this format stands for, or why it is none: a reason, or `reason: sentence`."""
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


def columns_used(kind: str, sample: list[Row], text_field: str = "text") -> set[str]:
    """Return the columns that rows of this format are made of; what stands beside a chat is nothing beside text."""
    if kind == "text":
        return {text_field}
    plain = kind == "prompt_completion" and not any(isinstance(row.get("prompt"), list) for row in sample)
    return {*COLUMNS_OF_FORMAT[kind], *(() if plain else OPTIONAL_COLUMNS.get(kind, ()))}


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
    if isinstance(prompt, str):
        return _problem_of_text(completion) or {"prompt": prompt, "completion": completion}
    asked = to_messages(prompt, row.get("system"))
    if isinstance(asked, str):
        return asked
    answered = WRONG_TYPE if isinstance(completion, str) else to_messages(completion)
    if isinstance(answered, str):
        return answered
    return _problem_of_answers(answered) or _with_tools({"prompt": asked, "completion": answered}, row)


def _messages(row: Row) -> Row | str:
    return _chat(row["messages"], row)


def _sharegpt(row: Row) -> Row | str:
    return _chat(row["conversations"], row)


def _chat(turns: Any, row: Row) -> Row | str:
    messages = to_messages(turns, row.get("system"))
    if isinstance(messages, str):
        return messages
    answers = [message for message in messages if message["role"] not in _ASKING_ROLES]
    return _problem_of_answers(answers) or _with_tools({"messages": messages}, row)


def _alpaca(row: Row) -> Row | str:
    instruction, given, output = row["instruction"], row.get("input") or "", row["output"]
    problem = _problem_of_text(instruction) or _problem_of_text(output)
    if problem or not isinstance(given, str):
        return problem or WRONG_TYPE
    wording = _ALPACA_WITH_INPUT if given.strip() else _ALPACA
    return {"prompt": wording.format(instruction=instruction, input=given), "completion": output}


def _tokenized(row: Row) -> Row | str:
    """Tokens that the attention mask hides are padding: cut at both ends, with all that goes along with them."""
    names = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask")
    columns = {name: row[name] for name in names if row.get(name) is not None}
    masks = {name for name in columns if "mask" in name}
    if not all(_is_numbers(values, (int, bool) if name in masks else (int,)) for name, values in columns.items()):
        return WRONG_TYPE
    if any(set(columns[name]) - {0, 1} for name in masks):
        return f"{WRONG_TYPE}: a mask holds 0 and 1"
    if len({len(values) for values in columns.values()}) > 1:
        return f"{LENGTHS_DIFFER}: " + ", ".join(f"{len(values)} {name}" for name, values in columns.items())
    attended = columns.pop("attention_mask", [1] * len(columns["input_ids"]))
    if 1 not in attended:
        return EMPTY
    cut = slice(attended.index(1), len(attended) - attended[::-1].index(1))
    if 0 in attended[cut]:
        return f"{HOLE_IN_MASK}: masked tokens stand between others"
    return {name: [int(item) for item in values[cut]] for name, values in columns.items()}


def _is_numbers(values: Any, types: tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(type(item) in types for item in values)


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


def _problem_of_answers(answers: list[Message]) -> str | None:
    said = [message for message in answers if says_something(message)]
    if not said:
        return EMPTY
    return None if any(message.get("weight", 1) for message in said) else f"{NO_TARGET}: every answer has weight 0"


def _with_tools(example: Row, row: Row) -> Row | str:
    """Keep what a chat template may be given beside the messages."""
    tools = to_tools(row["tools"]) if row.get("tools") else []
    if isinstance(tools, str):
        return tools
    options = row.get("chat_template_kwargs")
    return example | ({"tools": tools} if tools else {}) | ({"chat_template_kwargs": options} if options else {})
