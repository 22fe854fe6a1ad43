"""How much memory a worker of a trial needs, from the model's config alone; and which strategy follows from that."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from tuner.spec.checks.fields import possible_values
from tuner.spec.checks.strategies import why_not_optimizer
from tuner.spec.space import resolve
from tuner.spec.sweep import ResourcesSpec, SweepSpec
from tuner.spec.trial import TrialConfig
from tuner.training.model import pretrained_source
from tuner.training.trial import lora_config, sft_config

USABLE = 0.9
"""Of a device's memory, what a worker may take: the rest is for the libraries and between allocations."""
_STORED_BITS = {"nf4": 4.127, "int8": 8.03}
"""Of a weight in a quantised layer, with its scales (QLoRA, arXiv:2305.14314, section 3)."""


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

    def __str__(self) -> str:
        return f"{self.total / 2**30:.1f} GiB"


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
    config, asked = largest_trial(spec), spec.resources
    room = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None

    def needs(strategy: str) -> Estimate:
        return estimate(config, asked.model_copy(update={"strategy": strategy}), cache)

    def told(strategy: str, why: str = "") -> Chosen:
        needed = needs(strategy)
        of = f" of {room / 2**30:.0f} GiB" if room else ""
        return Chosen(strategy, f"{strategy}: a worker needs {needed}{of}{why}", needed)

    if asked.strategy != "auto":
        return told(asked.strategy)
    if room is None:
        return told("ddp", "; without a GPU auto shards nothing")
    whole = needs("ddp")
    if whole.total <= USABLE * room:
        return told("ddp")
    quantization, dtype = config["model"]["quantization"], config["model"]["dtype"]
    if why := why_not_optimizer("fsdp", config["train"].get("optim", "adamw_torch")):
        return told("ddp", f": too much, but {why}")
    if quantization == "int8" or (quantization == "nf4" and dtype != "bfloat16"):
        return told("ddp", f": too much, but {quantization} weights of a {dtype} model cannot be sharded")
    left = "" if needs("fsdp").total <= USABLE * room else ", likely too much: use more workers, or offload"
    return told("fsdp", f", {whole} with ddp{left}")


def largest_trial(spec: SweepSpec) -> TrialConfig:
    """A trial with the value of each searched key that takes most memory."""
    return resolve(spec, 0, {key: max(possible_values(spec, key), key=_weight) for key in spec.space})


def _weight(value: Any) -> float:
    """Numbers by their size; types and quantisations by their bits; what is none of these comes first."""
    bits = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "none": 32.0, "int8": 8.0, "nf4": 4.0}
    return float(value) if isinstance(value, int | float) else bits.get(str(value), 0.0)


def estimate(config: TrialConfig, resources: ResourcesSpec, cache: Path) -> Estimate:
    """What one of the workers of a trial needs at most, in bytes; loads no weights.

    Activations follow Korthikanti et al., arXiv:2205.05198, without the attention matrix, which no fused attention
    keeps. Gradients and moments are of the trained weights' type; ZeRO has a copy of those and the moments in float32.
    """
    model = config["model"]
    tree, frozen, trained = _sizes(config, cache)
    width = torch.finfo(getattr(torch, model["dtype"])).bits // 8
    of_trained = width if config["lora"] is None else 4
    zero = resources.strategy.startswith("zero")
    workers = resources.workers_per_trial
    parts = {"ddp": (1, 1, 1), "zero1": (1, 1, workers), "zero2": (1, workers, workers)}
    by_weights, by_gradients, by_moments = parts.get(resources.strategy, (workers, workers, workers))
    weights_here = not (resources.offload and by_weights > 1)
    args = sft_config(config, Path("."), ResourcesSpec(workers_per_trial=workers))
    text = tree.get_text_config()
    rows = args.per_device_train_batch_size
    tokens = rows * (config["train"].get("max_length", 1024) or text.max_position_embeddings)
    layers, hidden = text.num_hidden_layers, text.hidden_size
    of_layer = tokens * width * (12 * hidden + 4 * getattr(text, "intermediate_size", 4 * hidden))
    kept = layers * tokens * width * hidden + of_layer if args.gradient_checkpointing else layers * of_layer
    moments = 0 if str(args.optim) == "sgd" else (12 if zero else 2 * of_trained)
    return Estimate(
        base=frozen // by_weights * weights_here,
        trained=trained * of_trained // by_weights * weights_here,
        gradients=trained * of_trained // by_gradients * weights_here,
        optimizer=0 if resources.offload else trained * moments // by_moments,
        activations=kept,
        logits=3 * 4 * min(tokens, TOKEN_CHUNK_SIZE) * min(text.vocab_size, _CHUNKED_LOGPROB_CHUNK_SIZE),
        gathered=2 * (frozen + trained * of_trained) // layers if by_weights > 1 else 0,
    )


def _sizes(config: TrialConfig, cache: Path) -> tuple[Any, int, int]:
    """The model's config, the bytes of its frozen weights, and how many weights are trained."""
    model = config["model"]
    source, options = pretrained_source(model, cache)
    settings = AutoConfig.from_pretrained(source, **options)
    with torch.device("meta"):
        tree: Any = AutoModelForCausalLM.from_config(settings, trust_remote_code=model["trust_remote_code"])
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
