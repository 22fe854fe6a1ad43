"""How many positions and tokens a base has, by its structure, and whether the rows of a sweep stay within them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, load_from_disk

from tuner.errors import Problem
from tuner.spec.checks import base

_LENGTHS = ("max_position_embeddings", "max_target_positions")


def learned_positions(tree: Any, config: Any) -> int | None:
    """How many tokens a row may have; None for rotary bases and others that compute what a position is.

    `tree` is the model, which needs no weights. A table of positions is an embedding, or a buffer that says so, with as
    many rows as the config has positions; OPT and its kin leave `offset` rows out, RoBERTa's those up to the padding's.
    """
    text = config.get_text_config(decoder=True)
    known = [getattr(text, name, None) for name in _LENGTHS]
    found = [
        rows - skipped
        for module, table in _tables(tree)
        for rows, skipped in [(table.shape[0], _skipped(module))]
        if rows - getattr(module, "offset", 0) in known
    ]
    return min(found, default=base.learned_positions(text.to_dict()))


def _tables(tree: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    tokens = tree.get_input_embeddings()
    for module in tree.modules():
        if isinstance(module, torch.nn.Embedding) and module is not tokens:
            yield module, module.weight
        for name, buffer in module.named_buffers(recurse=False):
            if "pos" in name and buffer.dim() == 2:
                yield module, buffer


def _skipped(module: Any) -> int:
    if hasattr(module, "offset"):
        return int(module.offset)
    padding = getattr(module, "padding_idx", None)
    return 0 if padding is None else padding + 1


def rows_that_do_not_fit(
    tree: Any, positions: int | None, folders: Iterable[Path], pad_token_id: int | None
) -> list[Problem]:
    """Find tokenised rows that are longer than the positions, and tokens that the embedding has no row for.

    Each of the folders holds rows of `input_ids`; batches are padded with `pad_token_id`.
    """
    size = tree.get_input_embeddings().weight.shape[0]
    allowed = (
        f"token ids from 0 to {size - 1}, for which the base's embedding has rows; is it the base's own tokenizer?"
    )
    found: dict[str, Problem] = {}
    for folder in folders:
        smallest, largest, longest = _extremes(folder)
        odd = smallest if smallest < 0 else largest
        if not 0 <= odd < size:
            found.setdefault("token", Problem("data.path", f"rows with the token id {odd}", allowed))
        if positions is not None and longest > positions:
            most = f"at most {positions}, the positions that the base has learned"
            found.setdefault("length", Problem("train.max_length", f"a row of {longest} tokens", most, str(positions)))
    if pad_token_id is not None and pad_token_id >= size:
        found["padding"] = Problem("model.name", f"a tokenizer that pads with the token id {pad_token_id}", allowed)
    return list(found.values())


def _extremes(folder: Path) -> tuple[int, int, int]:
    """The smallest and the largest token id of tokenised rows, and the length of the longest row."""
    table: Any = load_from_disk(str(folder))
    assert isinstance(table, Dataset)
    smallest = largest = longest = 0
    for chunk in table.data["input_ids"].chunks:
        ends = pc.min_max(pc.list_flatten(chunk)).as_py()
        smallest, largest = min(smallest, ends["min"] or 0), max(largest, ends["max"] or 0)
        longest = max(longest, pc.max(pc.list_value_length(chunk)).as_py() or 0)
    return smallest, largest, longest
