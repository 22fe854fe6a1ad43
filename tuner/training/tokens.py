"""Turn an example into token ids and labels exactly as TRL's SFTTrainer would, row by row.

TRL does this inside a private method; here it stands on its own so that it runs once for all trials, and so that a row
which cannot be learned from is counted where TRL would stop or train on nothing. Tests hold both to the same output.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer
from trl import get_training_chat_template, is_conversational
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import common_prefix_length

from tuner.errors import DataError
from tuner.training.formats import NO_TARGET
from tuner.training.rendering import TEMPLATE_ERRORS, Span, adapted, problem_of, renderer, unlearned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = Mapping[str, Any]

IGNORED = -100
REFUSED_BY_TEMPLATE = "refused_by_chat_template"
NOT_A_TOKEN = "not_a_token"
NO_OFFSETS = "no_offsets"


@dataclass(frozen=True)
class Masking:
    """Which tokens count, in TRL's terms, and the chat template that tells where the assistant speaks."""

    completion_only: bool
    assistant_only: bool
    template: str | None


def configure_tokenizer(tokenizer: PreTrainedTokenizerBase, train: Mapping[str, Any]) -> None:
    """Set eos token, chat template and pad token on `tokenizer` as SFTTrainer does for these SFTConfig fields.

    A `chat_template_path` that is no jinja file is a tokenizer's folder or hub id; its template and eos token are taken
    over. Tokens that only it has are refused: TRL would give the base new embeddings for them, and an adapter that
    comes with those no longer fits the original base. Doing it twice changes nothing. Raises `DataError` for that, for
    a token outside the vocabulary, and for a template that is not there.
    """
    if train.get("eos_token") is not None:
        tokenizer.eos_token = _known_token(tokenizer, "eos_token", train["eos_token"])
    if train.get("chat_template_path") is not None:
        _set_chat_template(tokenizer, train["chat_template_path"])
    pad_token = train.get("pad_token") or tokenizer.pad_token or tokenizer.eos_token
    tokenizer.pad_token = _known_token(tokenizer, "pad_token", pad_token)


def _known_token(tokenizer: PreTrainedTokenizerBase, field: str, token: str | None) -> str:
    if token is None or token not in tokenizer.get_vocab():
        raise DataError(f"train.{field}: {token!r} is not in the tokenizer's vocabulary")
    return token


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    if path.endswith((".jinja", ".j2")):
        if not Path(path).is_file():
            raise DataError(f"train.chat_template_path: no file {path}")
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    try:
        source = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.chat_template = source.get_chat_template()
    except (OSError, ValueError) as error:
        raise DataError(f"train.chat_template_path: {path}: {error}") from error
    vocabulary = tokenizer.get_vocab()
    new = [str(token) for token in source.added_tokens_decoder.values() if token.content not in vocabulary]
    if new:
        raise DataError(
            f"train.chat_template_path: {path} has tokens that the base lacks ({', '.join(new[:5])}); "
            "use a template of the base's own family, or give the template alone as a .jinja file"
        )
    tokenizer.eos_token = source.eos_token


def masking(tokenizer: PreTrainedTokenizerBase, train: Mapping[str, Any], kind: str, sample: Example) -> Masking:
    """Return the masking of a data set of format `kind` under these SFTConfig fields; `sample` is its first example.

    As in TRL, only completions count when there are any, unless `completion_only_loss` says otherwise. Raises
    `DataError` where the tokenizer's chat template cannot do what is asked.
    """
    completion_only = train.get("completion_only_loss")
    if completion_only is None:
        completion_only = "prompt" in sample
    assistant_only = bool(train.get("assistant_only_loss"))
    if not is_conversational(dict(sample)):
        if assistant_only:
            raise DataError(f"train.assistant_only_loss: the data is {kind} without chat messages")
        if tokenizer.eos_token is None and kind != "tokenized":
            raise DataError("train.eos_token: the tokenizer has none; name the token that ends an example")
        return Masking(completion_only, False, None)
    if tokenizer.chat_template is None:
        raise DataError("train.chat_template_path: the data is chat and the tokenizer has no chat template")
    if not assistant_only or has_generation_markers(tokenizer.chat_template):
        return Masking(completion_only, assistant_only, None)
    try:
        return Masking(completion_only, assistant_only, get_training_chat_template(tokenizer))
    except ValueError as error:
        raise DataError(
            "train.assistant_only_loss: the chat template does not mark where the assistant speaks, and TRL knows no "
            "version of it that does; give one with {% generation %} as train.chat_template_path"
        ) from error


def tokenizer_key(tokenizer: PreTrainedTokenizerBase, rules: Masking) -> dict[str, Any]:
    """Return all that the token ids and labels of an example depend on, besides the example."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        backend.no_truncation()  # left behind, as padding, by whoever called the tokenizer last
        backend.no_padding()
        content = backend.to_str()
    return {
        "tokenizer": hashlib.sha256(content.encode()).hexdigest(),
        "class": type(tokenizer).__name__,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "masking": asdict(rules),
    }


def tokenize(example: Example, tokenizer: PreTrainedTokenizerBase, rules: Masking) -> tuple[list[int], list[int]] | str:
    """Return (input_ids, labels), or why there is nothing to learn: a reason, or `reason: sentence`.

    Both have the same length; labels are -100 where no loss is wanted, and not shifted. Truncation comes later: it
    differs between trials.
    """
    if "input_ids" in example:
        ids, masks = example["input_ids"], _given_masks(example, rules)
    elif not is_conversational(dict(example)):
        if rules.assistant_only:  # a plain row among chat: nobody speaks in it
            return NO_TARGET
        ids, masks = _rendered_text(example, tokenizer, rules)
    else:
        try:
            rendered = _rendered_chat(example, tokenizer, rules)
        except TEMPLATE_ERRORS as error:
            return f"{REFUSED_BY_TEMPLATE}: {error}"
        if isinstance(rendered, str):
            return rendered
        ids, masks = rendered
    given = example.get("labels")
    labels = given or [token if all(bits) else IGNORED for token, *bits in zip(ids, *masks, strict=True)]
    if "input_ids" in example and not _all_tokens(ids, labels, len(tokenizer)):
        return NOT_A_TOKEN
    return (ids, labels) if any(label != IGNORED for label in labels) else NO_TARGET


def _given_masks(example: Example, rules: Masking) -> list[list[int]]:
    masks = [example["completion_mask"]] if rules.completion_only and "completion_mask" in example else []
    return [*masks, example["assistant_masks"]] if "assistant_masks" in example else masks


def _all_tokens(ids: list[int], labels: list[int], vocabulary: int) -> bool:
    targets = [label for label in labels if label != IGNORED]
    return all(0 <= token < vocabulary for token in [*ids, *targets])


# --- text


def _rendered_text(
    example: Example, tokenizer: PreTrainedTokenizerBase, rules: Masking
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the whole example, and the masks that restrict its labels."""
    eos = tokenizer.eos_token or ""
    if "prompt" not in example:
        return _text_ids(_ended(example["text"], eos), tokenizer), []
    ids = _text_ids(example["prompt"] + _ended(example["completion"], eos), tokenizer)
    if not rules.completion_only:
        return ids, []
    return ids, [_completion_mask(_text_ids(example["prompt"], tokenizer), ids)]


def _text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text; where it says itself what the tokenizer adds, BOS or EOS stand there once."""
    ids: list[int] = tokenizer(text=text)["input_ids"]
    added: list[int] = tokenizer(text="")["input_ids"]
    if tokenizer.bos_token_id in added and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    if tokenizer.eos_token_id in added[-1:] and ids[-2:] == [tokenizer.eos_token_id] * 2:
        ids = ids[:-1]
    return ids


def _completion_mask(prompt: list[int], whole: list[int]) -> list[int]:
    """The completion starts where both diverge, which is not always after the prompt (TRL)."""
    start = common_prefix_length(prompt, whole)
    return [0] * start + [1] * (len(whole) - start)


def _ended(text: str, eos: str) -> str:
    """The text with one EOS token at its end; a line end after an EOS token that it has is no part of the text."""
    if eos and text.rstrip().endswith(eos):
        return text.rstrip()
    return text if text.endswith(eos) else text + eos


# --- chat


def _rendered_chat(
    example: Example, tokenizer: PreTrainedTokenizerBase, rules: Masking
) -> tuple[list[int], list[list[int]]] | str:
    """Token ids of the whole chat, and the masks that restrict its labels; or the problem with it."""
    prompt = example.get("prompt", [])
    messages = example["messages"] if "messages" in example else prompt + example["completion"]
    used = renderer(tokenizer, rules.template, example.get("tools"), example.get("chat_template_kwargs"))
    given = adapted(messages, used.template, tokenizer.special_tokens_map)
    if isinstance(given, str):
        return given
    text = used.text(given)
    if problem := problem_of(text, messages):
        return problem
    without = [
        index
        for index, message in enumerate(messages)
        if message.get("weight") == 0
        and not (rules.completion_only and index < len(prompt))
        and not (rules.assistant_only and message["role"] != "assistant")
    ]
    spans = unlearned(given, without, text, used, tokenizer)
    if isinstance(spans, str):
        return spans
    if not rules.assistant_only and not spans:
        ids, masks = tokenizer(text, add_special_tokens=False)["input_ids"], []
    elif not tokenizer.is_fast:
        return f"{NO_OFFSETS}: the tokenizer does not tell where in the text its tokens stand"
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        masks = [[1 - bit for bit in _inside(places, spans)]]
        masks += [_inside(places, used.marked(given)[1])] if rules.assistant_only else []
    if prompt and rules.completion_only:
        asked = tokenizer(used.text(given[: len(prompt)], prompt=True), add_special_tokens=False)["input_ids"]
        masks.append(_completion_mask(asked, ids))
    return ids, masks


def _inside(places: list[Span], spans: list[Span]) -> list[int]:
    """1 for each token of which a character lies in one of the spans."""
    return [int(any(a < end and start < max(b, a + 1) for start, end in spans)) for a, b in places]
