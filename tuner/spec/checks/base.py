"""What the config of a base says, held against the spec: how its weights are stored, how many positions it knows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuner.errors import Problem
from tuner.spec.checks.fields import place_of, possible_values
from tuner.spec.checks.paths import PACKAGE, is_small_file, package_folder
from tuner.spec.checks.words import show
from tuner.spec.sweep import SweepSpec

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
_OF_TABLES = {
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small"),
    *("codegen", "ctrl", "electra", "ernie", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "marian", "mbart"),
    *("megatron-bert", "mpt", "mvp", "openai-gpt", "opt", "pegasus", "plbart", "rembert", "roc_bert", "roformer"),
    *("trocr", "whisper", "xlm"),
}
"""Types of models that have a row for each position, and fail at one that they have no row for."""
_AFTER_PADDING = {
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Those whose first position is the row after the padding token's."""


def check_base(spec: SweepSpec) -> list[Problem]:
    """Find what does not fit a base whose config lies on this machine."""
    config = _config_of(spec)
    return problems_of_base(spec, config) if config is not None else []


def problems_of_base(spec: SweepSpec, config: Mapping[str, Any]) -> list[Problem]:
    """Everything that does not fit a base of this `config.json`."""
    return [*_of_quantization(spec, config), *too_long(spec, learned_positions(config))]


def _config_of(spec: SweepSpec) -> dict[str, Any] | None:
    """The config.json of a base in a folder or an installed package; None where there is none that can be read."""
    name = spec.model.name
    folder = package_folder(name.removeprefix(PACKAGE)) if name.startswith(PACKAGE) else Path(name)
    if folder is None:
        return None
    path = folder / "config.json"
    try:
        if spec.model.gguf_file is not None or not is_small_file(path):
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # loading it says what is wrong with it
    return found if isinstance(found, dict) else None


# How its weights are stored


def stored_quantization(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """What the weights of a base are quantised to, and the settings that say so; None where they are not.

    That is `nf4` or `int8`, as `model.quantization` has them, or else the name of the method.
    """
    settings = next((part["quantization_config"] for part in _parts(config) if part.get("quantization_config")), None)
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        return show(settings), {}
    method = settings.get("quant_method")
    if settings.get("load_in_8bit"):
        return "int8", settings
    if settings.get("load_in_4bit"):
        kind = str(settings.get("bnb_4bit_quant_type", "fp4"))  # as BitsAndBytesConfig has it
        return kind if kind == "nf4" else f"bitsandbytes {kind}", settings
    return str(method), settings


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config, and those in it: of a model of several parts each has one."""
    yield config
    for key, value in config.items():
        if key != "quantization_config" and isinstance(value, Mapping):
            yield from _parts(value)


def _of_quantization(spec: SweepSpec, config: Mapping[str, Any]) -> Iterator[Problem]:
    stored = stored_quantization(config)
    if stored is None:
        return
    kind, _ = stored
    if kind not in ("nf4", "int8"):
        allowed = (
            "a base with plain weights, or bitsandbytes' nf4 or int8: no adapter could be merged into others; "
            "most have an original that is not quantised"
        )
        yield Problem("model.name", f"{show(spec.model.name)}, whose config.json says {kind}", allowed)
        return
    at = "model.quantization"
    for value in possible_values(spec, at):
        if value != kind:
            yield Problem(place_of(spec, at), show(value), f"{kind}, as the config.json of the base says", kind)
    if spec.promotion is not None and spec.promotion.merge_into == "original":
        allowed = "dequantized, since the base has no weights but quantised ones"
        yield Problem("promotion.merge_into", "'original'", allowed, "dequantized")
    if spec.resources.strategy == "fsdp" and not shards_as_stored(config):
        allowed = "ddp, zero1 or zero2: fsdp shards nf4 weights that are stored as bfloat16, and the base's are not"
        yield Problem("resources.strategy", "'fsdp'", allowed, "ddp")


def shards_as_stored(config: Mapping[str, Any]) -> bool:
    """Whether FSDP can shard the weights as the base's files hold them: quantised ones only in bfloat16's guise."""
    stored = stored_quantization(config)
    return stored is None or str(stored[1].get("bnb_4bit_quant_storage")) in ("bfloat16", "torch.bfloat16")


# How many positions it knows


def learned_positions(config: Mapping[str, Any]) -> int | None:
    """How many tokens a row may have, where the base has a table of positions; None where it has none or is unknown."""
    kind = config.get("model_type")
    number = next((config[name] for name in _LENGTHS if isinstance(config.get(name), int)), None)
    if number is None or kind in _OF_TABLES:
        return number if kind in _OF_TABLES else None
    padding = config.get("pad_token_id", 1)
    return number - padding - 1 if kind in _AFTER_PADDING and isinstance(padding, int) else None


def too_long(spec: SweepSpec, positions: int | None) -> Iterator[Problem]:
    """Find every `max_length` that is above the positions of the base, or that padding lifts above them."""
    if positions is None:
        return
    at, multiples = "train.max_length", possible_values(spec, "train.pad_to_multiple_of")
    allowed = f"at most {positions}, the positions that the base has learned"
    for length in possible_values(spec, at):
        if not isinstance(length, int):
            continue
        if length > positions:
            yield Problem(place_of(spec, at), show(length), allowed, str(positions))
            continue
        for multiple in multiples:
            padded = -(-length // multiple) * multiple if isinstance(multiple, int) and multiple > 0 else length
            if padded > positions:
                got = f"{multiple}, which pads {length} tokens to {padded}"
                yield Problem(place_of(spec, "train.pad_to_multiple_of"), got, allowed)
