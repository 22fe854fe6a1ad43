"""How much memory a worker of a trial needs, from the model's config alone; and which strategy follows from that."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from tuner.spec.batch import batch_of_one, share_of_batch
from tuner.spec.checks.base import shards_as_stored
from tuner.spec.checks.fields import possible_values
from tuner.spec.checks.strategies import why_not_optimizer
from tuner.spec.fields import checkpoints_activations
from tuner.spec.space import resolve
from tuner.spec.sweep import ResourcesSpec, SweepSpec
from tuner.spec.trial import TrialConfig
from tuner.training.dataset import DEFAULT_MAX_LENGTH
from tuner.training.model import load_config, without_weights
from tuner.training.room import room_of_worker
from tuner.training.trial import lora_config

_STORED_BITS = {"nf4": 4.127, "int8": 8.03}
"""Of a weight in a quantised layer, with its scales (QLoRA, arXiv:2305.14314, section 3)."""
_WEIGHTLESS = ("lora_alpha", "lora_dropout", "use_rslora")
"""Fields of LoraConfig on which no size depends."""
_TILES = {"cuda": 3, "cpu": 8}
"""Tiles of logits at once in TRL's fused head: its kernels fold them in place, its plain torch does not."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one worker at the height of a training step."""

    base: int
    """Frozen weights, as they are stored."""
    trained: int
    """Trained weights: of the adapter, or all of them."""
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass, and one layer's own."""
    logits: int
    """One tile of TRL's fused head, in float32, and what is computed from it."""
    gathered: int
    """The whole weights of two layers, where each worker holds but a part of every layer."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def is_at_least(self, other: Estimate) -> bool:
        """Whether every part is: then it is more than the other in truth, too, however rough both are."""
        return all(mine >= its for mine, its in zip(astuple(self), astuple(other), strict=True))

    def __str__(self) -> str:
        return in_gib(self.total)


def in_gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


@dataclass(frozen=True)
class Chosen:
    """The strategy of a sweep's trials."""

    name: str
    reason: str
    estimate: Estimate
    """With this strategy."""

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "reason": self.reason, "estimated_bytes": asdict(self.estimate)}


def choose_strategy(spec: SweepSpec, cache: Path) -> Chosen:
    """The strategy that was asked for; of `auto`, DDP where a worker's share fits onto this process's GPU, else FSDP.

    Judged by the largest trial of the space. Without a GPU `auto` is DDP, and so it is where the quantisation allows
    nothing else.
    """
    config, asked = largest_trial(spec, cache), spec.resources
    has = room_of_worker(asked) if torch.cuda.is_available() else None

    def needs(strategy: str) -> Estimate:
        return estimate(config, asked.model_copy(update={"strategy": strategy}), cache)

    def told(strategy: str, why: str = "") -> Chosen:
        needed = needs(strategy)
        of = f" of {in_gib(has)}" if has else ""
        return Chosen(strategy, f"{strategy}: a worker needs {needed}{of}{why}", needed)

    if asked.strategy != "auto":
        return told(asked.strategy)
    if has is None:
        return told("ddp", "; without a GPU auto shards nothing")
    whole = needs("ddp")
    if whole.total <= has:
        return told("ddp")
    quantization, dtype = config["model"]["quantization"], config["model"]["dtype"]
    if why := why_not_optimizer("fsdp", config["train"].get("optim", "adamw_torch")):
        return told("ddp", f": too much, but {why}")
    if quantization == "int8" or (quantization == "nf4" and dtype != "bfloat16"):
        return told("ddp", f": too much, but {quantization} weights of a {dtype} model cannot be sharded")
    if not shards_as_stored(load_config(config["model"], cache).to_dict()):
        return told("ddp", ": too much, but fsdp does not shard four-bit weights that the base's files hold as bytes")
    left = "" if needs("fsdp").total <= has else ", likely too much: use more workers, or offload"
    return told("fsdp", f", {whole} with ddp{left}")


@dataclass(frozen=True)
class Room:
    """The memory of one worker, and what else trials are judged by before they start."""

    size: int
    """Bytes."""
    device: str
    """cuda or cpu."""
    row_tokens: float
    """Mean tokens of a row."""
    holds_all: bool
    """Whether the largest trial of the space fits, so that none needs to be judged."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_room(spec: SweepSpec, cache: Path, data: dict[str, Any], beside: int) -> Room:
    """What a worker has in this process's place, which `beside` of them divide where they have no GPU.

    `spec` says how the workers of a trial share it; `data` is the summary of the sweep's data.
    """
    size = room_of_worker(spec.resources, beside)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row_tokens = data["train_tokens"] / data["rows_train"]
    needed = estimate_if_any(largest_trial(spec, cache), spec.resources, cache, row_tokens)
    return Room(size, device, row_tokens, needed is None or needed.total <= size)


def largest_trial(spec: SweepSpec, cache: Path) -> TrialConfig:
    """A trial with the value of each searched key that takes most memory: of numbers the largest, else by estimate."""
    values = {key: possible_values(spec, key) for key in spec.space}
    point = {key: max(several) for key, several in values.items() if _are_numbers(several)}

    def needs(trial: TrialConfig) -> int:
        needed = estimate_if_any(trial, spec.resources, cache)
        return needed.total if needed else 0

    for key, several in values.items():
        if key not in point:
            point = max((resolve(spec, 0, point | {key: value}) for value in several), key=needs)["point"]
    return resolve(spec, 0, point)


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def estimate(
    config: TrialConfig,
    resources: ResourcesSpec,
    cache: Path,
    row_tokens: float = math.inf,
    device: str | None = None,
) -> Estimate:
    """What one of the workers of a trial needs, in bytes; loads no weights.

    That is at most, for rows as long as `max_length`; with `row_tokens`, their mean, it is what a batch of such rows
    needs where they are not packed. The `device` is cuda or cpu, by default this process's.

    Activations follow Korthikanti et al., arXiv:2205.05198, without the attention matrix, which no fused attention
    keeps. Gradients and moments are of the trained weights' type; ZeRO has a copy of those and the moments in float32.
    """
    model = config["model"]
    lora = {field: value for field, value in (config["lora"] or {}).items() if field not in _WEIGHTLESS}
    part = {"model": model, "lora": lora if config["lora"] is not None else None}
    settings, frozen, trained = _sizes(json.dumps(part, sort_keys=True), cache)
    width = torch.finfo(getattr(torch, model["dtype"])).bits // 8
    of_trained = width if config["lora"] is None else 4
    zero = resources.strategy.startswith("zero")
    workers = resources.workers_per_trial
    parts = {"ddp": (1, 1, 1), "zero1": (1, 1, workers), "zero2": (1, workers, workers)}
    by_weights, by_gradients, by_moments = parts.get(resources.strategy, (workers, workers, workers))
    weights_here = not (resources.offload and by_weights > 1)
    train, device = config["train"], device or ("cuda" if torch.cuda.is_available() else "cpu")
    text = settings.get_text_config()
    rows, _ = share_of_batch(*batch_of_one(train), workers)
    length = train.get("max_length", DEFAULT_MAX_LENGTH) or text.max_position_embeddings
    if train.get("packing", "none") == "none":
        length = min(length, row_tokens)
    tokens = round(rows * length)
    layers, hidden = text.num_hidden_layers, text.hidden_size
    of_layer = tokens * width * (12 * hidden + 4 * getattr(text, "intermediate_size", 4 * hidden))
    kept = layers * tokens * width * hidden + of_layer if checkpoints_activations(train) else layers * of_layer
    moments = 0 if train.get("optim") == "sgd" else (12 if zero else 2 * of_trained)
    return Estimate(
        base=frozen // by_weights * weights_here,
        trained=trained * of_trained // by_weights * weights_here,
        gradients=trained * of_trained // by_gradients * weights_here,
        optimizer=0 if resources.offload else trained * moments // by_moments,
        activations=kept,
        logits=_TILES[device] * 4 * min(tokens, TOKEN_CHUNK_SIZE) * min(text.vocab_size, _CHUNKED_LOGPROB_CHUNK_SIZE),
        gathered=2 * (frozen + trained * of_trained) // layers if by_weights > 1 else 0,
    )


def estimate_if_any(
    config: TrialConfig, resources: ResourcesSpec, cache: Path, row_tokens: float = math.inf, device: str | None = None
) -> Estimate | None:
    """The same; None where the model cannot be made without weights, or takes no such adapter.

    Whether such a trial can train it says itself.
    """
    try:
        return estimate(config, resources, cache, row_tokens, device)
    except Exception as error:  # a border: whatever the model's own code raises
        print(f"no estimate of a trial's memory: {error}", flush=True)
        return None


@lru_cache(maxsize=256)
def _sizes(part: str, cache: Path) -> tuple[Any, int, int]:
    """The model's config, the bytes of its frozen weights, and how many weights are trained.

    `part` of a TrialConfig is `model` and `lora`, as JSON.
    """
    config: TrialConfig = json.loads(part)
    model = config["model"]
    settings = load_config(model, cache)
    tree: Any = without_weights(settings, model["trust_remote_code"])
    linear = {
        id(module.weight)
        for module in tree.modules()
        if isinstance(module, torch.nn.Linear) and module is not tree.get_output_embeddings()
    }
    lora = lora_config(config)
    if lora is not None:
        lora.init_lora_weights = True  # others would look at weights that the meta device does not have
        tree = get_peft_model(tree, lora, low_cpu_mem_usage=True)
    plain = torch.finfo(getattr(torch, model["dtype"])).bits
    bits = _STORED_BITS.get(model["quantization"], plain)
    frozen = sum(
        weight.numel() * (bits if id(weight) in linear else plain)
        for weight in tree.parameters()
        if not weight.requires_grad
    )
    return settings, int(frozen / 8), sum(weight.numel() for weight in tree.parameters() if weight.requires_grad)
