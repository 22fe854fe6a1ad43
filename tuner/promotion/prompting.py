"""How to ask a promoted model: in the format that it was trained in, as Python for its card."""

from __future__ import annotations

import keyword
import re
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tuner.training.formats import to_example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_IDS = 64
_ANSWER = "{answer}"

Piece = tuple[str, str]
"""Text, and the name of what follows it."""


def with_example(
    facts: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> dict[str, Any]:
    """Add to the facts of `prompting_of` a prompt of the evaluation set, and whether the tokenizer adds an end token.

    The prompt is an `example` if it is a text that becomes the same token ids again, else it is `ids`. A sweep of an
    earlier version has no facts: then the example is all there is to go by, its special tokens included.
    """
    found = {**(facts or {"kind": "unknown"})}
    ids = list(prompts[0]) if prompts else []
    found["adds_end"] = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    if found["kind"] != "tokens":
        for plain in (True, False):
            text = str(tokenizer.decode(ids, skip_special_tokens=plain, clean_up_tokenization_spaces=False))
            again = tokenizer(text, add_special_tokens=plain)["input_ids"]
            if (again[:-1] if plain and found["adds_end"] else again) == ids:
                return {**found, "example": text, "plain": plain}
    return {**found, "ids": ids[:_MOST_IDS]}


def answer_mark(facts: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text right before every answer in the training rows, where their format has one."""
    if facts and facts["kind"] == "chat":
        asked: Any = [{"role": "user", "content": "?"}]
        options: Any = {"tokenize": False, **facts["template_kwargs"]}
        plain = str(tokenizer.apply_chat_template(asked, **options))
        ready = str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options))
        return ready.removeprefix(plain) or None if ready.startswith(plain) else None
    pieces = _pieces(facts) if facts else []
    return pieces[-1][0].rstrip(" ") or None if pieces else None


def asking(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return what to know of the model's prompts, and Python that makes `inputs` of one by `tokenizer`."""
    kind = facts["kind"]
    if kind == "chat":
        return _asking_in_chat(facts)
    if kind == "alpaca":
        given = {"all": "", "some": ", with an input or without one", "none": ""}[facts["input"]]
        return f"It was trained on Alpaca's wording{given}, not on a chat template.", _filled_in(facts)
    if kind == "template" and len(_pieces(facts)) + len(_pieces(facts)[0][0]) > 1:
        return "It was trained on texts of one form, not on a chat template. It goes on where this ends.", _filled_in(
            facts
        )
    if "example" in facts:
        said = {
            "prompt": "It was trained on prompts like this one, as they are, not on a chat template.",
            "unknown": "It was trained on prompts like this one, as they are.",
        }
        otherwise = "It was trained on plain text without prompts. It goes on from a beginning, such as this one."
        return said.get(kind, otherwise), f"prompt = {facts['example']!r}\n{_tokenized(facts)}"
    return (
        "It was trained on token ids, and which text they stand for is not known here. Prompt it with ids that are "
        "made in the same way as those of its rows. These are the first of one.",
        f'import torch\n\ninputs = {{"input_ids": torch.tensor([{facts["ids"]}])}}',
    )


def _asking_in_chat(facts: Mapping[str, Any]) -> tuple[str, str]:
    said = ["It was trained on chats, by its chat template."]
    messages = [{"role": "user", "content": "..."}]
    if facts["system"]:
        messages.insert(0, facts["system"])
        said.append("Every chat began with the same system message.")
    elif facts["system_varies"]:
        said.append("Some chats began with a system message, which was not always the same.")
    options = dict(facts["template_kwargs"])
    if options:
        said.append("The template was always given the same settings.")
    elif facts["template_kwargs_vary"]:
        said.append("The template was not always given the same settings (`chat_template_kwargs`).")
    if facts["tools"]:
        said.append("Some chats had tools: give them as `tools=`.")
    given = f", **{options!r}" if options else ""
    listed = "".join(f"    {message!r},\n" for message in messages)
    code = (
        f"messages = [\n{listed}]\ninputs = tokenizer.apply_chat_template(\n"
        f'    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{given}\n)'
    )
    return " ".join(said), code


def _filled_in(facts: Mapping[str, Any]) -> str:
    """A line for each thing to fill in, and the prompt that is made of them."""
    pieces = _pieces(facts)
    prompt, names = _f_string(pieces), [name for _, name in pieces[:-1]]
    if facts.get("input") == "some":
        prompt = f"{prompt} if input else {_f_string(_pieces({**facts, 'input': 'none'}))}"
    lines = [f'{name} = "..."' for name in dict.fromkeys(names)]
    return "\n".join([*lines, f"prompt = {prompt}", _tokenized(facts)])


def _tokenized(facts: Mapping[str, Any]) -> str:
    plain = "" if facts.get("plain", True) else ", add_special_tokens=False"
    line = f'inputs = tokenizer(prompt{plain}, return_tensors="pt")'
    if facts["adds_end"] and not plain:
        line += "\ninputs = {name: values[:, :-1] for name, values in inputs.items()}  # no end token"
    return line


def _pieces(facts: Mapping[str, Any]) -> list[Piece]:
    """What a prompt is made of: text before each thing to fill in, and before the answer, which comes last."""
    if facts["kind"] == "alpaca":
        given = {"instruction": "{instruction}", "input": "" if facts["input"] == "none" else "{input}", "output": "-"}
        wording: Any = to_example("alpaca", given)
        template = wording["prompt"] + _ANSWER
    elif facts["kind"] == "template":
        template = facts["template"]
    else:
        return []
    pieces, text = [], ""
    for literal, field, _, _ in string.Formatter().parse(template):
        text += literal  # a brace that was written twice ends a literal, without a field
        if field is not None:
            pieces.append((text, field))
            text = ""
    answer = [field for _, field in pieces].index(pieces[-1][1])
    return [(text, _name(field)) for text, field in pieces[: answer + 1]]


def _name(column: str) -> str:
    """A column's name as one of Python's."""
    name = re.sub(r"\W", "_", column)
    return f"_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name


def _f_string(pieces: Sequence[Piece]) -> str:
    """The prompt as Python. Spaces at its end are left out: they belong to the first token of the answer."""
    *before, (last, _) = [(text.replace("{", "{{").replace("}", "}}"), name) for text, name in pieces]
    return "f" + repr("".join(f"{text}{{{name}}}" for text, name in before) + last.rstrip(" "))
