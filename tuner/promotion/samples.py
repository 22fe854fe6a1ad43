"""Answers of a model to a few evaluation prompts, so that a user sees what the tuning did."""

from __future__ import annotations

import re
from bisect import bisect_left
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch

from tuner.training.evaluation import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 48
_ROLE = re.compile(r"(system|developer|user|assistant|model|tool)(\n|$)")


def pick_prompts(
    rows: Dataset, count: int, tokenizer: PreTrainedTokenizerBase, mark: str | None = None
) -> list[list[int]]:
    """Token ids of up to `count` prompts, spread evenly over the rows.

    A prompt is what stands before a row's first target token. A row that is all target has one up to the last `mark`,
    the text right before its answer; without a mark (plain text) it is the first half.
    """
    prompts = []
    count = min(count, len(rows))
    for index in range(count):
        row = rows[index * len(rows) // count]
        ids = row["input_ids"]
        start = next((position for position, label in enumerate(row["labels"]) if label != IGNORED), 0)
        # The first token is never a target, so a row of plain text may begin with one ignored label.
        if start <= 1:
            start = _end_of(mark, ids, tokenizer) or max(1, len(ids) // 2)
        prompts.append(ids[:start])
    return prompts


def _end_of(mark: str | None, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens stand before the end of the last such text; 0 where there is none, or nothing after it."""
    at = str(tokenizer.decode(ids)).rfind(mark) if mark else -1
    if mark is None or at < 0:
        return 0
    end = bisect_left(range(len(ids)), at + len(mark), key=lambda length: len(str(tokenizer.decode(ids[:length]))))
    return end if end < len(ids) else 0


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> str:
    """A prompt as a person would have typed it: of a chat, what was said last before the answer, without markers."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    said = [
        _without_role(str(tokenizer.decode(list(tokens))).strip())
        for is_special, tokens in groupby(prompt, key=special.__contains__)
        if not is_special
    ]
    return next((text for text in reversed(said) if text), "")


def _without_role(text: str) -> str:
    role = _ROLE.match(text)
    return text[role.end() :].strip() if role else text


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> list[str]:
    """The model's greedy continuation of each prompt, at most `MAX_NEW_TOKENS` tokens, special tokens left out."""
    model.eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        with torch.no_grad():
            output = cast(Any, model).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        answers.append(str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)).strip())
    return answers
