"""Every key that a spec may have is read by somebody; where nobody would read it, it is refused or said."""

from __future__ import annotations

import ast
import inspect
import shlex
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tuner
from tuner.cli.screens import show_spec
from tuner.spec.checks.unread import _OF_LOADER, _OF_SEVERAL, without_effect
from tuner.spec.hints import all_keys
from tuner.spec.load import load_spec
from tuner.spec.sharing import _NEEDED, _OF_A_PROCESS

OURS = Path(tuner.__file__).parent


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file, a folder and a base beside the good spec."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    (tmp_path / "saved").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_text("")
    return tmp_path


FILE = "data.path=rows.jsonl"
A_FILE = "since data.path is a file"
UNREAD = [
    (f"{FILE} data.split=test", f"data.split: got 'test'; allowed: 'train' or nothing, {A_FILE}"),
    (f"{FILE} data.name=main", f"data.name: got 'main'; allowed: null or nothing, {A_FILE}"),
    (f"{FILE} data.revision=v1", f"data.revision: got 'v1'; allowed: null or nothing, {A_FILE}"),
    (
        "data.path=saved data.revision=v1",
        "data.revision: got 'v1'; allowed: null or nothing, since data.path is a folder",
    ),
    (
        f"{FILE} data.eval_path=org/other data.eval_fraction=0.2",
        "data.eval_fraction: got 0.2; allowed: 0.05 or nothing, since data.eval_path holds what is evaluated",
    ),
    (
        "data.template='in-{a}' data.format=alpaca",
        "data.format: got 'alpaca'; allowed: auto or text, since data.template makes text; did you mean text?",
    ),
    (
        "model.name=base model.revision=v1",
        "model.revision: got 'v1'; allowed: 'main' or nothing, since model.name is a folder",
    ),
    (
        "model.name=package:rich model.revision=v1",
        "model.revision: got 'v1'; allowed: 'main' or nothing, since model.name is an installed package",
    ),
    (
        "promotion.merge_into=original",
        "promotion.merge_into: got 'original'; allowed: 'dequantized' or nothing, since model.quantization is none",
    ),
    (
        "resources.share_base=2 resources.workers_per_trial=2",
        "resources.share_base: got 2; allowed: auto or off, since a trial has 2 workers; did you mean off?",
    ),
    (
        "resources.share_base=2 lora.use_dora=true",
        "resources.share_base: got 2; allowed: auto or off, since lora.use_dora: DoRA rescales the base's own columns; did you mean off?",  # noqa: E501
    ),
    (
        "resources.gpus_per_worker=0 budget.gpu_hours=2",
        "budget.gpu_hours: got 2.0; allowed: null, since resources.gpus_per_worker is 0: no trial holds a GPU",
    ),
    (
        "train.use_cache=true",
        "train.use_cache: got true; allowed: nothing, TRL trains without a cache of keys and values",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), UNREAD, ids=[overrides for overrides, _ in UNREAD])
def test_what_would_be_left_out_is_refused(overrides, message, rows, messages_of):
    said = messages_of(*shlex.split(overrides))
    assert [one for one in said if "model.name" not in one.partition(":")[0]] == [message]


NO_EFFECT = [
    ("train.dataloader_num_workers=2", "train.dataloader_num_workers", "the trials share a base"),
    ("train.dataloader_pin_memory=false", "train.dataloader_pin_memory", "the trials share a base"),
    ("train.torch_empty_cache_steps=4", "train.torch_empty_cache_steps", "the trials share a base"),
    ("model.attn_implementation=eager", "model.attn_implementation", "the trials share a base"),
    ("train.ddp_timeout=60", "train.ddp_timeout", "a trial has one worker"),
    (
        "train.ddp_static_graph=true resources.workers_per_trial=2 resources.strategy=zero2",
        "train.ddp_static_graph",
        "resources.strategy is zero2",
    ),
    ("stopping.type=median stopping.reduction_factor=4", "stopping.reduction_factor", "stopping.type is median"),
    ("stopping.type=none stopping.grace_evals=4", "stopping.grace_evals", "stopping.type is none"),
    ("search.sampler=random search.startup_trials=9", "search.startup_trials", "search.sampler is random"),
]


@pytest.mark.parametrize(("overrides", "key", "reason"), NO_EFFECT, ids=[one[0] for one in NO_EFFECT])
def test_what_has_no_effect_now_is_said(overrides, key, reason, good, capsys):
    spec = load_spec(good, shlex.split(overrides))
    [sentence] = without_effect(spec)
    assert sentence.startswith(f"{key} has no effect: {reason}")
    show_spec(spec)
    assert sentence in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "train.dataloader_num_workers=2 resources.share_base=off",
        "train.ddp_timeout=60 resources.workers_per_trial=2 resources.strategy=zero2",
        "train.ddp_static_graph=true resources.workers_per_trial=2",
        "model.attn_implementation=eager lora.use_dora=true",
        "stopping.reduction_factor=4",
    ],
)
def test_nothing_is_said_of_what_is_read(overrides, good):
    assert without_effect(load_spec(good, shlex.split(overrides))) == []


# Who reads each key


def test_every_key_of_a_spec_is_read(read_by_us):
    """In a trial of its own base, TRL and PEFT are given all of `train` and `lora`."""
    unread = {key for key in all_keys() if key.rpartition(".")[2] not in read_by_us}
    unread -= {key for key in unread if key.partition(".")[0] in ("train", "lora")}
    assert unread == {"promotion.server"}, "which only the check reads: it bounds what is searched"


def test_every_field_of_train_is_read_where_a_trial_has_its_own_base(read_by_us):
    import transformers
    import trl

    files = [
        *Path(transformers.__file__).parent.glob("train*.py"),
        *Path(transformers.__file__).parent.glob("*optim*.py"),
        Path(trl.__file__).parent / "trainer" / "sft_trainer.py",
        Path(trl.__file__).parent / "trainer" / "base_trainer.py",
    ]
    read = read_by_us | names_in(file.read_text() for file in files if file.exists())
    assert fields_of("train") - read == set()


def test_every_field_of_train_is_read_on_a_shared_base_or_it_is_said(read_by_us):
    """By the slot and what it asks of the trainer; else trials with it train apart, or it is said to have no effect."""
    from transformers import Trainer, TrainingArguments
    from trl import SFTTrainer

    asked = [
        *(Trainer.get_optimizer_cls_and_kwargs, Trainer.create_scheduler, Trainer._get_dataloader),
        *(Trainer._get_train_sampler, Trainer.get_batch_samples, SFTTrainer.__init__),
        TrainingArguments.get_warmup_steps,
    ]
    read = read_by_us | names_in(textwrap.dedent(inspect.getsource(one)) for one in asked)
    apart = {key.removeprefix("train.") for key in (*_NEEDED, *_OF_A_PROCESS) if key.startswith("train.")}
    unread = fields_of("train") - read - apart - {*_OF_LOADER, *_OF_SEVERAL}
    assert unread == {"optim_target_modules"}, "which only optimizers read that are not elementwise"


def test_every_field_of_lora_is_read_by_peft(read_by_us):
    import peft

    files = Path(peft.__file__).parent.rglob("*.py")
    assert fields_of("lora") - names_in(file.read_text() for file in files) == {"alpha_ratio"}
    assert "alpha_ratio" in read_by_us


def fields_of(section: str) -> set[str]:
    return {key.partition(".")[2] for key in all_keys() if key.startswith(f"{section}.")}


@pytest.fixture(scope="module")
def read_by_us() -> set[str]:
    """Names that any module of ours reads, but those which only describe or check a spec."""
    spec = OURS / "spec"
    describing = {
        spec / name for name in ("sweep.py", "policy.py", "fields.py", "hints.py", "sharing.py", "changes.py")
    }
    files = [file for file in OURS.rglob("*.py") if file not in describing and file.parent != spec / "checks"]
    return names_in(file.read_text() for file in files) | names_in([inspect.getsource(tuner.spec.fields)])


def names_in(sources: Iterable[str]) -> set[str]:
    return {name for source in sources for name in _names(ast.parse(source))}


def _names(tree: ast.AST) -> Iterator[str]:
    """Attributes that are read, and texts that a key could be looked up by."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, ctx=ast.Load()):
                yield name
            case ast.Constant(value=str(text)) if text.isidentifier():
                yield text


def test_what_reads_names_finds_what_is_read_and_no_more():
    source: Any = "def f(a):\n    '''text in prose'''\n    a.written = a.read\n    return a['looked_up']"
    assert names_in([source]) == {"read", "looked_up"}
