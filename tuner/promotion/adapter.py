"""Whether a checkpoint is what its config says, before anything of it is loaded into a model.

An interrupted or sharded save (ZeRO-3, FSDP) can leave a folder that loads without a word and holds nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from tuner.errors import PromotionRefused

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"

_SHOWN = 3


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, without its values."""

    shape: tuple[int, ...]
    finite: bool
    zero: bool


def check_adapter(
    folder: Path, base: PretrainedConfig, base_name: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return facts of a LoRA adapter that is whole and fits the base: `rank`, `tensors`, `parameters`.

    What there ought to be comes from PEFT itself: the adapter's config, applied to the base on the meta device, gives
    every tensor with its shape, so that rank patterns, DoRA, trained tokens and modules_to_save need no rules of ours.

    Args:
        folder: what PEFT's `save_pretrained` wrote.
        base: config of the model that the adapter was trained on.
        base_name: hub id or folder of that model; an adapter that names another one is refused.
        trust_remote_code: as in `ModelSpec`, for bases whose code is in their repository.

    Raises:
        PromotionRefused: with a sentence for everything found.
    """
    config = _adapter_config(folder)
    _refuse_if(_names_another_base(config, base_name))
    stored, problems = _stored_tensors([folder / ADAPTER_WEIGHTS])
    _refuse_if(problems)
    if not stored:
        raise PromotionRefused([f"{folder / ADAPTER_WEIGHTS} holds no tensors"])
    _refuse_if(_differences(_expected_tensors(folder, base, trust_remote_code), stored) + _bad_values(stored))
    return {
        "rank": config["r"],
        "tensors": len(stored),
        "parameters": sum(torch.Size(tensor.shape).numel() for tensor in stored.values()),
    }


def check_full_model(folder: Path, base: PretrainedConfig) -> dict[str, Any]:
    """Return facts of a fully fine-tuned model whose files are whole, finite and of the base's architecture.

    Whether every weight is there shows when it is loaded: `transformers` knows how names in files map to modules.
    Raises `PromotionRefused` as `check_adapter` does.
    """
    config = _read_json(folder / MODEL_CONFIG)
    stored, problems = _stored_tensors(_model_files(folder))
    _refuse_if(problems)
    if not stored:
        raise PromotionRefused([f"{folder} holds no tensors"])
    for field in ("model_type", "hidden_size", "num_hidden_layers"):
        ours, theirs = config.get(field), getattr(base, field, None)
        if ours != theirs:
            problems.append(f"the checkpoint's {field} is {ours}, the base's is {theirs}")
    problems += [f"{name} holds values that are not finite" for name, tensor in stored.items() if not tensor.finite]
    _refuse_if(problems)
    return {
        "tensors": len(stored),
        "parameters": sum(torch.Size(tensor.shape).numel() for tensor in stored.values()),
    }


def _refuse_if(problems: list[str]) -> None:
    if problems:
        raise PromotionRefused(problems)


def _adapter_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise PromotionRefused([f"{folder / ADAPTER_CONFIG} does not describe a LoRA adapter"])
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PromotionRefused([f"{path.parent} holds no {path.name}"])
    try:  # a border: the file comes from a process that may have died writing it
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PromotionRefused([f"{path} is not JSON: {error}"]) from error
    if not isinstance(content, dict):
        raise PromotionRefused([f"{path} is not a JSON object"])
    return content


def _names_another_base(config: dict[str, Any], base_name: str | None) -> list[str]:
    """A converted base is named by its folder in the cache: when the cache moves, the folder's name stays."""
    named = config.get("base_model_name_or_path")
    if base_name is None or not named or named == base_name:
        return []
    if Path(named).is_absolute() and Path(base_name).is_absolute() and Path(named).name == Path(base_name).name:
        return []
    return [f"the adapter was trained on {named}, not on {base_name}"]


def _model_files(folder: Path) -> list[Path]:
    """The weight files of a saved model, one or several."""
    if not (folder / MODEL_INDEX).is_file():
        return [folder / MODEL_WEIGHTS]
    return [folder / name for name in sorted(set(_read_json(folder / MODEL_INDEX)["weight_map"].values()))]


def _stored_tensors(paths: list[Path]) -> tuple[dict[str, Stored], list[str]]:
    """Read every tensor of safetensors files, one at a time; a file that is not whole becomes a problem."""
    stored: dict[str, Stored] = {}
    problems = []
    for path in paths:
        if not path.is_file():
            problems.append(f"{path} is missing; only safetensors are read, never pickles")
            continue
        try:  # a border: the file comes from a process that may have died writing it
            stored.update(_read_tensors(path))
        except SafetensorError as error:
            problems.append(f"{path} is damaged or cut short: {error}")
    return stored, problems


def _read_tensors(path: Path) -> Iterator[tuple[str, Stored]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            yield name, Stored(tuple(tensor.shape), bool(torch.isfinite(tensor).all()), not bool(tensor.any()))


def _expected_tensors(folder: Path, base: PretrainedConfig, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an adapter of this config has on this base; loads no weights."""
    config = PeftConfig.from_pretrained(str(folder))
    config.init_lora_weights = True  # PiSSA and its like would decompose weights that the meta device does not have
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base, trust_remote_code=trust_remote_code)
    try:  # a border: PEFT says with ValueError that a config does not fit the model
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise PromotionRefused([f"the adapter's config does not fit the base: {error}"]) from error
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _differences(expected: dict[str, tuple[int, ...]], stored: dict[str, Stored]) -> list[str]:
    """What is missing, of the wrong shape, or fits nothing; embeddings that PEFT saves along are neither."""
    problems = []
    missing = [name for name in expected if name not in stored]
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} tensors are missing: {_some(missing)}")
    wrong = [name for name, shape in expected.items() if name in stored and stored[name].shape != shape]
    if wrong:
        details = [f"{name} is {stored[name].shape}, ought to be {expected[name]}" for name in wrong]
        problems.append(f"{len(wrong)} of {len(expected)} tensors have the wrong shape: {_some(details)}")
    strangers = [name for name in stored if name not in expected and "lora_" in name]
    if strangers:
        problems.append(f"{len(strangers)} tensors fit no module of the base: {_some(strangers)}")
    return problems


def _bad_values(stored: dict[str, Stored]) -> list[str]:
    problems = []
    broken = [name for name, tensor in stored.items() if not tensor.finite]
    if broken:
        problems.append(f"{len(broken)} of {len(stored)} tensors hold values that are not finite: {_some(broken)}")
    # Of the two factors the one that PEFT starts at zero: B, but A where the layer is an embedding.
    products = [tensor for name, tensor in stored.items() if "lora_B" in name or "lora_embedding_A" in name]
    if products and all(tensor.zero for tensor in products):
        problems.append("every B is zero: the adapter changes nothing, as before its first step")
    return problems


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
