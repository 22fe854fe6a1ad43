"""The shared base: one frozen model, and one forward and backward for the micro-batches of many slots.

A joint batch is flat. Every micro-batch is taken apart into its documents, and all documents of all slots are laid end
to end in one row, each slot's together. Linear layers then see exactly the tokens there are, with no padding; attention
alone looks at documents, which it pads to the longest of their kind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tuner.training.evaluation import IGNORED, eval_mode
from tuner.training.shared.head import WeightedNLL, nll_and_correct
from tuner.training.shared.lora import Adapter, JointLinear, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "tuner_documents"


@dataclass(frozen=True)
class Document:
    """One sequence that attends only to itself: token ids and labels, unshifted, IGNORED where masked."""

    input_ids: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """What one slot wants computed."""

    slot: int
    documents: Sequence[Document]
    divisor: float
    """The slot's loss is the sum of its negative log-likelihoods over this (tokens of the whole optimizer step)."""
    noise: float = 0.0
    """NEFTune: embeddings get uniform noise between minus and plus this."""


class JointModel:
    """The base's module tree with every linear layer able to serve all slots. Weights are shared, never copied."""

    def __init__(self, base: PreTrainedModel, activation_checkpointing: bool = False):
        self._base = base
        self._segments: list[Segment] = []
        self._model = share_weights(base)
        self._model.requires_grad_(False)
        self._model.config._attn_implementation = ATTENTION
        self._head = self._model.get_output_embeddings()
        self._linears: dict[str, JointLinear] = {}
        for name, module in list(self._model.named_modules()):
            if is_linear(module) and module is not self._head:
                self._linears[name] = JointLinear(module, self._segments)
                self._model.set_submodule(name, self._linears[name])
        if activation_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._documents = _Documents()
        self._noise: list[float] = []
        self._generators: dict[int, torch.Generator] = {}
        self._model.get_input_embeddings().register_forward_hook(self._add_noise)
        self._model.train()

    def attach(self, slot: int, tree: nn.Module, generator: torch.Generator) -> None:
        """Let a slot's adapter, the LoRA layers found in its own module tree, act on the slot's tokens.

        `generator` is where the slot's own random numbers (dropout, noise) come from.
        """
        self._generators[slot] = generator
        for name, linear in self._linears.items():
            layer: Any = tree.get_submodule(name)
            if isinstance(layer, LoraLayer):
                dropout = layer.lora_dropout["default"]
                a: Any = layer.lora_A["default"]
                b: Any = layer.lora_B["default"]
                linear.adapters[slot] = Adapter(
                    a.weight,
                    b.weight,
                    layer.scaling["default"],
                    dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
                    generator,
                )

    def detach(self, slot: int) -> None:
        self._generators.pop(slot, None)
        for linear in self._linears.values():
            linear.adapters.pop(slot, None)

    def step(self, batches: Sequence[MicroBatch]) -> list[float]:
        """One forward and backward: adds to the gradients of every slot's adapter, returns every slot's loss."""
        hidden, targets, spans = self._forward(batches)
        weights = torch.cat(
            [
                torch.full((stop - start,), 1 / batch.divisor)
                for batch, (start, stop) in zip(batches, spans, strict=True)
            ]
        ).to(hidden.device)
        nll = WeightedNLL.apply(hidden, self._head_weight(hidden.dtype), targets, weights)
        weighted = nll * weights
        weighted.sum().backward()
        return [float(part.sum()) for part in weighted.detach().split([stop - start for start, stop in spans])]

    @torch.no_grad()
    def score(self, batches: Sequence[MicroBatch]) -> list[tuple[float, int, int]]:
        """For every slot the summed negative log-likelihood (nats), correct tokens and tokens of its documents."""
        with eval_mode(self._model):
            hidden, targets, spans = self._forward(batches)
            nll, correct = nll_and_correct(hidden, self._head_weight(hidden.dtype), targets)
        return [(nll[a:b].double().sum().item(), int(correct[a:b].sum()), b - a) for a, b in spans]

    def _forward(self, batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
        """Hidden states of all tokens that have a target, the targets, and each batch's span among them."""
        device = next(self._base.parameters()).device
        documents = [document for batch in batches for document in batch.documents]
        lengths = [len(document.input_ids) for document in documents]
        self._segments[:] = _segments(batches)
        self._noise = [batch.noise for batch in batches]
        self._documents.set(lengths, device)
        positions = torch.cat([torch.arange(length) for length in lengths])
        output = self._model.base_model(
            input_ids=torch.cat([document.input_ids for document in documents])[None].to(device),
            position_ids=positions[None].to(device),
            use_cache=False,
            documents=self._documents,
        )
        targets = torch.cat([_shifted(document.labels) for document in documents])
        counted = targets != IGNORED
        spans, start = [], 0
        for part in counted.split([segment.stop - segment.start for segment in self._segments]):
            spans.append((start, start + int(part.sum())))
            start = spans[-1][1]
        return output.last_hidden_state[0][counted.to(device)], targets[counted].to(device), spans

    def _head_weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self._head.weight.to(dtype)

    def _add_noise(self, module: nn.Module, inputs: Any, embeddings: torch.Tensor) -> torch.Tensor | None:
        """NEFTune, for the slots that ask for it: uniform noise on the embeddings of their tokens."""
        if not self._model.training or not any(self._noise):
            return None
        noisy = embeddings.clone()
        for segment, size in zip(self._segments, self._noise, strict=True):
            part = noisy[0, segment.start : segment.stop]
            part += torch.empty_like(part).uniform_(-size, size, generator=self._generators[segment.slot])
        return noisy

    @property
    def padding_waste(self) -> float:
        """Share of the last batch's attention rows that were padding."""
        return self._documents.waste


def why_not_joint(model: PreTrainedModel, longest: int | None) -> str | None:
    """What in an architecture the joint step does not compute, if anything; `longest` is the longest document."""
    config = model.config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"the model scales its logits ({name})"
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None) is not None:
            return f"the model caps its logits ({name})"
    if hasattr(config, "router_aux_loss_coef"):
        return "the model is a mixture of experts"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        return f"the model has layers of another kind: {', '.join(sorted(kinds))}"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and (longest is None or longest > window):
        return f"the model attends to {window} tokens at a time, fewer than a sequence may have"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return "the model's head is no plain linear layer"
    return None


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same parameters and buffers: its own structure, hooks and modes, no memory."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


def is_linear(module: nn.Module) -> bool:
    """Linear layers as PEFT's all-linear sees them, bitsandbytes' quantised ones included."""
    return isinstance(module, nn.Linear)


def _segments(batches: Sequence[MicroBatch]) -> Iterator[Segment]:
    start = 0
    for batch in batches:
        stop = start + sum(len(document.input_ids) for document in batch.documents)
        yield Segment(batch.slot, start, stop)
        start = stop


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    """The target of every position: the next token's label, none for the last."""
    return torch.cat([labels[1:], labels.new_full((1,), IGNORED)])


class _Documents:
    """Where the documents of the present batch lie in the flat row; makes them rows of their own for attention."""

    def set(self, lengths: list[int], device: torch.device) -> None:
        self.longest = max(lengths)
        sizes = torch.tensor(lengths)[:, None]
        starts = sizes.cumsum(0) - sizes
        columns = torch.arange(self.longest)[None]
        # Padding repeats a document's own last token. It comes after all others, which causal attention keeps from
        # weighting it; were it another slot's, that slot's NaN would come through all the same, as zero times NaN.
        self.gather = (starts + columns.minimum(sizes - 1)).flatten().to(device)
        self.scatter = (columns < sizes).flatten().nonzero()[:, 0].to(device)
        self.count = len(lengths)
        self.waste = 1 - sum(lengths) / (self.longest * self.count)

    def spread(self, flat: torch.Tensor) -> torch.Tensor:
        """(1, heads, tokens, dim) to (documents, heads, longest, dim)."""
        heads, dim = flat.shape[1], flat.shape[3]
        rows = flat[0].transpose(0, 1).index_select(0, self.gather)
        return rows.view(self.count, self.longest, heads, dim).transpose(1, 2)

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """(documents, longest, heads, dim) to (1, tokens, heads, dim)."""
        return rows.reshape(-1, *rows.shape[2:]).index_select(0, self.scatter)[None]


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: _Documents,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document."""
    query, key, value = (documents.spread(part) for part in (query, key, value))
    rows, _ = sdpa_attention_forward(module, query, key, value, None, dropout, scaling, is_causal=True)
    return documents.join(rows), None


AttentionInterface.register(ATTENTION, _attend)
