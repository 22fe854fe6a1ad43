"""What TRL, transformers and PEFT offer beside the plain trial: each option does what it is for, in a trial."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import load_from_disk
from peft import PeftModel
from safetensors.torch import load_file
from test_dataset import MARKED_TEMPLATE
from test_shared import Sweep, configs_for, together
from test_trial import spec_for
from transformers import AutoModelForCausalLM

from tests.made_by_hand import plant
from tuner.spec.layout import Root, Save, SweepFolder
from tuner.spec.space import resolve
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report
from tuner.training import trial
from tuner.training.baseline import prepare_sweep
from tuner.training.evaluation import score

EVALS = 5
TRAIN: dict[str, Any] = {
    "max_length": 48,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
}


LORA = {"r": 4}
GALORE = {"optim": "galore_adamw", "optim_target_modules": "all-linear", "optim_args": "rank=4"}


class CutOff(BaseException):
    """As if the machine had gone away."""


class Trial:
    """One trial of a sweep of its own, which may be begun again; its trainer is that of the last time."""

    def __init__(self, tiny_model_dir: Path, folder: Path, train: dict[str, Any], lora: Any, rows: Any):
        folder.mkdir(exist_ok=True)
        sections: dict[str, Any] = {"budget": {"trials": 4, "tokens_per_trial": EVALS * 280, "evals_per_trial": EVALS}}
        sections["space"] = {"train.weight_decay": {"type": "uniform", "low": 0, "high": 1}}  # which no trial here has
        if rows:
            (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
            sections["data"] = {"path": "own.jsonl", "eval_fraction": 0.2}
        self.spec: SweepSpec = spec_for(tiny_model_dir, folder, train=TRAIN | train, lora=lora, **sections)
        self.facts = prepare_sweep(self.spec, lambda stage, done, total: None)
        self.folder = folder
        self.checkpoints, self.root = folder / "out", Root(folder)

    def run(self, evals: int = EVALS, watch: Callable[[Any], None] = lambda trainer: None) -> list[Report]:
        """What is reported until the trial is over, or cut off; `watch` is shown the trainer before it trains.

        `new` is then what came with an adapter to save.
        """
        self.new: list[Report] = []
        reports: list[Report] = []

        def planned(*arguments: Any) -> Any:
            plan = plan_trial(*arguments)
            self.trainer = plan.trainer
            watch(plan.trainer)
            return plan

        def emit(report: Report, save: Save | None) -> None:
            reports.append(report)
            if save is not None:
                save(self.adapter(report))
                self.new.append(report)
            if len(reports) == evals < EVALS:
                raise CutOff

        plan_trial = trial.plan_trial
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trial, "plan_trial", planned)
            try:
                config = resolve(self.spec, 0, {})
                trial.run_trial(self.spec, config, self.facts, self.checkpoints, emit, self.root)
            except CutOff:
                assert len(reports) == evals
        return reports

    def adapter(self, report: Report) -> Path:
        return self.folder / f"tokens-{report.tokens}"


@pytest.fixture
def trial_of(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Trial]:
    """A trial with these fields of `train` and `lora`, over rows of its own or those of test_trial.py."""

    def make(name: str = "a", lora: Any = LORA, rows: Any = None, **train: Any) -> Trial:
        return Trial(tiny_model_dir, tmp_path / name, train, lora, rows)

    return make


FIGURES = ("tokens", "trained_tokens", "step", "epoch", "train_loss", "eval_loss", "learning_rate", "grad_norm")


def difference(some: list[Report], others: list[Report], figures: tuple[str, ...] = FIGURES) -> float:
    return max(abs(getattr(a, name) - getattr(b, name)) for a, b in zip(some, others, strict=True) for name in figures)


def base_model(tiny_model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def rescored(model: Any, one: Trial) -> float:
    """The loss of a model on the trial's evaluation set."""
    return score(model, load_from_disk(str(SweepFolder.of(one.spec).eval_rows))).eval_loss


@pytest.mark.parametrize(
    ("train", "lora"),
    [
        (
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine"},
            {"r": 4, "lora_dropout": 0.2},
        ),
        ({"optim": "adamw_8bit", "neftune_noise_alpha": 5, "packing": "bfd"}, {"r": 64, "use_dora": True}),
        ({"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}, {"r": 4}),
        ({"optim": "adafactor", "learning_rate": 1e-3}, None),
    ],
    ids=str,
)
def test_a_trial_that_is_cut_off_goes_on_as_if_it_had_not_been(train, lora, trial_of):
    """Optimizer, schedule, random numbers, position in the second epoch, and the totals of the reports."""
    whole = trial_of("whole", lora, **train).run()
    again = trial_of("again", lora, **train)
    before = again.run(evals=4)  # in the second epoch
    assert before[-1].epoch > 1
    assert [folder.name for folder in again.checkpoints.glob("checkpoint-*")] == [f"checkpoint-{before[-1].step}"]
    after = again.run()
    assert after[:4] == before  # once more: nobody knows which were heard
    assert again.new == after[3:]
    assert difference(after, whole) < 1e-5
    assert [report.duration_s for report in after] == sorted(report.duration_s for report in after)


def test_a_checkpoint_that_is_not_whole_is_not_gone_on_from(trial_of):
    again = trial_of()
    (before,) = again.run(evals=1)
    (again.checkpoints / f"checkpoint-{before.step}" / "report.json").unlink()
    assert difference(again.run(evals=1), [before]) == 0


@pytest.mark.parametrize("file", ["optimizer.pt", "adapter_model.safetensors", "report.json"])
def test_a_checkpoint_that_was_damaged_is_not_gone_on_from_but_replaced(file, trial_of, capfd):
    again = trial_of()
    (before,) = again.run(evals=1)
    damaged = again.checkpoints / f"checkpoint-{before.step}" / file
    damaged.write_bytes(damaged.read_bytes()[:-1] if file != "report.json" else b"{")
    assert difference(again.run(evals=1), [before]) == 0
    assert f"is damaged ({file}): the trial begins again" in capfd.readouterr().out
    assert again.run(evals=2)[0].tokens == before.tokens
    assert "begins again" not in capfd.readouterr().out


def test_a_pickle_in_a_checkpoint_runs_nothing(trial_of, tmp_path):
    again, mark = trial_of(), tmp_path / "mark"
    (report,) = again.run(evals=1)
    checkpoint = again.checkpoints / f"checkpoint-{report.step}"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin"):
        file = checkpoint / name
        before = file.read_bytes() if file.exists() else None
        plant(file, mark)
        with suppress(pickle.UnpicklingError):
            again.run(evals=1)
        assert not mark.exists(), name
        file.write_bytes(before) if before else file.unlink()


def test_a_trial_whose_root_is_an_object_store_goes_on_on_another_node(trial_of, s3_root):
    again = trial_of()
    again.root = Root.at(s3_root)
    folder = again.root.sweep("one-trial")
    again.checkpoints = folder.trial_checkpoints(0)
    assert not folder.goes_on(0)
    before = again.run(evals=2)
    shutil.rmtree(again.root.path)
    assert folder.goes_on(0)
    after = again.run(evals=3)
    assert [report.tokens for report in after] == [before[0].tokens * evals for evals in (1, 2, 3)]
    assert again.root.names(again.checkpoints) == [f"checkpoint-{after[-1].step}"]
    folder.root.forget(again.checkpoints)
    assert not folder.goes_on(0)


def test_a_trial_whose_optimizer_no_checkpoint_holds_begins_again(trial_of):
    again = trial_of(lora=None, **GALORE)
    before = again.run(evals=1)
    assert difference(again.run(evals=1), before) < 1e-5


def test_activation_checkpointing_keeps_less_and_computes_again(trial_of):
    """Half of the passes through a layer are made for the backward pass; no loss is another for it."""
    figures = []
    for checkpointing in (False, True):
        kept, passes = [], []
        one = trial_of(f"{checkpointing}", gradient_checkpointing=checkpointing)

        def watch(trainer: Any, kept: list[int] = kept, passes: list[bool] = passes) -> None:
            layers = trainer.model.get_base_model().model
            forward = layers.forward

            def watched(*arguments: Any, **keywords: Any) -> Any:
                with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
                    return forward(*arguments, **keywords)

            layers.forward = watched
            layers.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: passes.append(module.training))

        reports = one.run(evals=2, watch=watch)
        figures.append((reports, sum(kept), sum(passes) / reports[-1].step))
    (plain, kept_plain, passes_plain), (again, kept_again, passes_again) = figures
    assert difference(again, plain) < 1e-5
    assert kept_again < 0.7 * kept_plain
    assert (passes_plain, passes_again) == (1, 2)


def test_neftune_adds_noise_of_its_size_in_training_and_none_in_evaluation(trial_of):
    noises: dict[bool, list[float]] = {True: [], False: []}

    def watch(trainer: Any) -> None:
        model = trainer.model.get_base_model().model
        seen: list[torch.Tensor] = []
        model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

        def compare(module: Any, inputs: Any, keywords: dict[str, Any]) -> None:
            hidden = inputs[0] if inputs else keywords["hidden_states"]
            noise = hidden.detach() - F.embedding(seen.pop(), model.embed_tokens.weight.detach())
            bound = 5 / math.sqrt(hidden.shape[1] * hidden.shape[2])
            noises[module.training].append((noise.abs().max() / bound).item())

        model.layers[0].register_forward_pre_hook(compare, with_kwargs=True)

    trial_of(neftune_noise_alpha=5).run(evals=2, watch=watch)
    assert all(0.9 < noise <= 1 for noise in noises[True])
    assert noises[False]
    assert not any(noises[False])


def test_rslora_scales_by_the_root_of_the_rank_in_training_and_in_the_saved_adapter(trial_of, tiny_model_dir):
    one = trial_of(lora={"r": 4, "lora_alpha": 16, "use_rslora": True})
    (report,) = one.run(evals=1)
    saved = PeftModel.from_pretrained(base_model(tiny_model_dir), one.adapter(report))
    for model in (one.trainer.model, saved):
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == 16 / math.sqrt(4)
    assert rescored(saved, one) == pytest.approx(report.eval_loss, abs=1e-6)


def test_dora_trains_magnitudes_saves_them_and_merges_them(trial_of, tiny_model_dir):
    one = trial_of(lora={"r": 4, "use_dora": True})
    (report,) = one.run(evals=1)
    base = base_model(tiny_model_dir)
    weights = load_file(one.adapter(report) / "adapter_model.safetensors")
    magnitudes = {name: value for name, value in weights.items() if "magnitude" in name}
    assert len(magnitudes) == 14  # of every linear layer
    for name, value in magnitudes.items():
        layer = base.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector"))
        assert not torch.allclose(value, layer.weight.norm(dim=1), atol=1e-5), name
    merged = PeftModel.from_pretrained(base, one.adapter(report)).merge_and_unload()
    assert rescored(merged, one) == pytest.approx(report.eval_loss, abs=1e-5)


SCHEDULES: list[tuple[dict[str, Any], Callable[[int, int], float]]] = [
    ({"lr_scheduler_type": "cosine"}, lambda done, steps: (1 + math.cos(math.pi * done / steps)) / 2),
    (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 4},
        lambda done, steps: done / 4 if done < 4 else 0.55 + 0.45 * math.cos(math.pi * (done - 4) / (steps - 4)),
    ),
    (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0}},
        lambda done, steps: (1 - done / steps) ** 2,
    ),
]


@pytest.mark.parametrize(("train", "share"), SCHEDULES, ids=[train["lr_scheduler_type"] for train, _ in SCHEDULES])
def test_the_learning_rate_follows_its_schedule_to_the_end_of_the_budget(train, share, trial_of):
    reports = trial_of(**train).run()
    steps = reports[-1].step
    expected = [TRAIN["learning_rate"] * share(report.step - 1, steps) for report in reports]
    assert [report.learning_rate for report in reports] == pytest.approx(expected, rel=1e-6)


def test_eight_bit_optimizers_hold_their_state_in_eight_bits(trial_of):
    """Of tensors of 4,096 numbers and more; bitsandbytes keeps the moments of smaller ones in float32."""
    one = trial_of(lora={"r": 64}, optim="adamw_8bit")
    reports = one.run(evals=2)
    state = one.trainer.optimizer.optimizer.state
    kept = {state[weight]["state1"].dtype for weight in state if weight.numel() >= 4096}
    assert kept == {torch.uint8}
    whole = trial_of("whole", lora={"r": 64}).run(evals=2)
    assert 0 < difference(reports, whole, ("eval_loss",)) < 0.05


@pytest.mark.gpu
def test_paged_optimizers_hold_their_state_in_pages(trial_of):
    one = trial_of(lora={"r": 64}, optim="paged_adamw_8bit")
    one.run(evals=1)
    states = one.trainer.optimizer.optimizer.state.values()
    assert any(getattr(state["state1"], "is_paged", False) for state in states)


def test_galore_holds_the_moments_of_projected_gradients(trial_of):
    one = trial_of(lora=None, learning_rate=1e-3, **GALORE)
    (report,) = one.run(evals=1)
    q_proj = one.trainer.model.model.layers[0].self_attn.q_proj.weight
    assert q_proj.shape == (64, 64)
    assert one.trainer.optimizer.optimizer.state[q_proj]["exp_avg"].shape in ((4, 64), (64, 4))
    assert report.eval_loss < one.facts.baseline["eval_loss"] - 0.05


def test_a_schedule_free_optimizer_is_scored_and_saved_at_the_weights_that_it_has_found(trial_of, tiny_model_dir):
    """It trains at others, between those and its fast iterate."""
    one = trial_of(optim="schedule_free_adamw", lr_scheduler_type="constant")
    (report,) = one.run(evals=1)
    saved = PeftModel.from_pretrained(base_model(tiny_model_dir), one.adapter(report))
    assert rescored(saved, one) == pytest.approx(report.eval_loss, abs=1e-6)
    one.trainer.optimizer.train()
    assert rescored(one.trainer.model, one) != pytest.approx(report.eval_loss, abs=1e-4)


def test_a_compiled_model_is_the_one_that_trains_and_leaves_no_trace_in_scores_and_adapters(trial_of):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    packed = {"packing": "wrapped", "max_length": 32}  # rows of one length: fewer shapes to compile
    one = trial_of(torch_compile=True, torch_compile_backend="eager", **packed)
    reports = one.run(evals=2)
    assert isinstance(one.trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plain = trial_of("plain", **packed)
    assert difference(reports, plain.run(evals=2)) < 1e-4
    keys = [load_file(trial.adapter(reports[-1]) / "adapter_model.safetensors").keys() for trial in (one, plain)]
    assert keys[0] == keys[1]


@pytest.mark.gpu
def test_liger_takes_the_place_of_the_layers_and_trains_the_same(trial_of):
    one = trial_of(use_liger_kernel=True)
    reports = one.run(evals=2)
    layer = one.trainer.model.get_base_model().model.layers[0]
    assert "liger_kernel" in layer.input_layernorm.forward.__func__.__module__
    assert difference(reports, trial_of("plain").run(evals=2), ("eval_loss",)) < 1e-3


def test_with_assistant_only_loss_the_assistant_alone_is_learned_and_scored_and_all_tokens_are_counted(
    trial_of, tmp_path
):
    said = [["It is four."], ["It is four.", "That is six."]]
    rows = [
        {
            "messages": [
                {"role": role, "content": content}
                for answer in said[i % 2]
                for role, content in (("user", f"What is {i} plus {i}?"), ("assistant", answer))
            ]
        }
        for i in range(60)
    ]
    template = tmp_path / "chat.jinja"
    template.write_text(MARKED_TEMPLATE)
    one = trial_of(rows=rows, assistant_only_loss=True, chat_template_path=str(template))
    batches: list[dict[str, torch.Tensor]] = []

    def watch(trainer: Any) -> None:
        compute_loss = trainer.compute_loss

        def watched(model: Any, inputs: dict[str, torch.Tensor], *rest: Any, **keywords: Any) -> Any:
            batches.append({name: inputs[name].clone() for name in ("labels", "attention_mask")})
            return compute_loss(model, inputs, *rest, **keywords)

        trainer.compute_loss = watched

    (report,) = one.run(evals=1, watch=watch)
    tokenizer = one.trainer.processing_class
    learned = "".join(
        tokenizer.decode(label) if label != -100 else "|" for batch in batches for label in batch["labels"].flatten()
    )
    assert {part.strip() for part in learned.replace(tokenizer.eos_token, "").split("|")} == {"", *said[1]}
    assert report.trained_tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    labels = load_from_disk(str(SweepFolder.of(one.spec).eval_rows))["labels"]
    assert one.facts.baseline["tokens"] == sum(label != -100 for row in labels for label in row[1:])


def test_neftune_on_a_shared_base_is_in_the_training_alone(tiny_model_dir, tmp_path):
    sweep = Sweep(tiny_model_dir, tmp_path)
    variants = [{"train": {"learning_rate": 1e-9, "neftune_noise_alpha": alpha}, "lora": {}} for alpha in (None, 100)]
    engine = sweep.engine()
    try:
        reports = together(engine, configs_for(sweep.spec, variants))
    finally:
        engine.close()
    assert difference(reports[0], reports[1], ("eval_loss",)) < 1e-5
    assert min(abs(a.train_loss - b.train_loss) for a, b in zip(reports[0], reports[1], strict=True)) > 1e-3


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("asked", [True, False])
def test_a_shared_base_is_checkpointed_as_asked_under_either_name(name, asked, tiny_model_dir, tmp_path):
    sweep = Sweep(tiny_model_dir, tmp_path, train={"per_device_train_batch_size": 2, name: asked})
    engine = sweep.engine()
    try:
        assert any(module.gradient_checkpointing for module in engine.lanes[0].joint.model.model.layers) == asked
    finally:
        engine.close()
