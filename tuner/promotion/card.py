"""The model card of a promoted model, written from its manifest alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tuner.promotion.prompting import asking
from tuner.results.markdown import code, fenced, inline

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_METRIC_NAMES = {"eval_loss": "Eval loss (nats per target token)", "mean_token_accuracy": "Mean token accuracy"}


def write_card(folder: Path, manifest: dict[str, Any], samples: list[dict[str, str]]) -> None:
    """Write README.md: metadata as the hub reads it, scores, settings, and how to load the model."""
    ModelCard(f"---\n{_metadata(manifest).to_yaml()}\n---\n\n{_text(manifest, samples)}").save(folder / "README.md")


def _metadata(manifest: dict[str, Any]) -> ModelCardData:
    """Base and data set are named to the hub only where they are on it; `model_name` is what eval results hang on."""
    data = manifest["spec"]["data"]
    data_name = Path(data["path"]).name
    on_hub = _is_hub_id(data["path"])
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data["path"] if on_hub else data_name,
            dataset_name=data_name,
            dataset_revision=data["revision"],
            metric_type=metric,
            metric_name=name,
            metric_value=round(manifest["scores"]["merged"][metric], 6),
        )
        for metric, name in _METRIC_NAMES.items()
    ]
    return ModelCardData(
        model_name=f"{manifest['alias']}-{manifest['version']}",
        base_model=manifest["base"]["name"] if _is_hub_id(manifest["base"]["name"]) else None,
        datasets=data["path"] if on_hub else None,
        eval_results=results,
        metrics=list(_METRIC_NAMES),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tuner", "sft", "lora" if manifest["config"]["lora"] is not None else "full-fine-tuning"],
    )


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and Path(name).suffix not in {".json", ".jsonl", ".csv", ".parquet"}


def _text(manifest: dict[str, Any], samples: list[dict[str, str]]) -> str:
    name = manifest["base"]["name"]
    base = Path(name).name if Path(name).is_absolute() else name
    data = Path(manifest["spec"]["data"]["path"]).name
    parts = [
        f"# {manifest['alias']} {manifest['version']}",
        f"{code(base)} fine-tuned on {code(data)}: trial {manifest['trial']} "
        f"of sweep `{manifest['sweep']}`, merged and measured again after the merge.",
        _forced(manifest),
        "## Scores",
        _scores(manifest["scores"]),
        "All figures are token-weighted over the same held-out rows.",
        "## How to ask it",
        _loading(manifest["prompting"]),
        "## Hyperparameters",
        _settings(manifest["config"]),
        _answers(samples),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _forced(manifest: dict[str, Any]) -> str:
    if not manifest["forced"]:
        return ""
    return "**Promoted by force**, against the gate: " + inline("; ".join(manifest["reasons"])) + "."


def _scores(scores: dict[str, dict[str, float] | None]) -> str:
    names = {"baseline": "untuned base", "trial": "trial", "merged": "this model", "incumbent": "promoted before"}
    rows = ["| model | eval loss | mean token accuracy |", "| --- | --- | --- |"]
    for key, name in names.items():
        figures = scores[key]
        if figures is not None:
            rows.append(f"| {name} | {figures['eval_loss']:.4f} | {figures['mean_token_accuracy']:.4f} |")
    return "\n".join(rows)


def _loading(prompting: dict[str, Any]) -> str:
    said, prompt = asking(prompting)
    program = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # where this file lies, or its name on the hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")\n'
        f"{prompt}\n"
        'answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]\n'
        "print(tokenizer.decode(answer, skip_special_tokens=True))"
    )
    return f"{said}\n\n{fenced(program, 'python')}"


def _settings(config: dict[str, Any]) -> str:
    """Searched values first: they are what set this trial apart."""
    settings = dict(config["point"])
    for section in ("train", "lora"):
        for field, value in (config[section] or {}).items():
            settings.setdefault(f"{section}.{field}", value)
    rows = [
        f"| {code(key)} | {inline(value)} | {'searched' if key in config['point'] else ''} |"
        for key, value in settings.items()
    ]
    return "\n".join(["| setting | value | |", "| --- | --- | --- |", *rows])


def _answers(samples: list[dict[str, str]]) -> str:
    if not samples:
        return ""
    shown = [
        f"**Prompt**\n\n{fenced(sample['prompt'].strip())}\n\n**Base**\n\n{fenced(sample['before'].strip())}\n\n"
        f"**This model**\n\n{fenced(sample['after'].strip())}"
        for sample in samples
    ]
    return "## Sample answers\n\n" + "\n\n".join(shown)
