"""One form for chat, however a file spells it: the messages and tools that chat templates are written for.

A message has `role`, `content` as text, and what a template may read beside them. `tool_calls` are objects of type
function whose `arguments` are an object. `weight` is there only where it is 0: the message is not to be learned.
What has no meaning here, or two, is answered by a problem: a reason, or `reason: sentence`.
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

EMPTY = "empty"
WRONG_TYPE = "wrong_type"
NOT_JSON = "not_json"
NOT_TEXT = "not_text"
UNUSABLE_CALL = "unusable_tool_call"
UNCLEAR_WEIGHT = "unclear_weight"
TWO_SYSTEM_MESSAGES = "two_system_messages"

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "model", "assistant"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython", "tool"), "tool"),
    **{role: role for role in ("system", "developer")},
}
_CALLING_ROLES = ("function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_WEIGHTS = ("weight", "train", "training", "loss", "trainable", "loss_mask", "loss_weight")
"""What tools call the weight of a message: OpenAI, axolotl, ms-swift, tinker; 0 and false: not to be learned."""
_UNCLEAR = ("mask", "train_detail")
"""A mask may stand for learned or for not learned; a part of a message cannot be told from here."""
_OWN_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", *_WEIGHTS, *_UNCLEAR}


class _ProblemError(Exception):
    """Why a chat cannot be used; does not leave this module."""


def to_messages(turns: Any, system: Any = None) -> list[Message] | str:
    """Return the messages of a chat in their one form, or the problem with it.

    `turns` are messages of OpenAI's kind (role, content) or of ShareGPT's (from, value), or a JSON text of them.
    `system` is the text of a system message that stands beside them; it goes first.
    """
    try:
        if isinstance(turns, str):
            turns = _parsed(turns, "the messages")
        if turns == []:
            raise _ProblemError(EMPTY)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise _ProblemError(WRONG_TYPE)
        filled_up = any("tool_calls" in turn and turn["tool_calls"] is None for turn in turns)
        return _with_system(system, [_message(turn, filled_up) for turn in turns])
    except _ProblemError as problem:
        return str(problem)


def to_tools(tools: Any) -> list[dict[str, Any]] | str:
    """Return tools as `{"type": "function", "function": {...}}` each, or the problem; given as such, bare, or as JSON.

    Keys without a value are left out: Arrow gives every tool the parameters of all.
    """
    try:
        tools = _parsed(tools, "the tools") if isinstance(tools, str) else tools
        if not isinstance(tools, list):
            raise _ProblemError(WRONG_TYPE)
        found = [_parsed(tool, "a tool") if isinstance(tool, str) else tool for tool in tools]
        if not all(isinstance(tool, dict) for tool in found):
            raise _ProblemError(WRONG_TYPE)
        found = [_without_nulls(tool) for tool in found]
        return [{"type": "function", "function": tool} if _is_bare(tool) else tool for tool in found]
    except _ProblemError as problem:
        return str(problem)


def says_something(message: Message) -> bool:
    """Whether there is anything in a message to learn."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def _message(turn: dict[str, Any], filled_up: bool) -> Message:
    """`filled_up`: Arrow has given all objects of the chat the same keys, so that null says nothing."""
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str) or not role.strip() or not ("role" in turn or "value" in turn):
        raise _ProblemError(WRONG_TYPE)
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    calls = turn.get("tool_calls") or turn.get("function_call")
    word = role.strip().lower()
    if word in _CALLING_ROLES:
        word, content, calls = "assistant", "", content
    if isinstance(calls, str):
        calls = _parsed(calls, f"the calls of {role!r}")
    message: Message = {"role": _ROLES.get(word, role), "content": _text(content, _ROLES.get(word) == "tool")}
    message |= {key: value for key, value in turn.items() if key not in _OWN_KEYS and value is not None}
    if calls:
        message["tool_calls"] = [_call(call, filled_up) for call in (calls if isinstance(calls, list) else [calls])]
    return message if _counts(turn) else {**message, "weight": 0}


def _text(content: Any, is_result: bool) -> str:
    """The text of a content: its parts joined. What a tool answered in JSON stays JSON."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    if is_result and not all(isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in parts):
        return json.dumps(content, ensure_ascii=False)
    return "".join(_text_of_part(part) for part in parts)


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise _ProblemError(WRONG_TYPE)
    kind = part.get("type") or "text"
    if kind not in _TEXT_PARTS:
        raise _ProblemError(f"{NOT_TEXT}: a part of type {kind!r}")
    if not isinstance(part.get("text"), str):
        raise _ProblemError(WRONG_TYPE)
    return part["text"]


def _call(call: Any, filled_up: bool) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise _ProblemError(f"{UNUSABLE_CALL}: a tool call is an object with a name")
    given = function.get("arguments", function.get("parameters"))
    arguments = _parsed(given, f"the arguments of {function['name']!r}") if isinstance(given, str) else given
    if filled_up and not isinstance(given, str):
        arguments = _without_nulls(arguments)
    if not isinstance(arguments, dict | None):
        raise _ProblemError(f"{UNUSABLE_CALL}: the arguments of {function['name']!r} are no JSON object")
    outer = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments or {}}}


def _counts(turn: dict[str, Any]) -> bool:
    """Whether a message is to be learned; raises where its weight is neither 0 nor 1, or said twice."""
    given = {name: turn[name] for name in _WEIGHTS if turn.get(name) is not None}
    if unclear := [name for name in _UNCLEAR if turn.get(name) is not None]:
        raise _ProblemError(f"{UNCLEAR_WEIGHT}: {unclear[0]!r} of a message; say weight: 0 of what is not learned")
    for name, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise _ProblemError(f"{UNCLEAR_WEIGHT}: {name} {value!r}; a message has the weight 0 or 1")
    if len(set(given.values())) > 1:
        raise _ProblemError(f"{UNCLEAR_WEIGHT}: {' and '.join(given)} of a message differ")
    return all(given.values())


def _with_system(system: Any, messages: list[Message]) -> list[Message]:
    text = _text(system, is_result=False)
    if not text.strip():
        return messages
    if messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    if messages[0]["content"].strip() != text.strip():
        raise _ProblemError(f"{TWO_SYSTEM_MESSAGES}: one in the column system, another first in the messages")
    return messages


def _parsed(text: Any, what: str) -> Any:
    """JSON in a text, also where it was written as JSON twice; nothing is null."""
    if not text.strip():
        return None
    try:
        value = json.loads(text)
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise _ProblemError(f"{NOT_JSON}: {what}: {text.strip()[:40]!r}") from error


def _is_bare(tool: dict[str, Any]) -> bool:
    return "function" not in tool and "name" in tool and tool.get("type", "function") == "function"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
