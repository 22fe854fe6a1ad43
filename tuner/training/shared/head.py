"""The language-model head of a joint batch: losses per slot and their gradient, without keeping the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

CHUNK_BYTES = 64 * 2**20
"""Logits (float32) made at a time."""


class WeightedNLL(torch.autograd.Function):
    """Negative log-likelihoods of targets, and the gradient of their weighted sum, in one pass over the head.

    The weight of every token is known beforehand (one over its slot's token count), so the gradient with respect to
    the hidden states is taken while each chunk of logits is at hand: nothing is recomputed and no logits are kept.
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
        for rows in _chunks(len(targets), len(weight)):
            exponentials, total, log_probs = _exponentials(hidden[rows], weight, targets[rows])
            nll[rows] = -log_probs
            mean = exponentials.to(weight.dtype) @ weight
            grad[rows] = (mean / total - weight[targets[rows]]) * weights[rows, None]
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
    """Negative log-likelihood (float32) of each target, and whether it was the most likely token."""
    nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for rows in _chunks(len(targets), len(weight)):
        logits = (hidden[rows] @ weight.t()).float()
        nll[rows] = logits.logsumexp(-1) - logits.gather(1, targets[rows, None])[:, 0]
        correct[rows] = logits.argmax(-1) == targets[rows]
    return nll, correct


def _exponentials(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(logit - largest) (tokens, vocabulary), its sum (tokens, 1), the targets' log-probabilities (tokens,)."""
    logits = (hidden @ weight.t()).float()
    logits -= logits.amax(-1, keepdim=True)
    of_targets = logits.gather(1, targets[:, None])[:, 0]
    exponentials = logits.exp_()
    total = exponentials.sum(-1, keepdim=True)
    return exponentials, total, of_targets - total[:, 0].log()


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return (slice(start, start + size) for start in range(0, tokens, size))
