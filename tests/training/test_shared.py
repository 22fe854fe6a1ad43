"""The contract of the shared base: a slot gives what its trial gives alone, whoever its neighbours are."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tuner.errors import InfeasibleError, NotShareable, TunerError
from tuner.spec.layout import SweepFolder
from tuner.spec.load import parse_spec
from tuner.spec.space import resolve
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report, TrialConfig, milestones
from tuner.training.baseline import Preparation, prepare_sweep
from tuner.training.model import load_model
from tuner.training.shared import head, lane, planner
from tuner.training.shared.engine import Engine
from tuner.training.shared.joint import JointModel, Layout, MicroBatch, why_not_joint
from tuner.training.shared.planner import memory_per_slot, plan_slots, typical_step
from tuner.training.trial import run_trial

TOKENS, EVALS = 2400, 12

VARIANTS: list[dict[str, Any]] = [
    # packing none; two rows a step; a constant rate
    {"train": {"packing": "none", "learning_rate": 4e-3, "lr_scheduler_type": "constant"}, "lora": {"r": 4}},
    # padding-free packing, accumulation, another seed, schedule and warm-up; rsLoRA on some layers only
    {
        "train": {
            "packing": "bfd",
            "max_length": 32,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 5,
            "gradient_accumulation_steps": 2,
            "weight_decay": 0.1,
            "seed": 7,
        },
        "lora": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    },
    # wrapped packing, one row a step, tight clipping, other betas
    {
        "train": {
            "packing": "wrapped",
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 1,
            "max_grad_norm": 0.1,
            "adam_beta2": 0.95,
            "seed": 1,
        },
        "lora": {"r": 16, "lora_alpha": 32},
    },
    {"train": {"packing": "bfd_split", "max_length": 40, "learning_rate": 1e-3}, "lora": {"r": 3}},
]


def spec_for(tiny_model_dir: Path, folder: Path, **changes: Any) -> SweepSpec:
    rows = [
        {"prompt": f"What is {i} plus {j}?", "completion": f" It is {i + j}, of course." * (1 + j % 4)}
        for i in range(12)
        for j in range(8)
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    values: dict[str, Any] = {
        "name": "slots",
        "model": {"name": str(tiny_model_dir), "dtype": "float32"},
        "data": {"path": "rows.jsonl", "eval_fraction": 0.2},
        "train": {"per_device_train_batch_size": 2, "gradient_checkpointing": False},
        "space": {"train.max_length": {"type": "choice", "values": [32, 40, 48]}},
        "budget": {"trials": 4, "tokens_per_trial": TOKENS, "evals_per_trial": EVALS},
        "stopping": {"type": "none"},
        "storage": {"root": str(folder / "runs")},
    }
    return parse_spec(values | changes, folder)


def configs_for(spec: SweepSpec, variants: list[dict[str, Any]] = VARIANTS) -> list[TrialConfig]:
    configs = [resolve(spec, number, {"train.max_length": 48}) for number in range(len(variants))]
    for config, variant in zip(configs, variants, strict=True):
        config["train"] |= variant["train"]
        config["lora"] = {**(config["lora"] or {}), **variant["lora"]}
    return configs


class Sweep:
    """A prepared sweep on the tiny model, and an engine when one is asked for."""

    def __init__(self, tiny_model_dir: Path, folder: Path, **changes: Any):
        self.folder = folder
        self.spec = spec_for(tiny_model_dir, folder, **changes)
        self.facts: Preparation = prepare_sweep(self.spec, lambda stage, done, total: None)

    def alone(self, config: TrialConfig) -> list[Report]:
        reports: list[Report] = []
        with tempfile.TemporaryDirectory() as output:  # it would go on from what another left there
            run_trial(self.spec, config, self.facts, Path(output), lambda report, save: reports.append(report))
        return reports

    def engine(self, lanes: int = 1) -> Engine:
        base = load_model(self.spec.model.model_dump(), self.folder / "cache")
        return Engine(self.spec, base, self.facts, self.sweep_folder.eval_rows, lanes)

    def state(self, number: int) -> Path:
        return self.sweep_folder.trial_state(number)

    @property
    def sweep_folder(self) -> SweepFolder:
        return SweepFolder.of(self.spec)


@pytest.fixture(scope="module")
def sweep(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return Sweep(tiny_model_dir, tmp_path_factory.mktemp("slots"))


@pytest.fixture(scope="module")
def alone(sweep: Sweep) -> list[list[Report]]:
    """What each of the variants reports as a trial of its own."""
    return [sweep.alone(config) for config in configs_for(sweep.spec)]


@pytest.fixture
def engine(sweep: Sweep) -> Iterator[Engine]:
    engine = sweep.engine()
    yield engine
    engine.close()


def drive(engine: Engine, config: TrialConfig, into: dict[int, list[Report]], evals: int = EVALS) -> None:
    engine.attach(config)
    for milestone in milestones(TOKENS, EVALS)[:evals]:
        into.setdefault(config["number"], []).append(engine.advance(config["number"], milestone))
    engine.detach(config["number"])
    engine._folder.trial_state(config["number"]).unlink()  # as whoever records the trial does, or it would go on


def drive_attached(engine: Engine, number: int) -> None:
    for milestone in milestones(TOKENS, EVALS):
        engine.advance(number, milestone)


def together(engine: Engine, configs: list[TrialConfig]) -> dict[int, list[Report]]:
    reports: dict[int, list[Report]] = {}
    with beside([lambda config=config: drive(engine, config, reports) for config in configs]):
        return reports


@contextmanager
def beside(calls: list[Callable[[], None]]) -> Iterator[None]:
    """Calls run in threads of their own during this block; at its end they are waited for, and may fail it."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        yield
        for future in futures:
            future.result(timeout=240)


def differences(some: list[Report], others: list[Report]) -> dict[str, float]:
    keys = ("tokens", "trained_tokens", "step", "epoch", "train_loss", "grad_norm", "learning_rate", "eval_loss")
    assert len(some) == len(others)
    return {key: max(abs(getattr(a, key) - getattr(b, key)) for a, b in zip(some, others, strict=True)) for key in keys}


@pytest.mark.parametrize("lanes", [1, 2])
def test_slots_that_differ_in_everything_train_as_they_would_alone(lanes, sweep, alone):
    engine = sweep.engine(lanes)
    joint = together(engine, configs_for(sweep.spec))
    assert [lane.tenancies for lane in engine.lanes] == [[]] * lanes
    engine.close()
    for number, reports in joint.items():
        found = differences(alone[number], reports)
        assert found.pop("grad_norm") < 1e-3  # a norm over thousands of products, itself above 1
        assert max(found.values()) < 1e-4, (number, found)
    assert max(report.step for reports in joint.values() for report in reports) > 50


def test_slots_that_come_and_go_do_not_change_a_slot(sweep, alone, engine):
    configs = configs_for(sweep.spec)
    steady: dict[int, list[Report]] = {}
    with beside([lambda: drive(engine, configs[0], steady)]):
        for number, evals in [(1, 2), (2, 1), (3, 3), (1, 1)]:  # attach, train a little, detach in the middle
            drive(engine, configs[number], {}, evals)
    assert max(differences(alone[0], steady[0]).values()) < 1e-4


def test_a_slot_that_is_detached_lets_go_whoever_waits_for_its_report(sweep, engine):
    engine.attach({**configs_for(sweep.spec)[0], "number": 99})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.advance, 99, TOKENS)
        tenancy = engine._tenancies[99]
        while tenancy.until < TOKENS:
            time.sleep(0.01)
        engine.detach(99)
        with pytest.raises(TunerError, match="trial 99 is detached"):
            waiting.result(30)
    assert engine.lanes[0].tenancies == []


def test_the_adapter_of_a_slot_is_the_adapter_of_its_trial(sweep, engine):
    config = configs_for(sweep.spec)[1]
    report = together(engine, [config])[1][-1]
    saved = load_file(Path(report.adapter_path or "") / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved} == {"q_proj", "down_proj"}
    assert max(tensor.abs().max() for name, tensor in saved.items() if "lora_B" in name) > 0


def test_a_slot_that_diverges_or_fails_ends_alone(sweep, alone, engine):
    configs = configs_for(sweep.spec)
    configs[1]["train"]["learning_rate"] = 1e30
    configs[2]["train"]["optim"] = "lomo"  # needs a package that is not installed
    good: dict[int, list[Report]] = {}
    with beside([lambda: drive(engine, configs[0], good)]):
        for number, error in [(1, InfeasibleError), (2, ImportError)]:
            engine.attach(configs[number])
            with pytest.raises(error):
                drive_attached(engine, number)
            engine.detach(number)
    assert max(differences(alone[0], good[0]).values()) < 1e-4


def test_nan_in_the_first_slot_of_a_batch_reaches_no_other(sweep, alone):
    """Documents of unequal length, so that attention pads, and the first token of the batch not finite."""
    engine = sweep.engine()
    configs = configs_for(sweep.spec)[:2]
    configs[0]["train"]["learning_rate"] = 1e30
    for config in configs:
        engine.attach(config)
    good: list[Report] = []
    steady = beside([lambda: good.extend(engine.advance(1, m) for m in milestones(TOKENS, EVALS)[:4])])
    with steady, pytest.raises(InfeasibleError):
        drive_attached(engine, 0)
    engine.close()
    assert max(differences(alone[1][:4], good).values()) < 1e-4


def test_a_detached_slot_leaves_nothing_behind(sweep, engine):
    config = configs_for(sweep.spec)[0]
    engine.attach(config)
    engine.advance(0, milestones(TOKENS, EVALS)[0])
    engine.detach(0)
    assert not any(rows for stack in engine.lanes[0].joint._stacks.values() for rows in stack.adapted.values())
    engine.detach(0)  # twice is as good as once


def test_a_slot_goes_on_from_what_its_engine_left_behind(sweep, alone):
    """Optimizer, schedule, position in the data and losses: as if nothing had happened between the two engines."""
    config, ahead = configs_for(sweep.spec)[1], milestones(TOKENS, EVALS)
    sweep.state(1).unlink(missing_ok=True)
    first = sweep.engine()
    first.attach(config)
    reports = [first.advance(1, milestone) for milestone in ahead[:5]]
    first.close()
    second = sweep.engine()
    second.attach(config)
    assert second.advance(1, ahead[4]) == reports[-1]
    reports += [second.advance(1, milestone) for milestone in ahead[5:]]
    second.close()
    assert max(differences(alone[1], reports).values()) < 1e-5


def test_a_slot_whose_state_was_cut_short_begins_again(sweep, alone, capsys):
    config, ahead = configs_for(sweep.spec)[1], milestones(TOKENS, EVALS)
    sweep.state(1).unlink(missing_ok=True)
    first = sweep.engine()
    first.attach(config)
    first.advance(1, ahead[0])
    left = sweep.state(1).read_bytes()
    first.close()
    sweep.state(1).write_bytes(left[: len(left) // 2])
    second = sweep.engine()
    second.attach(config)
    report = second.advance(1, ahead[0])
    second.close()
    assert "state.safetensors is damaged" in capsys.readouterr().out
    assert max(differences(alone[1][:1], [report]).values()) < 1e-5


def test_what_does_not_fit_together_is_computed_apart_and_costs_no_trial(sweep, alone, engine, monkeypatch):
    """Memory runs out after the gradients were added, in the middle of an accumulation, and again and again."""
    joint, sizes = engine.lanes[0].joint, []

    def step(batches: list[MicroBatch], real: Any = joint.step) -> list[float]:
        losses = real(batches)
        sizes.append(len(batches))
        if len(batches) > 2:
            raise MemoryError
        return losses

    monkeypatch.setattr(joint, "step", step)
    for number, reports in together(engine, configs_for(sweep.spec)).items():
        assert max(differences(alone[number], reports).values()) < 1e-3, number
    assert 0 < len([size for size in sizes if size > 2]) < 4  # what did not fit once is not tried at every step


def test_a_slot_that_does_not_fit_alone_ends_alone(sweep, alone, engine, monkeypatch):
    configs, joint = configs_for(sweep.spec)[:2], engine.lanes[0].joint

    def step(batches: list[MicroBatch], real: Any = joint.step) -> list[float]:
        if any(batch.adapter and batch.adapter.stack.rank == 8 and batch.tokens > 60 for batch in batches):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(batches)

    configs[0]["train"]["per_device_train_batch_size"] = 4
    configs[1]["lora"] = {**(configs[1]["lora"] or {}), "r": 16, "lora_alpha": 8}
    monkeypatch.setattr(joint, "step", step)
    for config in configs:
        engine.attach(config)
    good: list[Report] = []
    steady = beside([lambda: good.extend(engine.advance(1, m) for m in milestones(TOKENS, EVALS)[:3])])
    with steady, pytest.raises(torch.OutOfMemoryError):
        engine.advance(0, milestones(TOKENS, EVALS)[0])
    assert max(differences(sweep.alone(configs[1])[:3], good).values()) < 1e-4


def test_the_base_is_a_slot_without_an_adapter(sweep, engine):
    assert engine.score_base().as_dict() == pytest.approx(sweep.facts.baseline, abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"optim": "adafactor"}},
        {"lora": {"r": 4, "use_dora": True}},
        {"lora": {"r": 4, "modules_to_save": ["lm_head"]}},
        {"lora": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}},
    ],
    ids=str,
)
def test_a_trial_that_is_more_than_low_rank_products_is_no_slot(changes, sweep, engine):
    (config,) = configs_for(sweep.spec, [{"train": {}, "lora": {}} | changes])
    engine.attach(config)
    with pytest.raises(NotShareable):
        engine.advance(0, milestones(TOKENS, EVALS)[0])


def test_random_numbers_depend_on_the_slot_alone(tiny_model_dir, tmp_path):
    """Dropout and noise are the same with neighbours and without, and when checkpointing computes a layer again."""
    noisy = {"train": {"learning_rate": 4e-3, "neftune_noise_alpha": 5}, "lora": {"r": 8, "lora_dropout": 0.2}}
    losses = []
    for folder, checkpointing, company in [("a", False, 1), ("b", True, 1), ("c", False, 3)]:
        (tmp_path / folder).mkdir()
        train = {"per_device_train_batch_size": 2, "gradient_checkpointing": checkpointing}
        sweep = Sweep(tiny_model_dir, tmp_path / folder, train=train)
        engine = sweep.engine()
        reports = together(engine, configs_for(sweep.spec, [noisy, *VARIANTS[: company - 1]]))[0]
        engine.close()
        losses.append([report.eval_loss for report in reports])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[2] == pytest.approx(losses[0], abs=1e-4)


def test_dropout_noise_and_checkpointing_learn_as_well_as_alone(tiny_model_dir, tmp_path):
    """Random masks cannot be equal; the losses they lead to agree within what another seed changes."""
    train = {"per_device_train_batch_size": 2, "gradient_checkpointing": True}
    sweep = Sweep(tiny_model_dir, tmp_path, train=train)
    variant = {"train": {"learning_rate": 4e-3, "neftune_noise_alpha": 5}, "lora": {"r": 8, "lora_dropout": 0.2}}
    (config,) = configs_for(sweep.spec, [variant])
    engine = sweep.engine()
    joint = together(engine, [config])[0][-1]
    engine.close()
    alone = sweep.alone(config)[-1]
    assert joint.eval_loss == pytest.approx(alone.eval_loss, abs=0.05)
    assert joint.eval_loss < sweep.facts.baseline["eval_loss"] - 0.3


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_bfloat16_or_four_bit_base_can_be_shared(quantization, tiny_model_dir, tmp_path):
    """bfloat16 rounds differently along another path: losses agree to a few parts in ten thousand."""
    model = {"name": str(tiny_model_dir), "dtype": "bfloat16", "quantization": quantization}
    sweep = Sweep(tiny_model_dir, tmp_path, model=model)
    configs = configs_for(sweep.spec)[:2]
    engine = sweep.engine()
    joint = together(engine, configs)
    engine.close()
    for config in configs:
        found = differences(sweep.alone(config), joint[config["number"]])
        assert found["eval_loss"] < 0.01
        assert found["train_loss"] < 0.02


def test_the_base_itself_is_never_changed(sweep):
    engine = sweep.engine()
    before = {name: tensor.clone() for name, tensor in engine.base.state_dict().items()}
    together(engine, configs_for(sweep.spec)[:1])
    engine.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.base.state_dict().items())


def test_a_joint_evaluation_batch_has_no_more_documents_of_a_slot_than_asked_for(sweep, engine, monkeypatch):
    """`train.per_device_eval_batch_size` bounds memory there, too; without it only EVAL_TOKENS does."""
    documents = [lane.Document(torch.ones(9, dtype=torch.long), torch.ones(9, dtype=torch.long))] * 7
    sizes = [[len(batch) for batch in lane._joint_batches(documents, 30, most)] for most in (2, 7)]
    assert sizes == [[2, 2, 2, 1], [3, 3, 1]]
    train = sweep.spec.train | {"per_device_eval_batch_size": 3}
    monkeypatch.setattr(engine, "_spec", sweep.spec.model_copy(update={"train": train}))
    with monkeypatch.context() as patch:
        seen: list[int] = []
        engine.use_lanes(1)
        [one] = engine.lanes
        score = one.joint.score
        patch.setattr(one.joint, "score", lambda parts: seen.append(len(parts[0].documents)) or score(parts))
        engine.score_base()
    assert max(seen) == 3 < sum(seen)


def test_documents_of_similar_length_are_padded_together():
    layout = Layout([100, 3, 4, 90, 60], torch.device("cpu"))
    rows = torch.arange(257.0).view(1, 1, 257, 1)
    groups = layout.spread(rows)
    assert [tuple(group.shape) for group in groups] == [(3, 1, 100, 1), (2, 1, 4, 1)]
    assert layout.waste == pytest.approx(1 - 257 / 308)
    assert torch.equal(layout.join([group.transpose(1, 2) for group in groups]), rows.transpose(1, 2))


def test_the_planner_measures_and_says_why(sweep, engine):
    plan = plan_slots(sweep.spec, engine, sweep.facts)
    assert 1 <= plan.slots <= 2  # of four trials
    assert len(engine.lanes) == plan.lanes <= plan.slots
    assert "a search of 4 trials has use for 2" in plan.reason
    assert f"{plan.lanes} x {engine.threads // plan.lanes} threads" in plan.reason


@pytest.mark.parametrize(("faster", "dtype"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_the_planner_says_when_another_dtype_would_be_faster(faster, dtype, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(planner, "_products_per_second", lambda asked, device: 3.0 if asked == faster else 1.0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=getattr(torch, dtype))
    assert planner.dtype_advice(base).endswith(f"model.dtype {str(faster).removeprefix('torch.')} would be faster")


@pytest.mark.parametrize(
    ("search", "stopping", "most"),
    [
        ({}, {}, 4),
        ({"sampler": "random"}, {}, 4),
        ({"sampler": "random"}, {"type": "none"}, 12),
        ({}, {"type": "none"}, 4),
        ({"enqueue": [{"train.max_length": 32}] * 12}, {"type": "none"}, 12),
    ],
    ids=str,
)
def test_a_search_that_learns_does_not_start_all_its_trials_at_once(search, stopping, most, tiny_model_dir, tmp_path):
    budget = {"trials": 12, "tokens_per_trial": TOKENS, "evals_per_trial": EVALS}
    spec = spec_for(tiny_model_dir, tmp_path, budget=budget, search=search, stopping=stopping)
    assert planner.most_to_learn_from(spec) == most


def test_the_planner_takes_the_number_that_is_asked_for(sweep, engine):
    resources = sweep.spec.resources.model_copy(update={"share_base": 3})
    plan = plan_slots(sweep.spec.model_copy(update={"resources": resources}), engine, sweep.facts)
    assert plan.slots == 3
    assert "resources.share_base is 3" in plan.reason


def test_the_memory_of_a_slot_is_seen_in_a_probe(tiny_model_dir):
    """Ranks 16 and 8 differ by their adapters alone; per token, backward needs some vectors of every layer."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    joint, config = JointModel(base), base.config
    rank_8, rank_16 = (memory_per_slot(base, joint, rank, 64) for rank in (8, 16))
    assert rank_16 - rank_8 == pytest.approx(joint.stack(8).width * 5 * 4, rel=0.3)
    activations = memory_per_slot(base, joint, 8, 128) - rank_8
    vectors = 12 * config.hidden_size + 4 * config.intermediate_size
    assert activations == pytest.approx(64 * config.num_hidden_layers * vectors * 4, rel=0.5)
    sparing = JointModel(base, activation_checkpointing=True)
    assert memory_per_slot(base, sparing, 8, 128) - memory_per_slot(base, sparing, 8, 64) < activations / 2


def test_where_memory_is_short_there_are_fewer_slots(sweep, engine, monkeypatch):
    needed = memory_per_slot(engine.base, engine.lanes[0].joint, 8, typical_step(sweep.spec, sweep.facts))
    monkeypatch.setattr(planner, "_free_memory", lambda: int(1.5 * needed))
    assert plan_slots(sweep.spec, engine, sweep.facts).slots == 1


@pytest.mark.parametrize(("tokens", "vocabulary", "features"), [(5, 7, 3), (1500, 30, 8), (3, 60_000, 4)])
def test_the_head_in_tiles_is_the_head_at_once(tokens, vocabulary, features, monkeypatch):
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 2**14)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, features, dtype=torch.float32, requires_grad=True)
    weight, targets = 3 * torch.randn(vocabulary, features), torch.randint(0, vocabulary, (tokens,))
    weights = torch.rand(tokens)
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), hidden)
    nll = head.WeightedNLL.apply(hidden, weight, targets, weights)
    (grad,) = torch.autograd.grad((nll * weights).sum(), hidden)
    assert torch.allclose(nll, expected, atol=1e-5)
    assert torch.allclose(grad, expected_grad, rtol=1e-3, atol=1e-5)
    scored, correct = head.nll_and_correct(hidden.detach(), weight, targets)
    assert torch.allclose(scored, expected, atol=1e-5)
    assert torch.equal(correct, (hidden @ weight.t()).argmax(-1) == targets)


def test_of_equally_likely_tokens_the_first_is_right(monkeypatch):
    """As in TRL's head, by which dedicated trials and promoted models are scored; in bfloat16 ties are not rare."""
    monkeypatch.setitem(head.TILE_BYTES, "cpu", 2**10)
    torch.manual_seed(0)
    hidden = torch.randint(-1, 2, (500, 3)).float()
    weight, targets = torch.randint(-1, 2, (40, 3)).float(), torch.randint(0, 40, (500,))
    logits = hidden @ weight.t()
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    _, correct = head.nll_and_correct(hidden, weight, targets)
    assert torch.equal(correct, first == targets)
    assert 0 < correct.sum() < (logits.gather(1, targets[:, None])[:, 0] == logits.amax(-1)).sum()


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "longest", "reason"),
    [
        ({}, 128, None),
        ({"sliding_window": 64}, 128, "attends to 64 tokens at a time"),
        ({"sliding_window": 256}, 128, None),
        ({"sliding_window": 64}, None, "attends to 64 tokens at a time"),
        ({"final_logit_softcapping": 30.0}, 128, "caps its logits"),
        ({"rope_parameters": LONG}, 64, None),
        ({"rope_parameters": LONG}, 65, "beside one of over 64 tokens"),
        ({"router_aux_loss_coef": 0.01}, 128, "mixture of experts"),
        ({"layer_types": ["full_attention", "linear_attention"]}, 128, "layers of another kind"),
    ],
    ids=str,
)
def test_an_architecture_that_the_joint_step_would_get_wrong_is_refused(changes, longest, reason, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for name, value in changes.items():
        setattr(model.config, name, value)
    found = why_not_joint(model, longest)
    assert found is None if reason is None else reason in (found or "")
