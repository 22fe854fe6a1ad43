"""Promotion end to end: real adapters, real merges in fresh processes, and an alias that moves only for the better."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import load_from_disk
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.promotion.conftest import Trial, make_report, make_spec, make_trial, sweep_folder
from tuner.errors import PromotionRefused, TunerError
from tuner.promotion.promote import Promotion, promote
from tuner.promotion.registry import current, history, rollback, versions
from tuner.spec.layout import Root
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report
from tuner.training.eval_set import fingerprint
from tuner.training.evaluation import score
from tuner.training.identity import identify

BASELINE = {"eval_loss": 50.0, "mean_token_accuracy": 0.0}
Measure = Callable[..., dict[str, float]]


@dataclass(frozen=True)
class Stage:
    """A storage root and what every promotion into it has in common."""

    root: Path
    model: Path
    eval_rows: Path

    def promote(self, report: Report, trial: Trial | None = None, **arguments: Any) -> Promotion:
        spec = arguments.pop("spec", None) or self.spec()
        defaults = {
            "baseline": BASELINE,
            "base": identify(spec.model.model_dump()),
            "eval_fingerprint": fingerprint(load_from_disk(str(self.eval_rows))),
            "data_fingerprint": "data-1",
            "prompting": {"kind": "prompt"},
            "sweep_folder": sweep_folder(self.root),
        }
        trial = trial or make_trial(spec, {})
        if not sweep_folder(self.root).eval_rows.exists():
            shutil.copytree(self.eval_rows, sweep_folder(self.root).eval_rows)
        if report.adapter_path is not None:
            adapter = sweep_folder(self.root).adapter(trial.number, report.tokens)
            shutil.rmtree(adapter, ignore_errors=True)
            shutil.copytree(report.adapter_path, adapter)
        return promote(spec, trial, report, **{**defaults, **arguments})

    def spec(self) -> SweepSpec:
        return make_spec(self.model, self.root)

    def current(self) -> str | None:
        version = current(Root(self.root), "production")
        return version.name if version else None

    def leftovers(self) -> list[str]:
        """Whatever stands beside the alias but versions, link, history and lock."""
        known = {"current", "history.jsonl", ".lock", *(v.name for v in versions(Root(self.root), "production"))}
        return [path.name for path in (self.root / "models" / "production").iterdir() if path.name not in known]


@pytest.fixture(scope="module")
def good(make_adapter: Callable[..., Path], measure: Measure) -> Report:
    adapter = make_adapter(seed=1)
    return make_report(adapter, **_metrics(measure(adapter)))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, eval_rows: Path, good: Report) -> Any:
    """A root in which one adapter is promoted, that promotion, the steps it announced, and what it asked of the hub."""
    stage = Stage(tmp_path_factory.mktemp("root"), tiny_model_dir, eval_rows)
    steps: list[str] = []
    calls: list[Any] = []

    class Hub:
        def create_repo(self, repository: str, **options: Any) -> None:
            calls.append((repository, options))

        def upload_folder(self, **options: Any) -> str:
            calls.append(sorted(file.name for file in Path(options["folder_path"]).iterdir()))
            return f"https://huggingface.co/{options['repo_id']}"

    template = stage.root / "template.jinja"
    template.write_text("{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}")
    trial = make_trial(stage.spec(), {}, chat_template_path=str(template), eos_token="<|endoftext|>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi", Hub)
        promotion = stage.promote(good, trial, progress=steps.append, push_to_hub="me/pydoc")
    return stage, promotion, steps, calls


@pytest.fixture
def stage(first: Any, tmp_path: Path) -> Stage:
    """A copy of that root."""
    shutil.copytree(first[0].root, tmp_path / "root", symlinks=True)
    return replace(first[0], root=tmp_path / "root")


def rewrite(stage: Stage, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of v1."""
    path = stage.root / "models/production/v1/manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def promoted_on_other_rows(stage: Stage) -> None:
    rewrite(stage, lambda manifest: manifest.update(eval_fingerprint="other rows"))


def _metrics(scores: dict[str, float]) -> dict[str, float]:
    return {metric: scores[metric] for metric in BASELINE}


def test_a_promotion_says_what_was_measured_before_and_after(first, good):
    stage, promotion, steps, _ = first
    assert (promotion.alias, promotion.version, promotion.trial) == ("production", "v1", 3)
    assert promotion.score_before == good.eval_loss
    assert promotion.score_after == pytest.approx(good.eval_loss, abs=1e-5)
    assert promotion.score_after != promotion.baseline == BASELINE["eval_loss"]
    assert (promotion.incumbent, promotion.forced, promotion.reasons) == (None, False, ())
    assert len(promotion.samples) == 2
    assert promotion.samples[0]["prompt"] == "What does function 0 return?"
    assert promotion.samples[0]["before"] != promotion.samples[0]["after"]
    assert steps[0] == "checking the checkpoint"
    assert "measuring the merged model" in steps
    assert stage.leftovers() == []


def test_the_manifest_tells_where_the_model_comes_from_and_holds_no_secret(first, good, tiny_model_dir, eval_rows):
    path = first[1].path
    manifest = json.loads((path / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("sweep", "trial", "version", "previous", "forced", "reasons")} == {
        "sweep": "tiny",
        "trial": 3,
        "version": "v1",
        "previous": None,
        "forced": False,
        "reasons": [],
    }
    assert manifest["data_fingerprint"] == "data-1"
    assert manifest["eval_fingerprint"] == fingerprint(load_from_disk(str(eval_rows)))
    assert manifest["config"]["train"]["learning_rate"] == 2e-4
    assert manifest["spec"]["budget"]["tokens_per_trial"] == 100
    assert manifest["base"]["name"] == str(tiny_model_dir)
    assert manifest["scores"]["trial"]["eval_loss"] == good.eval_loss
    assert manifest["scores"]["merged"]["eval_loss"] == first[1].score_after
    assert manifest["scores"]["baseline"] == BASELINE
    assert manifest["libraries"]["peft"].count(".") == 2
    digest = subprocess.check_output(["sha256sum", str(path / "model.safetensors")], text=True).split()[0]
    assert manifest["sha256"] == {"model.safetensors": digest}
    assert "secret" not in (path / "manifest.json").read_text() + (path / "README.md").read_text()


def test_no_pickle_is_among_the_files(first):
    names = {file.name for file in first[1].path.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_the_card_is_read_by_the_hub_library_with_its_scores(first):
    card = ModelCard.load(first[1].path / "README.md")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["Eval loss (nats per target token)"] == pytest.approx(first[1].score_after, abs=1e-5)
    assert card.data.eval_results[0].dataset_name == "questions.jsonl"
    assert card.data.base_model is None, "a local folder is no model id on the hub"
    assert card.data.library_name == "transformers"
    assert "| `train.learning_rate` | 0.0002 | searched |" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    assert first[1].samples[0]["after"][:20] in card.text


def test_the_promoted_folder_loads_with_plain_transformers_in_a_process_without_tuner(first):
    program = (
        "import sys, json\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('tuner', 'peft')]\n"
        "print(json.dumps([type(model).__name__, text, tokenizer.eos_token, model.generation_config.eos_token_id]))"
    )
    link = first[1].path.parent / "current"
    output = subprocess.run([sys.executable, "-c", program, str(link)], capture_output=True, text=True, check=True)
    name, text, end, ends = json.loads(output.stdout.splitlines()[-1])
    assert name == "LlamaForCausalLM"
    assert text == "[user] Hi\n", "the template that the trial was trained with"
    assert end == "<|endoftext|>", "the token that its rows ended with"
    assert ends == [0, 2], "generation stops there, and where the base stops"


def test_a_truncated_adapter_is_refused_even_by_force_and_the_alias_stays(stage, good, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(good.adapter_path, adapter)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(PromotionRefused, match="damaged or cut short"):
        stage.promote(replace(good, adapter_path=str(adapter)), force=True)
    assert stage.current() == "v1"
    assert stage.leftovers() == []


def test_no_score_is_compared_on_an_evaluation_set_that_is_not_what_it_was(stage, good):
    """The data are gone, too, so that it cannot be made again."""
    rows = sweep_folder(stage.root).eval_rows
    load_from_disk(str(rows)).select(range(2)).save_to_disk(str(rows.with_name("cut")))
    shutil.rmtree(rows)
    rows.with_name("cut").rename(rows)
    steps: list[str] = []
    with pytest.raises(
        PromotionRefused, match=r"its 2 rows are not those .* nor can it be made again from /data/quest"
    ):
        stage.promote(good, force=True, progress=steps.append)
    assert steps == ["checking the checkpoint"]
    assert stage.current() == "v1"
    assert stage.leftovers() == []


def test_a_trial_without_a_checkpoint_is_refused(stage, good):
    with pytest.raises(PromotionRefused, match="the adapter of trial 3 was not kept"):
        stage.promote(replace(good, adapter_path=None))


def test_an_adapter_is_not_merged_into_a_base_that_has_changed(stage, good):
    then = identify(stage.spec().model.model_dump()) | {"model.safetensors": "0" * 64}
    with pytest.raises(PromotionRefused, match=r"has changed since the sweep began: model\.safetensors$"):
        stage.promote(good, base=then, force=True)
    assert stage.leftovers() == []


def test_a_merge_that_got_worse_is_refused_and_the_alias_stays_unless_forced_on_record(stage, good, make_adapter):
    swapped = replace(good, adapter_path=str(make_adapter(seed=2)), eval_loss=0.9 * good.eval_loss)
    with pytest.raises(PromotionRefused) as refused:
        stage.promote(swapped)
    assert any("the merge made it worse" in reason for reason in refused.value.reasons)
    assert stage.current() == "v1"
    assert stage.leftovers() == []

    promotion = stage.promote(swapped, force=True)
    assert stage.current() == promotion.version == "v2"
    assert promotion.forced
    assert "the merge made it worse" in promotion.reasons[0]
    manifest = json.loads((promotion.path / "manifest.json").read_text())
    assert (manifest["forced"], manifest["previous"]) == (True, "v1")
    assert manifest["reasons"] == list(promotion.reasons)
    assert history(Root(stage.root), "production")[-1]["reasons"] == list(promotion.reasons)
    assert "Promoted by force" in (promotion.path / "README.md").read_text()
    rollback(Root(stage.root), "production")
    assert stage.current() == "v1"


def test_where_rounding_to_bfloat16_costs_too_much_the_model_is_merged_in_float32(stage, make_adapter):
    """The trial's score is that of the unrounded sum, so that rounding is all that can be lost."""
    adapter = make_adapter(seed=6, size=0.005)  # rounded, it scores worse; others happen to gain
    base = AutoModelForCausalLM.from_pretrained(stage.model, dtype=torch.bfloat16).float()
    exact = score(PeftModel.from_pretrained(base, adapter), load_from_disk(str(stage.eval_rows))).as_dict()
    report = make_report(adapter, **_metrics(exact))
    for allowed, dtype in ((0.01, "bfloat16"), (1e-6, "float32")):
        spec = make_spec(stage.model, stage.root, dtype="bfloat16", max_regression=allowed)
        promotion = stage.promote(report, make_trial(spec, {}), spec=spec, alias=dtype)
        assert json.loads((promotion.path / "manifest.json").read_text())["dtype"] == dtype
        loaded = AutoModelForCausalLM.from_pretrained(promotion.path, dtype="auto")
        assert {weight.dtype for weight in loaded.parameters()} == {getattr(torch, dtype)}
        assert (promotion.score_after == pytest.approx(exact["eval_loss"], rel=1e-6)) is (dtype == "float32")


def test_a_trial_no_better_than_what_is_promoted_is_refused(stage, good):
    with pytest.raises(PromotionRefused, match="not better than what is promoted now"):
        stage.promote(good)
    assert stage.current() == "v1"


def test_a_model_promoted_on_other_rows_is_measured_again_on_these(stage, good, make_adapter, measure):
    """The manifest's figure is made unbeatable: only a new measurement lets the better adapter pass."""
    rewrite(stage, lambda manifest: manifest["scores"]["merged"].update(eval_loss=0.0))
    promoted_on_other_rows(stage)
    candidates = [make_adapter(seed=seed) for seed in range(10, 16)]
    better = min(candidates, key=lambda adapter: measure(adapter)["eval_loss"])
    scores = measure(better)
    assert scores["eval_loss"] < good.eval_loss - 1e-3
    report = make_report(better, **_metrics(scores))

    promotion = stage.promote(report)
    assert promotion.incumbent == pytest.approx(good.eval_loss, abs=1e-5)
    assert stage.current() == "v2"


def test_a_promoted_model_with_another_tokenizer_cannot_be_compared(stage, good):
    promoted_on_other_rows(stage)
    path = stage.root / "models/production/v1/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    words = [word for word in vocabulary if word.startswith("Ġz")][:2]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    path.write_text(json.dumps(content))
    with pytest.raises(PromotionRefused, match="production v1 has another tokenizer"):
        stage.promote(good)
    assert stage.current() == "v1"


def test_a_fully_fine_tuned_model_is_measured_again_and_promoted(stage, tiny_model_dir, measure, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.nn.init.normal_(model.model.norm.weight, mean=1.0, std=0.1)
    model.save_pretrained(tmp_path / "checkpoint")
    scores = measure(None, tmp_path / "checkpoint")
    report = make_report(tmp_path / "checkpoint", **_metrics(scores))
    promotion = stage.promote(report, make_trial(stage.spec(), lora=None), alias="full")
    assert promotion.path == stage.root / "models/full/v1"
    assert promotion.score_after == pytest.approx(scores["eval_loss"], abs=1e-6)
    saved = AutoModelForCausalLM.from_pretrained(promotion.path).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())
    assert stage.current() == "v1"


def test_figures_that_are_not_finite_are_refused_before_the_merge_even_by_force(stage, good):
    with pytest.raises(PromotionRefused, match="eval_loss of the trial is nan"):
        stage.promote(replace(good, eval_loss=float("nan")), force=True)
    with pytest.raises(PromotionRefused, match="eval_loss of the untuned base is None"):
        stage.promote(good, baseline={"mean_token_accuracy": 0.0}, force=True)
    assert stage.leftovers() == []


def test_a_merged_model_whose_score_is_not_finite_cannot_be_forced(stage, good, make_adapter):
    with pytest.raises(PromotionRefused, match="eval_loss of the merged model is nan"):
        stage.promote(replace(good, adapter_path=str(make_adapter(size=1e37))), force=True)
    assert stage.current() == "v1"
    assert stage.leftovers() == []


def test_a_merge_process_that_fails_shows_the_end_of_its_log(stage, good, tmp_path):
    with pytest.raises(TunerError) as failed:
        replace(stage, model=tmp_path / "no-such-base").promote(good)
    assert not isinstance(failed.value, PromotionRefused)
    assert "the merge process ended with exit code 1" in str(failed.value)
    assert "no-such-base" in str(failed.value)
    assert str(sweep_folder(stage.root).path / "promotion.log") in str(failed.value)
    assert stage.current() == "v1"
    assert stage.leftovers() == []


def asker_of(stage: Stage, report: Report, folder: Path, program: str, stderr: int | None = None) -> Any:
    """A process of its own that runs a program with this `stage` and `report`."""
    arguments = folder / "arguments.json"
    arguments.write_text(json.dumps([str(stage.model), str(stage.root), str(stage.eval_rows), report.as_dict()]))
    prologue = (
        "import sys, json; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.promotion.test_promote import Stage; from tuner.spec.trial import Report\n"
        "model, root, rows, report = json.loads(Path(sys.argv[1]).read_text())\n"
        "stage = Stage(Path(root), Path(model), Path(rows))\n"
    )
    command = [sys.executable, "-c", prologue + program, str(arguments), str(Path(__file__).parents[2])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


@pytest.mark.timeout(120)
def test_the_merge_process_ends_with_who_asked_and_leaves_nothing(stage, good, tmp_path):
    """Who asks is killed as soon as the merged model is saved; the lock is free at once, the files are gone soon."""
    program = "stage.promote(Report.from_dict(report), progress=lambda step: print(step, flush=True))"
    with asker_of(stage, good, tmp_path, program) as asker:
        assert asker.stdout is not None
        assert any(line == "measuring the merged model\n" for line in asker.stdout)
        (working,) = [stage.root / "models/production" / name for name in stage.leftovers()]
        assert (working / "model" / "model.safetensors").is_file()
        os.kill(asker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (working / "model").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not (working / "model").exists()
    assert stage.current() == "v1"


@pytest.mark.timeout(120, func_only=True)
def test_a_promotion_that_is_terminated_ends_its_merge_leaves_nothing_and_says_how_to_go_on(stage, good, tmp_path):
    program = (
        "from tuner.cli.commands import _interruptible\n"
        "with _interruptible('promote tiny 3', root):\n"
        "    stage.promote(Report.from_dict(report))"
    )
    with asker_of(stage, good, tmp_path, program, stderr=subprocess.PIPE) as asker:
        merges: list[psutil.Process] = []
        while not merges and asker.poll() is None:
            time.sleep(0.1)
            children = psutil.Process(asker.pid).children()
            merges = [one for one in children if "tuner.promotion.merge" in one.cmdline()]
        asker.terminate()
        _, said = asker.communicate(timeout=60)
    assert merges, said
    assert psutil.wait_procs(merges, timeout=10)[1] == []
    assert "interrupted; what was promoted before stays\n" in said
    assert f" promote tiny 3 --root {stage.root}\n" in said
    assert stage.leftovers() == []
    assert stage.current() == "v1"


def test_the_folder_is_uploaded_as_it_is_to_a_private_repository(first):
    _, promotion, _, calls = first
    assert promotion.pushed_to == "https://huggingface.co/me/pydoc"
    assert calls[0] == ("me/pydoc", {"private": True, "exist_ok": True})
    assert calls[1] == sorted(file.name for file in promotion.path.iterdir())
