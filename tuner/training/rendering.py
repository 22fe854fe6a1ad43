"""Render a chat as its template needs it, and find the text that each message became.

A chat template is a program. One wants text where another wants parts, and many leave out without a word what they do
not know. So a template is tried once, for what it takes, and every rendered chat is compared with its messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template
from trl import get_training_chat_template
from trl.chat_template_utils import has_generation_markers

from tuner.training.chat import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
"""What a template may raise: it is a program, and it was not written for every row."""
UNKNOWN_ROLE = "unknown_role"
LEFT_OUT = "left_out_by_chat_template"
NOT_AS_JSON = "not_rendered_as_json"
UNCLEAR_TURN = "weight_not_possible"

Span = tuple[int, int]
"""Start and end of characters in a rendered chat."""
_OTHER = "\ue000tuner\ue001"
"""An answer that no chat holds: its characters are for private use."""
_TOOL_NAMES = ("tool", "ipython", "observation")


@dataclass(frozen=True)
class Needs:
    """How a chat template wants the messages."""

    parts: bool
    """Content as a list of parts; else as text."""
    text_arguments: bool
    """Arguments of tool calls as JSON text; else as an object."""
    tool: str
    """Its name of the role that answers a tool call; empty: it knows none."""
    developer: str
    """Its name of the role of a developer."""


@dataclass(frozen=True)
class Renderer:
    """A chat template with all that it is given beside the messages."""

    template: str
    variables: Mapping[str, Any]

    def text(self, messages: list[Message], prompt: bool = False) -> str:
        """The rendered chat, with the opening of an answer if `prompt`; raises one of TEMPLATE_ERRORS."""
        rendered: Any = render_jinja_template(
            [messages], chat_template=self.template, add_generation_prompt=prompt, **self.variables
        )
        return rendered[0][0]

    def marked(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The rendered chat, and what the template marks in it as generated."""
        rendered: Any = render_jinja_template(
            [messages], chat_template=self.template, return_assistant_tokens_mask=True, **self.variables
        )
        return rendered[0][0], rendered[1][0]


def renderer(tokenizer: PreTrainedTokenizerBase, template: str | None, tools: Any, options: Any) -> Renderer:
    """What `apply_chat_template` renders with; `template` replaces the tokenizer's own."""
    chosen = tokenizer.get_chat_template(template, tools)
    return Renderer(chosen, {**tokenizer.special_tokens_map, "tools": tools, **(options or {})})


def adapted(messages: list[Message], template: str, special_tokens: Mapping[str, str]) -> list[Message] | str:
    """Return the messages as this template needs them, or the problem: a role that it does not know."""
    needs = _needs(template, tuple(special_tokens.items()))
    roles = {"tool": needs.tool, "developer": needs.developer}
    found = []
    for message in messages:
        role = roles.get(message["role"], message["role"])
        if not role or (role not in ("system", "user", "assistant", needs.tool) and not _names(template, role)):
            return f"{UNKNOWN_ROLE}: the chat template knows no role {message['role']!r}"
        found.append(_adapted(message, needs) | {"role": role})
    return found


def _adapted(message: Message, needs: Needs) -> Message:
    kept = {key: value for key, value in message.items() if key != "weight"}
    if needs.parts:
        kept["content"] = [{"type": "text", "text": message["content"]}] if message["content"] else []
    if needs.text_arguments and "tool_calls" in message:
        kept["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": _json(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return kept


@lru_cache(maxsize=64)
def _needs(template: str, special_tokens: tuple[tuple[str, str], ...]) -> Needs:
    """Try the template on a short chat of one kind after the other."""
    given = Renderer(template, {**dict(special_tokens), "tools": None})
    as_text = _tried(given, [{"role": "user", "content": "probe"}])
    as_parts = _tried(given, [{"role": "user", "content": [{"type": "text", "text": "probe"}]}])
    parts = "probe" not in as_text and "probe" in as_parts

    def called(arguments: Any) -> str:
        call = {"type": "function", "id": "abcdef123", "function": {"name": "probe", "arguments": arguments}}
        asked = [{"type": "text", "text": "Go."}] if parts else "Go."
        empty: Any = [] if parts else ""
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": empty, "tool_calls": [call]}]
        return _tried(given, chat)

    town = {"town": "Bonn"}
    as_object, as_json = called(town), called(_json(town))
    usable = "Bonn" in as_object and repr(town) not in as_object
    text_arguments = not usable and "Bonn" in as_json and _json(_json(town)) not in as_json
    tool = next((name for name in _TOOL_NAMES if _names(template, name)), "tool" if "tool_calls" in template else "")
    return Needs(parts, text_arguments, tool, "developer" if _names(template, "developer") else "system")


def _tried(given: Renderer, messages: list[Message]) -> str:
    try:
        return given.text(messages)
    except TEMPLATE_ERRORS:
        return ""


def _names(template: str, role: str) -> bool:
    return re.search(rf"""["']{re.escape(role)}["']""", template) is not None


# --- what became of the messages


def problem_of(text: str, messages: list[Message]) -> str | None:
    """Say what of the messages the rendered text does not hold, or holds as Python would write it."""
    for number, message in enumerate(messages, start=1):
        where = f"message {number} ({message['role']})"
        calls = message.get("tool_calls", [])
        for call in calls:
            arguments = call["function"]["arguments"]
            if call["function"]["name"] not in text or not all(_stands_in(text, leaf) for leaf in _texts(arguments)):
                return f"{LEFT_OUT}: a tool call of {where}"
            if any(repr(value) in text and _json(value) not in text for value in _nested(arguments)):
                return f"{NOT_AS_JSON}: arguments of a tool call of {where}"
        if not calls and not _stands_in(text, _answer(message)):
            return f"{LEFT_OUT}: the content of {where}"
    return None


def _answer(message: Message) -> str:
    """The content, without reasoning before the answer, which templates leave out of earlier turns."""
    content = message["content"]
    if not isinstance(content, str):  # as `_adapted` made it
        content = "".join(part["text"] for part in content)
    return content.rpartition("</think>")[2] if message["role"] == "assistant" else content


def _stands_in(text: str, part: str) -> bool:
    part = part.strip()
    return part in text or _json(part)[1:-1] in text or repr(part)[1:-1] in text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(item)


def _nested(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list) and value:
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nested(item)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- what is not to be learned


def unlearned(
    messages: list[Message], indices: list[int], text: str, used: Renderer, tokenizer: PreTrainedTokenizerBase
) -> list[Span] | str:
    """Return the characters of these messages: what an assistant generated, the whole of any other message.

    `messages` are as they were rendered to `text`. The template's own marks say what was generated, or those of TRL's
    version of it where that renders the same text. Without marks it is the difference that the message makes, where
    the chat before it and the chat with it both begin the text; or else what changes when an answer is exchanged for
    another. Returns the problem where none of this holds.
    """
    marks = _spans_by_marks(messages, text, used, tokenizer) if indices else {}
    spans: list[Span] = []
    for index in indices:
        found = (
            marks.get(index)
            or _span_by_difference(messages, index, text, used)
            or _span_by_exchange(messages, index, text, used, tokenizer)
        )
        if not found:
            return f"{UNCLEAR_TURN}: the chat template does not tell where message {index + 1} begins and ends"
        spans += found
    return spans


def _spans_by_marks(
    messages: list[Message], text: str, used: Renderer, tokenizer: PreTrainedTokenizerBase
) -> dict[int, list[Span]]:
    """Each message that the assistant generated, by its index, and the marked spans that it adds to the chat."""
    marked = used if has_generation_markers(used.template) else _trl_version(used, tokenizer)
    if marked is None:
        return {}
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        rendered, spans = marked.marked(messages)
        ends = [len(marked.marked(messages[: index + 1])[1]) for index in answers]
    except TEMPLATE_ERRORS:
        return {}
    starts = [0, *ends[:-1]]
    if rendered != text or ends[-1:] != [len(spans)] or any(a >= b for a, b in zip(starts, ends, strict=True)):
        return {}
    found = {index: spans[a:b] for index, a, b in zip(answers, starts, ends, strict=True)}
    said = {index: "".join(text[a:b] for a, b in places) for index, places in found.items()}
    return found if all(_stands_in(said[index], _answer(messages[index])) for index in answers) else {}


def _trl_version(used: Renderer, tokenizer: PreTrainedTokenizerBase) -> Renderer | None:
    template = _training_template(tokenizer, used.template)
    return Renderer(template, used.variables) if template else None


@lru_cache(maxsize=8)
def _training_template(tokenizer: PreTrainedTokenizerBase, _template: str) -> str | None:
    """TRL's version of the tokenizer's chat template, which is `_template` now; a tokenizer may get another."""
    try:
        return cast("str | None", get_training_chat_template(tokenizer))
    except TEMPLATE_ERRORS:
        return None


def _span_by_difference(messages: list[Message], index: int, text: str, used: Renderer) -> list[Span] | None:
    try:
        before = used.text(messages[:index], prompt=messages[index]["role"] == "assistant") if index else ""
        upto = used.text(messages[: index + 1])
    except TEMPLATE_ERRORS:
        return None
    if not (text.startswith(before) and text.startswith(upto) and len(before) < len(upto)):
        return None
    return [(len(before), len(upto))]


def _span_by_exchange(
    messages: list[Message], index: int, text: str, used: Renderer, tokenizer: PreTrainedTokenizerBase
) -> list[Span] | None:
    """For templates that shorten earlier answers (Qwen3): all but the exchanged answer and its end must stay."""
    earlier, later = messages[:index], messages[index + 1 :]
    if messages[index]["role"] != "assistant" or not earlier:
        return None
    other = [{"role": "assistant", "content": _OTHER}]
    try:
        asked, opened = used.text(earlier), used.text(earlier, prompt=True)
        before, _, after = used.text([*earlier, *other, *later]).partition(_OTHER)
        closing = used.text([*earlier, *other]).partition(_OTHER)[2].removesuffix(str(tokenizer.eos_token))
    except TEMPLATE_ERRORS:
        return None
    opening = opened.removeprefix(asked).partition("<think>")[0]
    if not (text.startswith(before) and text.endswith(after) and before.endswith(opening) and after and opening):
        return None
    same = next((at for at, pair in enumerate(zip(after, closing, strict=False)) if len(set(pair)) > 1), len(closing))
    return [(len(before), len(text) - len(after) + same)]
