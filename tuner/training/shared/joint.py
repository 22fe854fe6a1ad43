"""The shared base: one frozen model, and one forward and backward for the micro-batches of many slots.

A joint batch is flat. Every micro-batch is taken apart into its documents, and all documents of all slots are laid end
to end in one row, each slot's together. Linear layers then see exactly the tokens there are, with no padding; attention
alone looks at documents, and pads them to the longest of similar length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tuner.training.evaluation import IGNORED, eval_mode
from tuner.training.shared.head import WeightedNLL, nll_and_correct
from tuner.training.shared.lora import Adapter, JointLinear, Run, Stack, bucket, lora_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "tuner_documents"

SHORT = {torch.bfloat16: 1024, torch.float32: 256}
"""Lengths up to which plain products are faster on a CPU than the fused kernel: up to six times, backward included."""


@dataclass(frozen=True)
class Document:
    """One sequence that attends only to itself: token ids and labels, unshifted, IGNORED where masked."""

    input_ids: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """What one slot wants computed."""

    adapter: Adapter | None
    """None for the base as it is."""
    documents: Sequence[Document]
    divisor: float = 1.0
    """The slot's loss is the sum of its negative log-likelihoods over this (tokens of the whole optimizer step)."""
    noise: float = 0.0
    """NEFTune: embeddings get uniform noise between minus and plus this."""
    seed: int = 0
    """Where the random numbers of this micro-batch come from: dropout and noise."""

    @property
    def tokens(self) -> int:
        return sum(len(document.input_ids) for document in self.documents)


class JointModel:
    """The base's module tree with every linear layer able to serve all slots. Weights are shared, never copied."""

    def __init__(self, base: PreTrainedModel, activation_checkpointing: bool = False):
        self._device, self._dtype = base.device, base.dtype
        self._runs: list[Run] = []
        self._stacks: dict[int, Stack] = {}
        self.model = share_weights(base)
        self.model.requires_grad_(False)
        self.model.config._attn_implementation = ATTENTION
        self._head = self.model.get_output_embeddings()
        self.linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not self._head
        }
        for number, (name, module) in enumerate(self.linears.items(), start=1):  # 0 is the noise's
            self.model.set_submodule(name, JointLinear(module, name, number, self._runs))
        if activation_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self._batches: list[MicroBatch] = []
        self._layout = Layout([1], self._device)
        self.model.get_input_embeddings().register_forward_hook(self._add_noise)
        self.model.train()

    def attach(self, tree: PreTrainedModel) -> Adapter:
        """A place for the adapter in a slot's own module tree. Raises NotShareable, see `lora_layers`."""
        layers = lora_layers(tree, list(self.linears))
        return Adapter(self.stack(max((layer.r["default"] for layer in layers.values()), default=1)), layers)

    def stack(self, rank: int) -> Stack:
        """Where adapters of this rank are kept."""
        size = bucket(rank)
        if size not in self._stacks:
            self._stacks[size] = Stack(self.linears, size, self._dtype, self._device)
        return self._stacks[size]

    def step(self, batches: Sequence[MicroBatch]) -> list[float]:
        """One forward and backward: adds to the gradients of every slot's adapter, returns every slot's loss."""
        order = _side_by_side(batches)
        hidden, targets, spans = self._forward([batches[index] for index in order])
        divisors = torch.tensor([batches[index].divisor for index in order])
        weights = (1 / divisors).repeat_interleave(torch.tensor(spans)).to(hidden.device)
        nll = WeightedNLL.apply(hidden, self._head_weight(hidden.dtype), targets, weights)
        weighted = nll * weights
        weighted.sum().backward()
        losses = [float(part.sum()) for part in weighted.detach().split(spans)]
        return [losses[order.index(index)] for index in range(len(batches))]

    @torch.no_grad()
    def score(self, batches: Sequence[MicroBatch]) -> list[tuple[float, int, int]]:
        """For every slot the summed negative log-likelihood (nats), correct tokens and tokens of its documents."""
        order = _side_by_side(batches)
        with eval_mode(self.model):
            hidden, targets, spans = self._forward([batches[index] for index in order])
            nll, correct = nll_and_correct(hidden, self._head_weight(hidden.dtype), targets)
        parts = zip(nll.split(spans), correct.split(spans), spans, strict=True)
        sums = [(losses.double().sum().item(), int(hits.sum()), count) for losses, hits, count in parts]
        return [sums[order.index(index)] for index in range(len(batches))]

    def _forward(self, batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Hidden states of all tokens that have a target, the targets, and how many of them each batch has."""
        documents = [document for batch in batches for document in batch.documents]
        self._batches = list(batches)
        self._runs[:] = _runs(batches)
        self._layout = Layout([len(document.input_ids) for document in documents], self._device)
        output = self.model.base_model(
            input_ids=torch.cat([document.input_ids for document in documents])[None].to(self._device),
            position_ids=self._layout.positions[None],
            use_cache=False,
            layout=self._layout,
        )
        targets = torch.cat([_shifted(document.labels) for document in documents])
        counted = targets != IGNORED
        spans = [int(part.sum()) for part in counted.split([batch.tokens for batch in batches])]
        rows = counted.nonzero()[:, 0].to(self._device)
        return output.last_hidden_state[0].index_select(0, rows), targets[counted].to(self._device), spans

    def _head_weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self._head.weight.to(dtype)

    def _add_noise(self, module: nn.Module, inputs: Any, embeddings: torch.Tensor) -> torch.Tensor | None:
        """NEFTune, for the slots that ask for it: uniform noise on the embeddings of their tokens."""
        if not self.model.training or not any(batch.noise for batch in self._batches):
            return None
        parts = embeddings[0].split([batch.tokens for batch in self._batches])
        return torch.cat([_with_noise(part, batch) for part, batch in zip(parts, self._batches, strict=True)])[None]

    @property
    def padding_waste(self) -> float:
        """Share of the last batch's attention rows that were padding; nothing else is padded."""
        return self._layout.waste


def why_not_joint(model: PreTrainedModel, longest: int | None) -> str | None:
    """What in an architecture two short documents would not show, if anything; `longest` is the longest document.

    `proof.why_not_equal` finds all that they do show.
    """
    config = model.config.get_text_config()
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
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if longest is None or longest > trained:
            return f"the model turns short sequences otherwise beside one of over {trained} tokens"
    return None


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same parameters and buffers: its own structure, hooks and modes, no memory."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


def _kind(batch: MicroBatch) -> tuple[int, int]:
    """Micro-batches of a kind can be one run."""
    return (batch.adapter.stack.rank if batch.adapter else 0, batch.tokens)


def _side_by_side(batches: Sequence[MicroBatch]) -> list[int]:
    """An order of the batches in which those of a kind are neighbours, and so are rows of a stack."""
    return sorted(range(len(batches)), key=lambda i: (*_kind(batches[i]), getattr(batches[i].adapter, "row", 0)))


def _runs(batches: Sequence[MicroBatch]) -> Iterator[Run]:
    start = 0
    for (rank, tokens), group in groupby(batches, key=_kind):
        run = list(group)
        stop = start + tokens * len(run)
        if rank:
            adapters = [batch.adapter for batch in run if batch.adapter]
            rows = tuple(adapter.row for adapter in adapters)
            dropouts = tuple(adapter.dropout for adapter in adapters)
            yield Run(start, stop, adapters[0].stack, rows, dropouts, tuple(batch.seed for batch in run))
        start = stop


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    """The target of every position: the next token's label, none for the last."""
    return torch.cat([labels[1:], labels.new_full((1,), IGNORED)])


def _with_noise(embeddings: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    if not batch.noise:
        return embeddings
    generator = torch.Generator(embeddings.device).manual_seed(batch.seed)
    return embeddings + torch.empty_like(embeddings).uniform_(-batch.noise, batch.noise, generator=generator)


class Layout:
    """Where the documents of a joint batch lie in its flat row; makes them rows of their own for attention.

    Documents of about equal length are attended to together, padded to the longest of them.
    """

    def __init__(self, lengths: list[int], device: torch.device):
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes
        self.positions = (torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)).to(device)
        self._equal = (len(lengths), lengths[0]) if min(lengths) == max(lengths) else None
        """Documents and their length, where all are equally long: nothing is moved or padded then."""
        self._gathers: list[tuple[int, torch.Tensor]] = []
        padded, scatter = 0, torch.empty(int(sizes.sum()), dtype=torch.long)
        for group in _of_similar_length(lengths):
            longest = lengths[group[0]]
            columns = torch.arange(longest)[None]
            size, start = sizes[group][:, None], starts[group][:, None]
            # Padding repeats a document's own last token. It comes after all others, which causal attention keeps from
            # weighting it; were it another slot's, that slot's NaN would come through all the same, as zero times NaN.
            gather = start + columns.minimum(size - 1)
            self._gathers.append((longest, gather.flatten().to(device)))
            kept = columns < size
            scatter[gather[kept]] = padded + kept.flatten().nonzero()[:, 0]
            padded += gather.numel()
        self._scatter = scatter.to(device)
        self.waste = 1 - int(sizes.sum()) / padded

    def spread(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """(1, heads, tokens, dim) to (documents, heads, longest, dim) for every group."""
        rows = flat[0].transpose(0, 1)
        if self._equal:
            return [rows.unflatten(0, self._equal).transpose(1, 2)]
        parts = [rows.index_select(0, gather).unflatten(0, (-1, longest)) for longest, gather in self._gathers]
        return [part.transpose(1, 2) for part in parts]

    def join(self, groups: list[torch.Tensor]) -> torch.Tensor:
        """(documents, longest, heads, dim) of every group to (1, tokens, heads, dim)."""
        rows = torch.cat([group.flatten(0, 1) for group in groups])
        return (rows if self._equal else rows.index_select(0, self._scatter))[None]


def _of_similar_length(lengths: list[int]) -> Iterator[list[int]]:
    """Numbers of documents, longest first, in groups whose shortest is more than half as long as their longest."""
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if group and 2 * lengths[number] <= lengths[group[0]]:
            yield group
            group = []
        group.append(number)
    yield group


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document."""
    attended = []
    for rows in zip(layout.spread(query), layout.spread(key), layout.spread(value), strict=True):
        if query.device.type == "cpu" and rows[0].shape[2] <= SHORT.get(query.dtype, 0) and not dropout:
            attended.append(_attend_short(*rows, scaling or query.shape[-1] ** -0.5))
        else:
            attended.append(sdpa_attention_forward(module, *rows, None, dropout, scaling, is_causal=True)[0])
    return layout.join(attended), None


def _attend_short(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention as plain products: (documents, heads, length, dim) to (documents, length, heads, dim)."""
    documents, heads, length, dim = query.shape
    # Query heads that share a key head are rows of one product.
    scores = (query * scaling).reshape(documents, key.shape[1], -1, dim) @ key.transpose(-1, -2)
    future = torch.full((length, length), -torch.inf, dtype=query.dtype).triu_(1)
    weights = (scores.unflatten(2, (-1, length)) + future).softmax(-1).flatten(2, 3)
    return (weights @ value).view(documents, heads, length, dim).transpose(1, 2)


AttentionInterface.register(ATTENTION, _attend)
