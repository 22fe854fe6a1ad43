"""The base model and its tokenizer, from the hub, a folder, or a GGUF file that an installed package ships."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig

from tuner.errors import TunerError
from tuner.training.cache import make_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE_SCHEME = "package:"


def load_model(
    model: dict[str, Any],
    cache: Path,
    device: str | torch.device | None = "cpu",
    quant_storage: torch.dtype = torch.uint8,
) -> PreTrainedModel:
    """Load the base as `ModelSpec` says: dtype, quantization, attention. Weights come from safetensors only.

    Without a device, whoever shards the model among workers moves its parts. `quant_storage` is what four-bit weights
    pretend to be made of.
    """
    source, options = pretrained_source(model, cache)
    if model["attn_implementation"]:
        options["attn_implementation"] = model["attn_implementation"]
    return AutoModelForCausalLM.from_pretrained(
        source,
        dtype=getattr(torch, model["dtype"]),
        quantization_config=quantization_config(model, quant_storage),
        device_map=None if device is None else {"": device},
        use_safetensors=True,
        **options,
    )


def load_tokenizer(model: dict[str, Any], cache: Path) -> PreTrainedTokenizerBase:
    """The base's own tokenizer, chat template included; read once in a process, and a copy for each who asks."""
    source, options = pretrained_source(model, cache)
    return copy.deepcopy(_read_tokenizer(source, **options))


@lru_cache
def _read_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(source, **options)


def quantization_config(model: dict[str, Any], quant_storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig | None:
    """QLoRA's settings for nf4 (double quantisation, computing in the model's dtype); LLM.int8 for int8."""
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
    name = model["name"]
    if name.startswith(PACKAGE_SCHEME):
        name = str(package_folder(name.removeprefix(PACKAGE_SCHEME)))
    if model["gguf_file"]:
        return str(_converted_gguf(name, model, cache)), {}
    if Path(name).is_dir():
        return name, {"trust_remote_code": model["trust_remote_code"]}
    return name, {"revision": model["revision"], "trust_remote_code": model["trust_remote_code"]}


def package_folder(package: str) -> Path:
    """Folder of an installed Python package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise TunerError(f"model.name: the Python package {package!r} is not installed")
    return Path(spec.submodule_search_locations[0])


def _converted_gguf(folder: str, model: dict[str, Any], cache: Path) -> Path:
    """Convert a GGUF file to safetensors once per (file, dtype); two processes may ask at the same time."""
    gguf = Path(folder) / model["gguf_file"]
    digest = _digest(gguf, gguf.stat().st_mtime_ns).copy()
    digest.update(model["dtype"].encode())
    target = cache / "models" / digest.hexdigest()[:16]
    make_once(target, lambda working: _convert_gguf(folder, model, working))
    return target


@lru_cache
def _digest(file: Path, modified_ns: int) -> Any:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256")


def _convert_gguf(folder: str, model: dict[str, Any], target: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=model["gguf_file"])
    weights = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=model["gguf_file"],
        dtype=getattr(torch, model["dtype"]),
        quantization_config=GgufConfig(dequantize=True),
    )
    # The loader still calls the model GGUF-quantised in its config, though its weights are plain now.
    weights.config.__dict__.pop("quantization_config", None)
    weights.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return {"gguf_file": model["gguf_file"]}


def describe(model: dict[str, Any], cache: Path) -> dict[str, Any]:
    """What identifies the base beyond its name: the hub commit, or a hash of the weights' file names and sizes."""
    source, _ = pretrained_source(model, cache)
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import HfApi

        return {"name": model["name"], "commit": HfApi().model_info(source, revision=model["revision"]).sha}
    files = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    return {"name": model["name"], "files": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}
