"""The adapters of many slots in one linear layer: each slot's rows get its own low-rank product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Adapter:
    """One slot's LoRA on one linear layer: the very parameters that its trainer optimises."""

    a: nn.Parameter
    """(rank, in_features)"""
    b: nn.Parameter
    """(out_features, rank)"""
    scaling: float
    dropout: float
    generator: torch.Generator | None
    """Where the slot's dropout masks come from, so that they do not depend on its neighbours."""


@dataclass(frozen=True)
class Segment:
    """The tokens of one slot in a joint batch: rows start to stop of the flat (tokens, features) input."""

    slot: int
    start: int
    stop: int


class JointLinear(nn.Module):
    """A frozen linear layer (of any kind) that adds, to each slot's tokens, what the slot's adapter says.

    `base` maps (1, tokens, in) to (1, tokens, out). `adapters` holds the slots that adapt this layer; `segments` is the
    list of the whole model, set for every joint batch. Same mathematics as `peft.tuners.lora.Linear`:
    base(x) + scaling * B A dropout(x).
    """

    def __init__(self, base: nn.Module, segments: list[Segment]):
        super().__init__()
        self.base = base
        self.segments = segments
        self.adapters: dict[int, Adapter] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        active = [(segment, self.adapters[segment.slot]) for segment in self.segments if segment.slot in self.adapters]
        if not active:
            return y
        factors = [factor for _, adapter in active for factor in (adapter.a, adapter.b)]
        return _AddLowRank.apply(y, x, active, self.training, *factors)


class _AddLowRank(torch.autograd.Function):
    """y[rows of i] += scaling_i * (dropout(x[rows of i]) A_i^T) B_i^T for every slot i, in place of y.

    The products run in x's dtype, as they would under autocast; gradients of the factors come back in theirs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        active: list[tuple[Segment, Adapter]],
        training: bool,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.mark_dirty(y)
        ctx.active = active
        rows_in, rows_out = x[0], y[0]
        cast = [factor.to(x.dtype) for factor in factors]
        hidden, masks = [], []
        for (segment, adapter), a, b in zip(active, cast[::2], cast[1::2], strict=True):
            inputs = rows_in[segment.start : segment.stop]
            mask = _dropout_mask(inputs, adapter) if training and adapter.dropout else None
            low = (inputs if mask is None else inputs * mask) @ a.t()
            rows_out[segment.start : segment.stop].addmm_(low, b.t(), alpha=adapter.scaling)
            hidden.append(low)
            masks.append(mask)
        ctx.masks = masks
        ctx.dtypes = [factor.dtype for factor in factors]
        ctx.save_for_backward(x, *cast, *hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        count = len(ctx.active)
        cast, hidden = saved[: 2 * count], saved[2 * count :]
        rows_in, rows_grad = x[0], grad_y[0]
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        grads: list[torch.Tensor] = []
        for index, (segment, adapter) in enumerate(ctx.active):
            a, b, low, mask = cast[2 * index], cast[2 * index + 1], hidden[index], ctx.masks[index]
            inputs, grad = rows_in[segment.start : segment.stop], rows_grad[segment.start : segment.stop]
            grad_low = (grad @ b) * adapter.scaling
            grads.append((grad_low.t() @ (inputs if mask is None else inputs * mask)).to(ctx.dtypes[2 * index]))
            grads.append(((grad.t() @ low) * adapter.scaling).to(ctx.dtypes[2 * index + 1]))
            if grad_x is not None:
                part = grad_low @ a
                grad_x[0, segment.start : segment.stop] = part if mask is None else part * mask
        return grad_y, grad_x, None, None, *grads


def _dropout_mask(inputs: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    keep = 1 - adapter.dropout
    mask = torch.empty_like(inputs).bernoulli_(keep, generator=adapter.generator)
    return mask.div_(keep)
