"""The base model and its tokenizer, from the hub, a folder, or a GGUF file that an installed package ships."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig

from tuner.errors import TunerError, is_out_of_memory
from tuner.training.cache import make_once
from tuner.training.hub import refuse_silent_hub
from tuner.training.identity import place_of_base, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 3
_PICKLE = re.compile(rb'\.(bin|pt|pth|pkl)"')


def load_model(
    model: dict[str, Any],
    cache: Path,
    device: str | torch.device | None = "cpu",
    quant_storage: torch.dtype = torch.uint8,
) -> PreTrainedModel:
    """Load the base as `ModelSpec` says: dtype, quantization, attention. Weights come from safetensors only.

    Without a device, whoever shards the model among workers moves its parts. `quant_storage` is what four-bit weights
    pretend to be made of. Raises TunerError for a base that cannot be had so, or whose files do not fit it.
    """
    source, options = pretrained_source(model, cache)
    if model["attn_implementation"]:
        options["attn_implementation"] = model["attn_implementation"]
    if Path(source).is_dir():
        _refuse_pickles(Path(source))
    return load_whole(
        source,
        f"model.name: {model['name']}",
        dtype=getattr(torch, model["dtype"]),
        quantization_config=quantization_config(model, quant_storage),
        device_map=None if device is None else {"": device},
        use_safetensors=True,
        **options,
    )


def load_whole(source: str | Path, named: str, **options: Any) -> PreTrainedModel:
    """`from_pretrained` for a model whose files hold exactly its weights.

    transformers only warns of a weight that is missing and draws a random one. Weights that the model's class computes
    or ties, and tensors that it ignores, are no difference.

    Args:
        source: a folder or hub id.
        named: what the message of an error begins with.
        options: further arguments of `from_pretrained`.

    Raises:
        TunerError: the model cannot be loaded, or a weight is missing, of another shape or not one of the model's.
    """
    try:  # a border: of the files of others anything may be wrong
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise _cannot_be_loaded(named, error) from error
    model, info = loaded
    info["mismatched_keys"] |= _misfits(model)
    info["missing_keys"] |= _without_scales(model)
    if found := _differences(info):
        raise TunerError(f"{named} does not fit its files: {'; '.join(found)}")
    return model


def _misfits(model: PreTrainedModel) -> set[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Weights that bitsandbytes holds in another shape than their layer's, which transformers does not notice."""
    found: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        of_nf4: Any = getattr(layer.weight, "quant_state", None)
        of_int8 = layer.weight if hasattr(layer.weight, "SCB") else None
        stored, wanted = of_nf4 if of_nf4 is not None else of_int8, (layer.out_features, layer.in_features)
        if stored is not None and tuple(stored.shape) != wanted:
            found.add((f"{name}.weight", tuple(stored.shape), wanted))
        elif of_nf4 is not None and layer.weight.nbytes != (wanted[0] * wanted[1] + 1) // 2:
            found.add((f"{name}.weight", (layer.weight.nbytes, 2), wanted))
    return found


def _without_scales(model: PreTrainedModel) -> set[str]:
    """Of weights whose scales are quantised as well, the scales of these, where they are not in the files."""
    states = {name: getattr(weight, "quant_state", None) for name, weight in model.named_parameters()}
    return {
        f"{name}.nested_absmax"
        for name, state in states.items()
        if state is not None and not state.nested and not state.absmax.is_floating_point()
    }


def _differences(info: dict[str, Any]) -> list[str]:
    """What transformers' loading info says of weights that are not as the model's config wants them, in words."""
    missing, strangers = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    others = [f"{name} is {_shape(stored)}, not {_shape(wanted)}" for name, stored, wanted in info["mismatched_keys"]]
    found = [f"{len(missing)} weights are missing ({_some(missing)})"] if missing else []
    found += [f"{len(others)} have another shape ({_some(sorted(others))})"] if others else []
    return found + ([f"{len(strangers)} belong to no part of the model ({_some(strangers)})"] if strangers else [])


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _refuse_pickles(folder: Path) -> None:
    """Raise TunerError for weights that are not in safetensors, and for an index that leads to others."""
    index = folder / "model.safetensors.index.json"
    misled = index.is_file() and _PICKLE.search(index.read_bytes())
    if misled or not any(folder.glob("*.safetensors")):
        raise TunerError(f"model.name: {folder} does not have its weights in safetensors; pickles are never read")


def _cannot_be_loaded(named: str, error: Exception) -> TunerError:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return TunerError(f"{named} cannot be loaded: {said}")


def load_tokenizer(model: dict[str, Any], cache: Path) -> PreTrainedTokenizerBase:
    """The base's own tokenizer, chat template included; read once in a process, and a copy for each who asks.

    Raises TunerError where there is none.
    """
    source, options = pretrained_source(model, cache)
    try:  # a border, as above
        return copy.deepcopy(_read_tokenizer(source, **options))
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_be_loaded(f"model.name: {model['name']}", error) from error


@lru_cache
def _read_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(source, **options)


def load_config(model: dict[str, Any], cache: Path) -> PreTrainedConfig:
    """The base's own config; raises TunerError where there is none that can be read."""
    source, options = pretrained_source(model, cache)
    try:  # a border, as above
        return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_be_loaded(f"model.name: {model['name']}", error) from error


def without_weights(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The model of this config on the meta device: all its modules, and no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def quantization_config(model: dict[str, Any], quant_storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig | None:
    """QLoRA's settings for nf4 (double quantisation, computing in the model's dtype); LLM.int8 for int8.

    A base that is quantised in its files is loaded by what its own config says, which transformers prefers.
    """
    if model["quantization"] == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, model["dtype"]),
            bnb_4bit_quant_storage=quant_storage,
        )
    if model["quantization"] == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def pretrained_source(model: dict[str, Any], cache: Path) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is called with: a folder or hub id, and the options that go with it."""
    name = place_of_base(model["name"])
    if model["gguf_file"]:
        return str(_converted_gguf(name, model, cache)), {}
    if Path(name).is_dir():
        return name, {"trust_remote_code": model["trust_remote_code"]}
    refuse_silent_hub()
    return name, {"revision": model["revision"], "trust_remote_code": model["trust_remote_code"]}


def _converted_gguf(folder: str, model: dict[str, Any], cache: Path) -> Path:
    """Convert a GGUF file to safetensors once per (file, dtype); two processes may ask at the same time."""
    gguf = Path(folder) / model["gguf_file"]
    digest = sha256(gguf, gguf.stat().st_mtime_ns).copy()
    digest.update(model["dtype"].encode())
    target = cache / "models" / digest.hexdigest()[:16]
    make_once(target, lambda working: _convert_gguf(folder, model, working))
    return target


def _convert_gguf(folder: str, model: dict[str, Any], target: Path) -> dict[str, Any]:
    weights = load_whole(
        folder,
        f"model.gguf_file: {model['gguf_file']}",
        gguf_file=model["gguf_file"],
        dtype=getattr(torch, model["dtype"]),
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    # The loader still calls the model GGUF-quantised in its config, though its weights are plain now.
    weights.config.__dict__.pop("quantization_config", None)
    weights.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=model["gguf_file"], trust_remote_code=False)
    tokenizer.save_pretrained(target)
    return {"gguf_file": model["gguf_file"]}
