"""How the workers of one trial share its training: DDP, FSDP2 or DeepSpeed's ZeRO; and whether they really did."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tuner.errors import InfeasibleError
from tuner.spec.sweep import ResourcesSpec
from tuner.spec.trial import TrialConfig

if TYPE_CHECKING:
    from torch import nn
    from trl import SFTTrainer

_BY_TRAINER: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}
DEEPSPEED: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}, **_BY_TRAINER},
    "zero2": {
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
        },
        **_BY_TRAINER,
    },
    "zero3": {
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        **_BY_TRAINER,
    },
}
"""DeepSpeed's settings where a spec has none of its own, also in cluster/deepspeed/. `auto`: as the trainer has it."""


def sharing_arguments(resources: ResourcesSpec) -> dict[str, Any]:
    """The arguments of `SFTConfig` that make a trainer share its training so; none for DDP, which needs none.

    FSDP wraps what the model calls its own layers (`_no_split_modules`), unless `resources.fsdp` says otherwise.
    """
    if resources.strategy == "fsdp":
        return {"fsdp": True, "fsdp_config": {**(resources.fsdp or {}), "cpu_offload": resources.offload}}
    if resources.strategy not in DEEPSPEED:
        return {}
    _start_deepspeed()
    assert not isinstance(resources.deepspeed, str)  # a file was read with the spec
    settings = copy.deepcopy(resources.deepspeed or DEEPSPEED[resources.strategy])
    for key, value in _BY_TRAINER.items():  # about which settings of one's own may be silent
        settings[key] = {**value, **settings.get(key, {})} if isinstance(value, dict) else value
    if resources.offload:
        zero = settings["zero_optimization"]
        zero.setdefault("offload_optimizer", {"device": "cpu"})
        if resources.strategy == "zero3":
            zero.setdefault("offload_param", {"device": "cpu"})
        settings.setdefault("zero_force_ds_cpu_optimizer", False)  # else it compiles one of its own, for Adam alone
    return {"deepspeed": settings}


def _start_deepspeed() -> None:
    """Have DeepSpeed join the other workers, before a model is loaded: ZeRO-3 shards it then."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it guesses, and says so
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # of CPUs: it would be compiled, under a global lock
    deepspeed.init_distributed(auto_mpi_discovery=False)


def loads_in_parts(resources: ResourcesSpec, quantization: str) -> bool:
    """Whether no worker is to have the whole base on its device, not even while it is loaded."""
    return resources.strategy in ("fsdp", "zero3") and quantization == "none"


def quant_storage(resources: ResourcesSpec) -> torch.dtype:
    """How four-bit weights are stored: FSDP shards only what looks like the other weights."""
    return torch.bfloat16 if resources.strategy == "fsdp" else torch.uint8


# What was asked and what is


class RefuseFallback(TrainerCallback):
    """Looks, when training begins, at what the libraries have made of the model.

    Raises InfeasibleError, with the finding, where that is not what was asked.
    """

    def __init__(self, trainer: SFTTrainer, resources: ResourcesSpec, config: TrialConfig):
        self._trainer = trainer
        self._resources = resources
        self._config = config

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = f"{self._resources.strategy} with {self._resources.workers_per_trial} workers was asked for"
        for finding in _findings(self._trainer, self._resources, self._config):
            raise InfeasibleError("strategy", f"{asked}, but {finding}")


def _findings(trainer: SFTTrainer, resources: ResourcesSpec, config: TrialConfig) -> Iterator[str]:
    workers, engine = resources.workers_per_trial, trainer.model_wrapped
    if trainer.args.world_size != workers:
        yield f"the trainer found {trainer.args.world_size}"
    if resources.strategy == "fsdp":
        yield from _not_sharded(trainer.model, workers)
    elif resources.strategy in DEEPSPEED:
        yield from _not_zero(engine, resources)
    elif workers > 1 and not isinstance(engine, torch.nn.parallel.DistributedDataParallel):
        yield f"the model is a plain {type(engine).__name__}"
    yield from _not_quantized(trainer.model, config["model"]["quantization"])


def _not_sharded(model: Any, workers: int) -> Iterator[str]:
    """FSDP2 makes every parameter a DTensor over all workers."""
    whole = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if whole:
        yield f"{len(whole)} parameters are on every worker whole, such as {whole[0]}"
    elif sizes := {weight.device_mesh.size() for weight in model.parameters()} - {workers}:
        yield f"parameters are sharded over {sizes.pop()}"


def _not_zero(engine: Any, resources: ResourcesSpec) -> Iterator[str]:
    """A DeepSpeed engine of the stage, with optimizer states (1, 2) or parameters (3) in as many parts as workers."""
    workers, stage = resources.workers_per_trial, int(resources.strategy[-1])
    if type(engine).__name__ != "DeepSpeedEngine":
        yield f"the model is a plain {type(engine).__name__}"
        return
    if engine.zero_optimization_stage() != stage:
        yield f"DeepSpeed runs stage {engine.zero_optimization_stage()}"
    elif stage < 3 and set(engine.optimizer.partition_count) != {workers}:
        yield f"the optimizer's states are in {engine.optimizer.partition_count} parts"
    elif stage == 3:
        for name, weight in engine.module.named_parameters():
            if not hasattr(weight, "ds_id") or weight.ds_tensor.ds_numel * workers >= weight.ds_numel + workers:
                yield f"{name} is on every worker whole"
    if resources.offload and not engine.zero_use_cpu_optimizer():
        yield "nothing is offloaded"


def _not_quantized(model: Any, quantization: str) -> Iterator[str]:
    """Layers are of bitsandbytes' type where that was asked for; a base may also have been quantised before."""
    found = {_quantization(module) for module in model.modules()} - {"none"}
    if quantization != "none" and found != {quantization}:
        yield f"of model.quantization {quantization} the layers are {' and '.join(sorted(found)) or 'not quantised'}"


def _quantization(module: nn.Module) -> str:
    if isinstance(module, Linear4bit):
        state: Any = module.quant_state  # not the weight's own, which a DTensor has lost
        return str(state.quant_type)
    return "int8" if isinstance(module, Linear8bitLt) else "none"


# Whole weights again


def gather_weights(trainer: SFTTrainer) -> dict[str, torch.Tensor] | None:
    """Every trained parameter, whole, on the first worker's CPU; None where each worker has all of them anyway.

    All workers must call. Raises InfeasibleError for one that does not come out in its full shape.
    """
    model: Any = trainer.model
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights.values()):
        return None
    whole = {}
    for name, weight in weights.items():
        shape = getattr(weight, "ds_shape", weight.shape)
        with torch.no_grad(), _gathered(weight) as full:
            if full.shape != shape:
                raise InfeasibleError("strategy", f"{name} was gathered as {tuple(full.shape)}, not {tuple(shape)}")
            if trainer.is_world_process_zero():  # which saves them
                whole[name.replace("_checkpoint_wrapped_module.", "")] = full.detach().to("cpu", copy=True)
    return whole


@contextmanager
def _gathered(weight: Any) -> Iterator[torch.Tensor]:
    if isinstance(weight, DTensor):
        yield weight.full_tensor()
    else:
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight.data


def largest_of_workers(number: int, device: torch.device) -> int:
    """The largest of a number that each worker has its own of. All workers must call."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    largest = torch.tensor(number, dtype=torch.long, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
