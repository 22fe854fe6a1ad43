"""Merges a trial's adapter into its base, saves, reloads and measures; always a process of its own.

`python -m tuner.promotion.merge JOB.json RESULT.json`. Fresh because a model that has been evaluated may no longer be
merged: on CPUs with AVX512-BF16 an evaluation repacks 4-bit weights, and the merge that follows is garbage.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset, load_from_disk
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoTokenizer

from tuner.errors import DiskFullError, PromotionRefused, TunerError
from tuner.promotion.adapter import check_adapter, check_full_model
from tuner.promotion.fresh import MergeJob, Progress
from tuner.promotion.gate import lost_by_merging
from tuner.promotion.prompting import answer_mark, with_example
from tuner.promotion.samples import generate, pick_prompts, prompt_text
from tuner.spec.layout import refuse_full_disk
from tuner.spec.sweep import SweepSpec
from tuner.training.baseline import whole_eval_set
from tuner.training.evaluation import refuse_other_head, score
from tuner.training.identity import changes_of_base, identify
from tuner.training.model import load_model, load_tokenizer, load_whole, pretrained_source
from tuner.training.tokens import configure_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOM = 0.8
"""Of a GPU's free memory, what weights may take to be scored there."""


def main(job_file: str, result_file: str) -> None:
    """Do the job; standard output carries a line per step, everything that libraries say goes to standard error."""
    job = MergeJob(**json.loads(Path(job_file).read_text(encoding="utf-8")))
    steps = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(job,), daemon=True).start()
    try:  # a border: what speaks for itself is a result, anything else is a failure of this process
        result = run(job, lambda step: print(step, file=steps))
    except PromotionRefused as refusal:
        result = {"refused": refusal.reasons, "broken": refusal.broken}
    except DiskFullError as full:
        result = {"full": str(full)}
    except TunerError as error:
        result = {"refused": [str(error)], "broken": False}
    finally:
        _clear_if_orphaned(job)
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


def run(job: MergeJob, progress: Progress) -> dict[str, Any]:
    """Check, merge, save, reload, measure; one model in memory at a time.

    Returns:
        `checkpoint` (facts of the check), `base` (what identifies it), `prompting` (how to ask the model), `dtype` (of
        the saved weights), `merged` and `incumbent` (scores; None where not asked for), `reasons` (why the incumbent
        could not be measured), `samples` (prompt, before, after).
    """
    output = Path(job.output)
    facts, base = _check(job, progress)
    tokenizer = load_tokenizer(job.config["model"], Path(job.cache))
    configure_tokenizer(tokenizer, job.config["train"])
    rows = load_from_disk(str(whole_eval_set(SweepSpec.model_validate(job.spec), job.eval_fingerprint)))
    prompts = pick_prompts(rows, job.samples, tokenizer, answer_mark(job.prompting, tokenizer))
    for dtype in _dtypes(job.config):
        model = _build(job, getattr(torch, dtype), progress)
        _end_where_trained(model, tokenizer)
        refuse_full_disk(output, model.get_memory_footprint())
        progress(f"saving in {dtype}")
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        del model
        gc.collect()
        progress("measuring the merged model")
        merged = load_saved(output, job.config["model"])
        refuse_other_head(merged, rows)
        scored = score(merged, rows, job.eval_batch_size).as_dict()
        lost = lost_by_merging(scored[job.metric], job.trial_score, job.goal)
        if lost <= job.max_regression:
            break
        progress(f"merged in {dtype}, {job.metric} is {lost:.2%} worse than the trial's")
    after = generate(merged, tokenizer, prompts)
    del merged
    gc.collect()

    incumbent, reasons = _measure_incumbent(job, tokenizer, rows, progress)
    progress("asking the base for sample answers")
    base_model = load_model(job.config["model"], Path(job.cache), device_for(output))
    before = generate(base_model, tokenizer, prompts)
    return {
        "checkpoint": facts,
        "base": base,
        "prompting": with_example(job.prompting, tokenizer, prompts),
        "dtype": dtype,
        "merged": scored,
        "incumbent": incumbent,
        "reasons": reasons,
        "samples": [
            {"prompt": prompt_text(tokenizer, prompt), "before": old, "after": new}
            for prompt, old, new in zip(prompts, before, after, strict=True)
        ],
    }


def _dtypes(config: dict[str, Any]) -> list[str]:
    """The types to save in, until one loses little: a low alpha is rounded away in 16 bits, never in 32."""
    asked = config["model"]["dtype"]
    return [asked] if config["lora"] is None or asked == "float32" else [asked, "float32"]


def merge(base: PreTrainedModel, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base with the adapter merged in, each weight rounded to `dtype` once.

    PEFT adds the float32 product in place, which rounds only the sum; its `safe_merge` would round the product as well.
    What is not finite stays so, for the measurement to find.
    """
    adapted = PeftModel.from_pretrained(base, adapter)
    _untie_if_adapted(base)
    return adapted.merge_and_unload().to(dtype)


def _untie_if_adapted(model: PreTrainedModel) -> None:
    """Give embedding and head a weight each where one of them has an adapter: merged, it must not change the other."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    if isinstance(embedding, LoraLayer) or isinstance(head, LoraLayer):
        inner: Any = head.get_base_layer() if isinstance(head, LoraLayer) else head
        inner.weight = torch.nn.Parameter(inner.weight.detach().clone())
        model.config.tie_word_embeddings = False


def load_saved(folder: Path, model: dict[str, Any]) -> PreTrainedModel:
    """Load a saved model as anybody would, with plain transformers; raise TunerError unless every weight is there."""
    loaded: Any = load_whole(
        folder,
        str(folder),
        dtype="auto",
        attn_implementation=model["attn_implementation"],
        trust_remote_code=model["trust_remote_code"],
        use_safetensors=True,
    )
    return loaded.to(device_for(folder))


def device_for(folder: Path) -> str:
    """The GPU where there is one with room for the weights in this folder, else the CPU."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    has_room = torch.cuda.is_available() and weights < ROOM * torch.cuda.mem_get_info()[0]
    return "cuda" if has_room else "cpu"


def _check(job: MergeJob, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts of the checkpoint and of its base, from configs and files: no model is loaded yet."""
    progress("checking the checkpoint")
    model = job.config["model"]
    identity = identify(model)
    if changes := changes_of_base(model, identity, job.base):
        raise PromotionRefused(changes)
    source, options = pretrained_source(model, Path(job.cache))
    config = AutoConfig.from_pretrained(source, **options)
    try:
        if job.config["lora"] is None:
            facts = check_full_model(Path(job.checkpoint), config)
        else:
            facts = check_adapter(Path(job.checkpoint), config, source, model["trust_remote_code"])
    except PromotionRefused as refusal:
        raise PromotionRefused(refusal.reasons, broken=True) from refusal
    return facts, {"name": model["name"], "revision": model["revision"], "identity": identity}


def _build(job: MergeJob, dtype: torch.dtype, progress: Progress) -> PreTrainedModel:
    """The model to promote, in memory, never quantised; merged into the very weights that the trial trained on."""
    model = job.config["model"]
    if job.config["lora"] is None:
        progress("loading the trained model")
        return cast(Any, load_saved(Path(job.checkpoint), model)).to(dtype)
    progress("loading the base")
    if job.merge_into == "original":
        model = {**model, "quantization": "none"}
    # Quantised as the trial's was; what is not needs no GPU to be merged, and may be too large for one.
    quantized_on = "cuda" if model["quantization"] != "none" and torch.cuda.is_available() else "cpu"
    base: Any = load_model(model, Path(job.cache), quantized_on)
    base = base.to(dtype) if model["quantization"] == "none" else dequantized(base, dtype)
    progress("merging")
    return merge(base, Path(job.checkpoint), dtype)


def dequantized(model: Any, dtype: torch.dtype) -> Any:
    """The model with plain weights. How a file's quantised ones were read is forgotten: it could not be saved so."""
    from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize  # slow to import

    model = model.dequantize(dtype)
    ways = getattr(model, "_weight_conversions", None) or []
    of_files = (Bnb4bitDeserialize, Bnb8bitDeserialize)
    left = [way for way in ways if not any(isinstance(one, of_files) for one in getattr(way, "operations", ()))]
    model._weight_conversions = left or None
    return model


def _end_where_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have generation stop at the token that the training rows ended with, besides where the base stops."""
    settings, end = model.generation_config, tokenizer.eos_token_id
    known = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    if end not in known:
        settings.eos_token_id = [end, *(token for token in known if token is not None)]


def _measure_incumbent(
    job: MergeJob, tokenizer: PreTrainedTokenizerBase, rows: Dataset, progress: Progress
) -> tuple[dict[str, Any] | None, list[str]]:
    """Score of the promoted model on these rows; with another vocabulary they would mean nothing to it."""
    if job.incumbent is None:
        return None, []
    progress("measuring what is promoted now")
    folder = Path(job.incumbent)
    trusted = job.config["model"]["trust_remote_code"]
    if AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted).get_vocab() != tokenizer.get_vocab():
        return None, [
            f"{folder.parent.name} {folder.name} has another tokenizer: its loss per token cannot be compared"
        ]
    scored = score(load_saved(folder, job.config["model"]), rows, job.eval_batch_size)
    if not math.isfinite(scored.eval_loss):
        return None, [f"{folder.parent.name} {folder.name} scores {scored.eval_loss} on these rows: it is no measure"]
    return scored.as_dict(), []


def _end_with_parent(job: MergeJob) -> None:
    while os.getppid() == job.parent:
        time.sleep(0.5)
    _clear_if_orphaned(job)
    os._exit(1)


def _clear_if_orphaned(job: MergeJob) -> None:
    """When who asked is gone, nobody will take the result: remove what was written."""
    if os.getppid() != job.parent:
        shutil.rmtree(job.output, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
