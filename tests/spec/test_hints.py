"""Names that people bring from other tools: each is refused, and sent to a key that exists."""

from __future__ import annotations

import re

import pytest

from tuner.spec.checks.shape import check_shape
from tuner.spec.hints import HINTS, all_keys
from tuner.spec.policy import HARMLESS, OWNED
from tuner.spec.sweep import SweepSpec
from tuner.spec.text import parse_yaml

SECTIONS = tuple(SweepSpec.model_fields)


def test_every_hint_leads_to_keys_that_exist_or_says_what_there_is_instead():
    for name, instead in HINTS.items():
        named = re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.\w+", instead)
        whole = re.match(r"(\w+)(: null)?$", instead)
        assert named or (whole and whole[1] in SECTIONS) or re.match(r"nothing, |the environment", instead), name
        assert set(named) <= all_keys(), (name, instead)


@pytest.mark.parametrize("section", ["", "model.", "data.", "train.", "lora.", "budget.", "resources."])
def test_a_name_of_another_tool_is_sent_to_its_key_wherever_it_stands(section, messages_of):
    names = [
        name
        for name in HINTS
        if f"{section}{name}" not in {*all_keys(), *OWNED} and not (section == "" and name == "lora")
    ]
    told = {message.split(":")[0]: message for message in messages_of(*(f"{section}{name}=1" for name in names))}
    for name in names:
        message = told[f"{section}{name}"]
        assert message == f"{section}{name}: got a name of older versions or other tools; allowed: {HINTS[name]}"


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ("train.optimizers=adamw", "allowed: train.optim"),
        ("train.log_level=info", "`tuner show NAME TRIAL` shows a trial's log"),
        ("train.pad_token=x", "padding never counts"),
        ("train.formatting_func=f", "allowed: data.formatter"),
        ("train.callbacks=[x]", "stopping.type and stopping.patience"),
        ("train.compute_metrics=f", "allowed: objective.metric"),
        ("train.response_template=x", "train.completion_only_loss for prompts"),
        ("model.load_in_4bit=true", "allowed: model.quantization: nf4"),
        ("model.torch_dtype=bfloat16", "allowed: model.dtype"),
        ("space.lr={type: uniform, low: 0.1, high: 0.2}", "allowed: train.learning_rate"),
        ("space.lora.rank={type: int, low: 1, high: 2}", "allowed: lora.r"),
        ("budget.learning_rate=1", "did you mean train.learning_rate?"),
        ("alias=x", "did you mean promotion.alias?"),
        ("resources.strategy=fsdp && resources.fsdp={fsdp_offload_params: true}", "allowed: resources.offload"),
        ("resources.strategy=fsdp && resources.fsdp={fsdp_auto_wrap_policy: X}", "did you mean auto_wrap_policy?"),
        ("resources.strategy=fsdp && resources.fsdp={fsdp_sharding_strategy: X}", "allowed: reshard_after_forward"),
        ("resources.strategy=fsdp && resources.fsdp={fsdp_version: 1}", "allowed: nothing, it is FSDP2"),
        ("resources.strategy=fsdp && resources.fsdp={use_orig_params: true}", "nothing, FSDP2 always uses"),
    ],
)
def test_the_hint_leads_where_the_user_wanted_to_go(change, hint, messages_of):
    assert any(hint in message for message in messages_of(*change.split(" && ")))


def test_values_that_ask_for_what_the_service_does_are_accepted_and_dropped(good):
    from tuner.spec.load import check_file

    for key, values in HARMLESS.items():
        assert key in OWNED
        for value in values:
            spec, problems = check_file(good, [f"{key}={value}"])
            assert spec is not None, problems
            assert key.removeprefix("train.") not in spec.train
    spec, problems = check_file(good, ["train.report_to=wandb"])
    assert spec is None
    assert "nothing, every evaluation is reported to the sweep's store" in str(problems[0])


def test_a_misspelt_section_is_not_told_as_missing_too():
    _, problems = check_shape(parse_yaml("modle: {name: x}", "spec"))
    assert [problem.key for problem in problems if "mod" in problem.key] == ["modle"]
