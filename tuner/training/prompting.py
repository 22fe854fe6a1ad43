"""What prompts the rows of a data set are made of, so that a model trained on them can be asked in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trl import is_conversational

SAMPLE_ROWS = 1000


def prompting_of(data: Mapping[str, Any], kind: str, examples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return facts, fit for JSON, about examples of one format; `data` is `DataSpec.model_dump()`.

    `kind` is `chat`, `alpaca`, `template` (a text made by `data.template`), `prompt` (other prompts and completions),
    `text` (no prompts) or `tokens`. Of chats also: `system`, the message that all begin with, or `system_varies`;
    `tools`, whether there are any; `template_kwargs`, those of every example, or `template_kwargs_vary`. Of Alpaca
    rows, how many have an `input`: `all`, `some` or `none`.
    """
    examples = list(examples)
    if kind == "tokenized":
        return {"kind": "tokens"}
    if examples and is_conversational(dict(examples[0])):
        return _of_chats(examples)
    if kind == "alpaca":
        with_input = ["\n\n### Input:\n" in str(example["prompt"]) for example in examples]
        return {"kind": "alpaca", "input": "all" if all(with_input) else "some" if any(with_input) else "none"}
    if kind == "text":
        return {"kind": "template", "template": data["template"]} if data["template"] else {"kind": "text"}
    return {"kind": "prompt"}


def _of_chats(examples: list[Mapping[str, Any]]) -> dict[str, Any]:
    firsts = [(example.get("messages") or example.get("prompt") or [{}])[0] for example in examples]
    systems = [first if first.get("role") in ("system", "developer") else None for first in firsts]
    settings = [example.get("chat_template_kwargs") or {} for example in examples]
    same_system, same_settings = (all(one == found[0] for one in found) for found in (systems, settings))
    system = systems[0] if same_system else None
    return {
        "kind": "chat",
        "system": system and {"role": system["role"], "content": system["content"]},
        "system_varies": not same_system,
        "tools": any(example.get("tools") for example in examples),
        "template_kwargs": settings[0] if same_settings else {},
        "template_kwargs_vary": not same_settings,
    }
