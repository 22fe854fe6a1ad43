"""Whether the joint step computes what the base itself does: tried on the base that was loaded, before any trial.

No list of architectures tells. Some read the whole batch's mask or positions, some attend in a way of their own, and a
document of one slot would then change the score of another's without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from tuner.training.evaluation import eval_mode
from tuner.training.shared.joint import Document, JointModel, MicroBatch, share_weights
from tuner.training.small import small_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (12, 7)
"""Tokens of the two documents; fewer where the base has fewer positions."""
CLOSE = 1e-4
"""Most that a score (nats per token) or a gradient (relatively) may differ in float32."""
COARSE = 0.3
"""The same for a base of another type, where rounding alone costs that much: only what is quite wrong shows there."""

Weights = list[torch.Tensor]


def why_not_equal(base: PreTrainedModel) -> str | None:
    """Where the joint score or gradient of a document is not the base's own; None where both are.

    Two documents of different length are computed, each with an adapter of its own. A base that is not in float32 is
    tried as it is, for what is quite wrong, and a small model of its architecture in float32. The base is left as it
    is, and so are the random numbers of this process.
    """
    exact = base.dtype == torch.float32 and not getattr(base, "is_quantized", False)
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return _tried(base, CLOSE if exact else COARSE) or (None if exact else _tried(_small(base), CLOSE))


def _small(base: PreTrainedModel) -> PreTrainedModel | None:
    try:  # a border: the model's own code, asked for a size it may not have
        return small_model(base.config, trust_remote_code=True)  # whose code has made the base already
    except Exception as error:
        print(f"the joint step is not tried in float32: {error}", flush=True)
        return None


def _tried(model: PreTrainedModel | None, allowed: float) -> str | None:
    try:  # a border: whatever the model's own code raises when it is called in another way
        return None if model is None else next(_differences(model, allowed), None)
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        return f"the joint step fails on the model: {type(error).__name__}: {said}"


def _differences(model: PreTrainedModel, allowed: float) -> Iterator[str]:
    documents, joint = _documents(model), JointModel(model)
    if not joint.linears:
        yield "the model has no linear layer that an adapter could be beside"
        return
    trees = [_adapted(model, joint.linears) for _ in documents]
    adapters = [joint.attach(tree.get_base_model()) for tree in trees]
    batches = [MicroBatch(adapter, [document]) for adapter, document in zip(adapters, documents, strict=True)]
    with eval_mode(joint.model):
        losses = joint.step(batches)
    for tree, adapter, loss, document in zip(trees, adapters, losses, documents, strict=True):
        tokens = len(document.input_ids) - 1
        alone, gradient = _own(tree, document)
        if not abs(loss - alone) / tokens <= allowed:
            yield f"a document scores {loss / tokens:.4f} beside another and {alone / tokens:.4f} alone"
        adapter.write_back(adapter.grad)  # which sorts it as PEFT does
        if not (apart := _distance([weight.detach() for weight in _trained(tree)], gradient)) <= allowed:
            yield f"the gradient of a document is another beside a second one (by {apart:.1e})"


def _documents(model: PreTrainedModel) -> list[Document]:
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or LENGTHS[0]
    rows = [torch.randint(0, config.vocab_size, (max(3, min(length, positions)),)) for length in LENGTHS]
    return [Document(row, row) for row in rows]


def _adapted(base: PreTrainedModel, linears: Iterable[str]) -> Any:
    """A module tree of its own over the same weights, with an adapter that changes what they compute."""
    tree: Any = get_peft_model(
        share_weights(base), LoraConfig(r=2, target_modules=list(linears), init_lora_weights=False)
    )
    for weight in _trained(tree):
        weight.data = 0.02 * torch.randn_like(weight)
    return tree


def _trained(tree: Any) -> Weights:
    return [weight for weight in tree.parameters() if weight.requires_grad]


def _own(tree: Any, document: Document) -> tuple[float, Weights]:
    """The summed loss of a document, as the model itself computes it, and its gradient."""
    ids = document.input_ids.to(tree.device)
    autocast = torch.autocast(ids.device.type, tree.dtype, enabled=tree.dtype != torch.float32)
    with eval_mode(tree), autocast:
        logits = tree(input_ids=ids[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits.float(), ids[1:], reduction="sum")
    return loss.item(), list(torch.autograd.grad(loss, _trained(tree)))


def _distance(some: Weights, others: Weights) -> float:
    """How far two gradients are apart, relatively to the second."""
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(some, others, strict=True))
    return math.sqrt(apart / sum(float(b.double().square().sum()) for b in others))
