"""The adapters of many slots, stacked, and the linear layers that serve all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from tuner.errors import NotShareable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST_RANK = 8
"""Ranks up to here share a stack, ranks up to twice that another: a product of lower rank is no faster."""


class Stack:
    """LoRA factors of slots of similar rank, for every linear layer of the base: a row for each slot.

    A row holds, layer after layer, A (rank, in) and B transposed (rank, out). What a slot does not have, because its
    rank is lower or it adapts fewer layers, is zero; products with zeros keep it zero. So one batched product serves a
    layer for all slots, and a slot's whole adapter is one vector to its optimizer.
    """

    def __init__(self, layers: dict[str, nn.Linear], rank: int, dtype: torch.dtype, device: torch.device):
        self.rank = rank
        self._layout: dict[str, tuple[int, int, int, int]] = {}
        """Layer -> where its A and B begin in a row, in_features, out_features."""
        width = 0
        for name, layer in layers.items():
            middle, end = width + rank * layer.in_features, width + rank * (layer.in_features + layer.out_features)
            self._layout[name] = (width, middle, layer.in_features, layer.out_features)
            width = end
        self.values = torch.zeros(0, width, dtype=dtype, device=device)
        """(slots, width): the adapters in the dtype that the base computes in."""
        self.grads = torch.zeros(0, width, dtype=torch.float32, device=device)
        self.scalings = {name: torch.zeros(0, dtype=torch.float32, device=device) for name in layers}
        self.adapted: dict[str, set[int]] = {name: set() for name in layers}
        """Layer -> rows of the slots that adapt it."""
        self._free: list[int] = []

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def take_row(self) -> int:
        """A row of zeros that no slot has; the stack doubles when there is none."""
        if not self._free:
            count = len(self.values)
            more = max(1, count)
            self.values = torch.cat([self.values, self.values.new_zeros(more, self.values.shape[1])])
            self.grads = torch.cat([self.grads, self.grads.new_zeros(more, self.grads.shape[1])])
            self.scalings = {name: torch.cat([old, old.new_zeros(more)]) for name, old in self.scalings.items()}
            self._free = list(range(count, count + more))
        return self._free.pop(0)

    def free_row(self, row: int) -> None:
        for rows in self.adapted.values():
            rows.discard(row)
        self.values[row].zero_()
        self.grads[row].zero_()
        self._free.insert(0, row)

    def factors(self, rows: torch.Tensor, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's A (slots, rank, in) and transposed B (slots, rank, out) in rows of this stack's width, as views."""
        start, middle, in_features, out_features = self._layout[layer]
        end = middle + self.rank * out_features
        return (
            rows[..., start:middle].unflatten(-1, (self.rank, in_features)),
            rows[..., middle:end].unflatten(-1, (self.rank, out_features)),
        )


class Adapter:
    """One slot's LoRA: the layers PEFT made for its trainer, and their place in a stack, where they are trained."""

    def __init__(self, stack: Stack, layers: dict[str, LoraLayer]):
        self.stack = stack
        self.row = stack.take_row()
        self._layers = layers
        self.dropout = 0.0
        self.weights = nn.Parameter(torch.zeros_like(stack.grads[self.row]))
        """(width,), float32: what the slot's optimizer steps."""
        with torch.no_grad():
            for name, layer in layers.items():
                a, b = stack.factors(self.weights, name)
                rank = layer.r["default"]
                a[:rank] = _weight(layer.lora_A)
                b[:rank] = _weight(layer.lora_B).t()
                stack.scalings[name][self.row] = layer.scaling["default"]
                stack.adapted[name].add(self.row)
                self.dropout = float(getattr(layer.lora_dropout["default"], "p", 0.0))
        self.use_weights()

    @classmethod
    def of_zeros(cls, stack: Stack) -> Adapter:
        """One that adapts every layer by nothing, to measure with."""
        adapter = cls(stack, {})
        for rows in stack.adapted.values():
            rows.add(adapter.row)
        return adapter

    @property
    def grad(self) -> torch.Tensor:
        return self.stack.grads[self.row]

    @torch.no_grad()
    def use_weights(self) -> None:
        """Let joint batches compute with the weights as they are now."""
        self.stack.values[self.row].copy_(self.weights)

    @torch.no_grad()
    def write_back(self, weights: torch.Tensor) -> None:
        """Put weights (as long as `self.weights`) into the layers PEFT made, for PEFT to save."""
        for name, layer in self._layers.items():
            a, b = self.stack.factors(weights, name)
            rank = layer.r["default"]
            _weight(layer.lora_A).copy_(a[:rank])
            _weight(layer.lora_B).copy_(b[:rank].t())

    def free(self) -> None:
        self.stack.free_row(self.row)


def lora_layers(tree: PreTrainedModel, linears: Sequence[str]) -> dict[str, LoraLayer]:
    """The LoRA layers of a slot's own module tree, by the name of the linear layer they adapt.

    Raises NotShareable when the tree trains anything but plain A and B beside these linear layers.
    """
    layers: dict[str, LoraLayer] = {}
    trained: set[int] = set()
    for name in linears:
        layer = tree.get_submodule(name)
        if isinstance(layer, LoraLayer):
            layers[name] = layer
            trained |= {id(_weight(layer.lora_A)), id(_weight(layer.lora_B))}
            if layer.lora_variant:
                raise NotShareable(f"{name} is adapted by more than a low-rank product")
    for name, parameter in tree.named_parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            raise NotShareable(f"it trains {name}, which is no low-rank factor beside a linear layer")
    return layers


def bucket(rank: int) -> int:
    """The rank of the stack that an adapter of this rank belongs to: the next power of two."""
    return max(SMALLEST_RANK, 1 << (rank - 1).bit_length())


def _weight(factor: nn.ModuleDict) -> torch.Tensor:
    weight = factor["default"].weight
    assert isinstance(weight, torch.Tensor)
    return weight


@dataclass(frozen=True)
class Run:
    """Tokens of slots that lie side by side in a joint batch, equally many of each, their adapters in one stack."""

    start: int
    stop: int
    stack: Stack
    rows: tuple[int, ...]
    """The slots' rows of the stack, in the order of their tokens."""
    dropouts: tuple[float, ...]
    seeds: tuple[int, ...]
    """Of each slot: where the random numbers of its micro-batch come from."""

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """This run's part of (1, tokens, features), as (slots, tokens of each, features)."""
        return tokens[0, self.start : self.stop].unflatten(0, (len(self.rows), -1))

    @cached_property
    def index(self) -> slice | torch.Tensor:
        """The rows as an index: a slice, which copies nothing, where they follow each other."""
        first, count = self.rows[0], len(self.rows)
        if self.rows == tuple(range(first, first + count)):
            return slice(first, first + count)
        return torch.tensor(self.rows, device=self.stack.values.device)


class JointLinear(nn.Module):
    """A frozen linear layer (of any kind) that adds, to each slot's tokens, what the slot's adapter says.

    `base` maps (1, tokens, in) to (1, tokens, out). Same mathematics as `peft.tuners.lora.Linear`:
    base(x) + scaling * B A dropout(x). `runs` is the list of the whole model, set for every joint batch.
    """

    def __init__(self, base: nn.Module, name: str, number: int, runs: list[Run]):
        super().__init__()
        self.base = base
        self.name = name
        self.number = number
        self.runs = runs
        self._anchor = torch.zeros((), requires_grad=True)  # makes autograd come here, also below the first adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        runs = [run for run in self.runs if not run.stack.adapted[self.name].isdisjoint(run.rows)]
        return _AddLowRank.apply(y, x, self._anchor, self, runs, self.training) if runs else y


class _AddLowRank(torch.autograd.Function):
    """y[tokens of i] += (scaling_i * dropout(x[tokens of i]) A_i^T) B_i^T for every slot i, in place of y.

    The products run in x's dtype, as they would under autocast. The gradients of A and B are added to the stacks'.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        anchor: torch.Tensor,
        layer: JointLinear,
        runs: list[Run],
        training: bool,
    ) -> torch.Tensor:
        ctx.mark_dirty(y)
        ctx.layer, ctx.runs, ctx.masks = layer, runs, []
        lows = []
        for run in runs:
            index = run.index
            a, b = (factor[index] for factor in run.stack.factors(run.stack.values, layer.name))
            inputs = run.of(x)
            mask = _dropout_mask(inputs, run, layer.number) if training and any(run.dropouts) else None
            low = torch.bmm(inputs if mask is None else inputs * mask, a.transpose(1, 2))
            low *= run.stack.scalings[layer.name][index, None, None]
            run.of(y).baddbmm_(low, b)
            ctx.masks.append(mask)
            lows.append(low)
        ctx.save_for_backward(x, *lows)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, *lows = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        for run, low, mask in zip(ctx.runs, lows, ctx.masks, strict=True):
            index, name = run.index, ctx.layer.name
            a, b = (factor[index] for factor in run.stack.factors(run.stack.values, name))
            grad_a, grad_b = run.stack.factors(run.stack.grads, name)
            inputs, grad = run.of(x), run.of(grad_y)
            grad_low = torch.bmm(grad, b.transpose(1, 2))
            grad_low *= run.stack.scalings[name][index, None, None]
            grad_a[index] += torch.bmm(grad_low.transpose(1, 2), inputs if mask is None else inputs * mask)
            grad_b[index] += torch.bmm(low.transpose(1, 2), grad)
            if grad_x is not None:
                part = torch.bmm(grad_low, a)
                run.of(grad_x).copy_(part if mask is None else part.mul_(mask))
        return grad_y, grad_x, None, None, None, None


def _dropout_mask(inputs: torch.Tensor, run: Run, layer: int) -> torch.Tensor:
    """(slots, tokens, features): zero where dropped. Each slot's part depends on its own seed and the layer alone.

    So it is the same when activation checkpointing computes the layer again, and whoever the neighbours are.
    """
    mask = torch.ones_like(inputs)
    for part, dropout, seed in zip(mask, run.dropouts, run.seeds, strict=True):
        if dropout:
            generator = torch.Generator(inputs.device).manual_seed(seed + layer)
            part.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
    return mask
