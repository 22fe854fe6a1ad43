"""The language-model head of a joint batch: losses per slot and their gradient, without ever making all logits.

The vocabulary is passed through in tiles that stay in the processor's cache, as flash attention passes through keys:
sums of exponentials are kept relative to the largest logit so far, and shrunk when a larger one comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

TOKENS = 1024
"""Rows that go through the vocabulary together."""
TILE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Logits (float32) made at a time."""


class WeightedNLL(torch.autograd.Function):
    """Negative log-likelihoods of targets, and the gradient of their weighted sum, in one pass over the head.

    The weight of every token is known beforehand (one over its slot's token count), so the gradient with respect to
    the hidden states is taken while each tile of logits is at hand: nothing is recomputed and no logits are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (tokens, features)
        weight: torch.Tensor,  # (vocabulary, features), frozen
        targets: torch.Tensor,  # (tokens,)
        weights: torch.Tensor,  # (tokens,), float32
    ) -> torch.Tensor:
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        for rows in _slices(len(targets), TOKENS):
            expected = torch.zeros(hidden[rows].shape, dtype=torch.float32, device=hidden.device)
            of_target, largest, total, _ = _through_vocabulary(hidden[rows], weight, targets[rows], expected)
            nll[rows] = total.log() + largest - of_target
            grad[rows] = (expected / total[:, None] - weight[targets[rows]]) * weights[rows, None]
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """`grad_nll` must be the weights given to forward times a constant; the constant is 1 here."""
        (grad,) = ctx.saved_tensors
        return grad, None, None, None


@torch.no_grad()
def nll_and_correct(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood (float32) of each target, and whether it is the first of the likeliest tokens."""
    nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for rows in _slices(len(targets), TOKENS):
        of_target, largest, total, earlier = _through_vocabulary(hidden[rows], weight, targets[rows])
        nll[rows] = total.log() + largest - of_target
        correct[rows] = (of_target == largest) & (of_target > earlier)  # bfloat16 has ties
    return nll, correct


def _through_vocabulary(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token: its target's logit, the largest, the sum of exp(logit - largest), the largest before the target's.

    `expected` (tokens, features), zeros, becomes the sum of the head's rows, each times its exp(logit - largest).
    """
    of_target = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
    largest, total = torch.full_like(of_target, -torch.inf), torch.zeros_like(of_target)
    earlier = largest.clone()
    for tile in _slices(len(weight), max(1, TILE_BYTES[hidden.device.type] // (4 * len(targets)))):
        part = weight[tile]
        logits = (hidden @ part.t()).float()
        here = ((targets >= tile.start) & (targets < tile.stop)).nonzero()[:, 0]
        place = (targets[here] - tile.start)[:, None]
        of_target[here] = logits[here].gather(1, place)[:, 0]
        later = torch.arange(len(part), device=place.device) >= place
        earlier[here] = torch.maximum(largest[here], logits[here].masked_fill(later, -torch.inf).amax(-1))
        before, largest = largest, torch.maximum(largest, logits.amax(-1))
        shrink = (before - largest).exp_()
        exponentials = logits.sub_(largest[:, None]).exp_()
        total = total * shrink + exponentials.sum(-1)
        if expected is not None:
            expected.mul_(shrink[:, None]).add_(exponentials.to(weight.dtype) @ part)
    return of_target, largest, total, earlier


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
