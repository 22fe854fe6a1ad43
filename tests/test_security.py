"""No way in and nothing out: what is never read, never run, and never written down."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tuner
from tests.made_by_hand import Bomb, make_report, make_spec, make_sweep
from tests.real_sweeps import Command, write_spec
from tuner.errors import TunerError
from tuner.execution.promote import promote_trial
from tuner.execution.retention import drop_worse_adapters
from tuner.promotion.registry import current, history, rollback, staging
from tuner.results.store import Store
from tuner.spec.layout import Root
from tuner.spec.sweep import ModelSpec
from tuner.spec.text import parse_yaml
from tuner.training.model import load_model, load_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCES = sorted(Path(tuner.__file__).parent.rglob("*.py"))
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
RUNS_WHAT_IT_READS = {"eval()", "exec()", "compile()", ".system()", ".popen()", ".read_pickle()", ".unsafe_load()"}


def _names(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported, and the functions and methods that are called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call):
            yield f"{node.func.id}()" if isinstance(node.func, ast.Name) else f".{getattr(node.func, 'attr', '')}()"


def test_no_module_reads_pickles_or_runs_what_it_reads():
    forbidden = PICKLES | RUNS_WHAT_IT_READS
    assert [
        (file.name, name) for file in SOURCES for name in _names(ast.parse(file.read_text())) if name in forbidden
    ] == []


@pytest.mark.parametrize("call", ["torch.load(", "yaml.load(", "shell=True", "allow_pickle", "weights_only=False"])
def test_no_line_loads_or_runs_in_a_way_that_can_run_code(call):
    assert [file.name for file in SOURCES if call in file.read_text()] == []


@pytest.mark.timeout(240)
def test_a_secret_of_the_environment_is_written_nowhere(tiny_model_dir, tmp_path):
    """Neither by a sweep that fails a trial and promotes another, nor by Ray beside it, nor by who reads afterwards.

    The same sweep has a base of the hub, whose commit it names, and an umask, which all of its files follow.
    """
    secret, budget = "hf_canary4711", {"trials": 2, "tokens_per_trial": 200, "evals_per_trial": 1}
    space = {"train.learning_rate": {"type": "choice", "values": [1e-3, 1e30]}}
    file = write_spec(
        *(tmp_path, Path("org/tiny"), "canary"),
        space=space,
        budget=budget,
        search={"enqueue": [{"train.learning_rate": rate} for rate in (1e-3, 1e30)]},
        resources={"max_concurrent_trials": 2},
        promotion={"max_regression": 10.0},
    )
    hub = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_model_dir, hub / "snapshots" / COMMIT)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(COMMIT)
    with tempfile.TemporaryDirectory(prefix="canary-", dir="/tmp") as scratch:  # short: a socket's path has a limit
        seen: dict[str, bool] = {}
        keys = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"), secret)
        commands = [["run", file], ["show", "canary", "--json"], ["results", "canary"], ["verify", "canary"]]
        for number, arguments in enumerate(commands):
            before = os.umask(0o027)
            command = Command(*arguments, cwd=tmp_path, TMPDIR=scratch, HF_HUB_CACHE=str(hub.parent), **keys)
            os.umask(before)
            while command.process.poll() is None:  # Ray's own logs are gone when it ends
                for path in Path(scratch).rglob("*.*"):
                    with suppress(OSError):
                        seen[path.name] = seen.get(path.name, False) or (
                            path.is_file() and secret.encode() in path.read_bytes()
                        )
                time.sleep(0.5)
            try:
                assert command.end() == 0, command.lines
            finally:
                command.kill()
            assert number or any("INFEASIBLE" in line or "diverged" in line for line in command.lines)
        written = [path for place in (tmp_path, Path(scratch)) for path in place.rglob("*") if path.is_file()]
        assert any("manifest.json" in path.name for path in written), "nothing was promoted"
        assert any("raylet" in name for name in seen), "Ray's own logs are not among what is searched"
        assert [name for name, holds in seen.items() if holds] == []
        assert [str(path) for path in written if secret.encode() in path.read_bytes()] == []
    root = tmp_path / "runs"
    modes = {path: path.stat().st_mode & 0o777 for path in root.rglob("*")}
    assert {str(path): oct(mode) for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}
    assert parse_yaml((root / "sweeps/canary/spec.yaml").read_text())["model"]["revision"] == COMMIT
    manifest = json.loads((root / "models/production/current/manifest.json").read_text())
    assert manifest["base"] == {"name": "org/tiny", "revision": COMMIT, "identity": {"commit": COMMIT}}


# --- links that lead out of the root


def _link_out(root: Path, place: str, outside: Path) -> None:
    """Have a place below the root be a link to what stood there, now elsewhere."""
    outside.parent.mkdir(parents=True, exist_ok=True)
    (root / place).rename(outside)
    (root / place).symlink_to(outside)


def _content(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


SWEEP = "sweeps/pydoc-lora"
ADAPTER = f"{SWEEP}/trials/00000/tokens-000000000750"
ACTS: dict[str, Callable[[Root], Any]] = {
    "open": lambda root: Store.open(root.sweep("pydoc-lora")),
    "promote": lambda root: promote_trial(store := Store.open(root.sweep("pydoc-lora")), store.record(0)),
    "drop": lambda root: drop_worse_adapters(Store.open(root.sweep("pydoc-lora")), 0),
    "forget": lambda root: root.forget(root.sweep("pydoc-lora").trial_checkpoints(0)),
    "current": lambda root: current(root, "production"),
    "history": lambda root: history(root, "production"),
    "rollback": lambda root: rollback(root, "production"),
    "stage": lambda root: staging(root, "production").__enter__(),
    "cache": lambda root: root.cache,
    "log": lambda root: root.sweep("pydoc-lora").trial_log(0),
}


@pytest.mark.parametrize(
    ("place", "acts"),
    [
        ("sweeps", "open promote drop forget log"),
        (SWEEP, "open promote drop forget log"),
        (f"{SWEEP}/spec.yaml", "open"),
        (f"{SWEEP}/study.db", "open"),
        (f"{SWEEP}/eval", "promote"),
        (f"{SWEEP}/trials", "promote drop forget log"),
        (f"{SWEEP}/trials/00000", "promote drop forget log"),
        (f"{SWEEP}/trials/00000/tokens-000000000250", "drop"),
        (f"{SWEEP}/trials/00000/trial.log", "log"),
        (f"{SWEEP}/trials/00000/checkpoints", "forget"),
        (ADAPTER, "promote"),
        (f"{ADAPTER}/adapter_model.safetensors", "promote"),
        ("models", "current history rollback stage promote"),
        ("models/production", "current history rollback stage promote"),
        ("models/production/v1", "current rollback"),
        ("models/production/history.jsonl", "history"),
        ("cache", "cache"),
        ("cache/data", "cache"),
        ("cache/models", "cache"),
    ],
)
def test_through_a_link_out_of_the_root_nothing_is_read_written_deleted_or_promoted(place, acts, root_with_all):
    root, outside = root_with_all, root_with_all.path.parent / "outside" / "there"
    _link_out(root.path, place, outside)
    before = _content(outside.parent)
    for act in acts.split():
        with pytest.raises(TunerError, match="a symbolic link that leads out of"):
            ACTS[act](root)
    assert _content(outside.parent) == before


def test_an_alias_that_points_out_of_the_root_is_not_followed(root_with_all):
    link = root_with_all.path / "models/production/current"
    link.unlink()
    link.symlink_to("/etc")
    with pytest.raises(TunerError, match="a symbolic link that leads out of"):
        current(root_with_all, "production")


def test_the_root_itself_may_be_a_link(root_with_all, tmp_path):
    (tmp_path / "link").symlink_to(root_with_all.path)
    root = Root(tmp_path / "link")
    assert Store.open(root.sweep("pydoc-lora")).record(0).outcome == "COMPLETED"
    assert current(root, "production").name == "v1"  # type: ignore[union-attr]


def test_what_a_record_calls_an_adapter_s_place_is_never_deleted_nor_promoted(root_with_all, tmp_path):
    """Who writes to the database, or moved the root, has no say in what is removed."""
    precious = tmp_path / "precious"
    precious.mkdir()
    store = Store.open(root_with_all.sweep("pydoc-lora"))
    for tokens in (250, 500, 750, 1000):
        store.add_report(0, make_report(tokens, 2.0, adapter_path=str(precious)))
    drop_worse_adapters(store, 0)
    assert precious.exists()
    assert not store.folder.adapter(0, 500).exists()
    with pytest.raises(TunerError, match=r"no checkpoint at .*tokens-000000000500"):
        promote_trial(store, replace(store.record(0), report=make_report(500, 2.0, adapter_path=str(precious))))


@pytest.fixture
def root_with_all(tmp_path: Path) -> Root:
    """A root with everything there can be in one: a sweep with four adapters of a trial, a version, a cache."""
    root = Root(tmp_path / "runs")
    store = make_sweep(root.path)
    for tokens in (250, 500, 750, 1000):
        adapter = store.folder.adapter(0, tokens)
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").write_text("weights")
    store.folder.trial_log(0).write_text("said")
    for folder in ("models/production/v1", "cache/data", "cache/models", f"{SWEEP}/eval"):
        (root.path / folder).mkdir(parents=True)
        (root.path / folder / "manifest.json").write_text('{"previous": null}')
    (store.folder.trial_checkpoints(0) / "checkpoint-1").mkdir(parents=True)
    (root.path / "models/production/current").symlink_to("v1")
    (root.path / "models/production/history.jsonl").write_text("")
    return root


# --- pickles and code that come with a model


def _plant(folder: Path, mark: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))


@pytest.mark.parametrize("planted", ["weights", "weights and their index", "an index of safetensors", "in disguise"])
def test_weights_that_are_a_pickle_are_refused_before_anything_is_read(planted, tiny_model_dir, tmp_path):
    folder, mark = Path(shutil.copytree(tiny_model_dir, tmp_path / "base")), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    _plant(folder, mark, "pytorch_model.bin", *(["model.safetensors"] if planted == "in disguise" else []))
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}}
    if planted == "weights and their index":
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    if planted == "an index of safetensors":
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "other.safetensors").write_bytes(b"")
    said = "cannot be loaded" if planted == "in disguise" else "pickles are never read"
    with pytest.raises(TunerError, match=said):
        load_model(ModelSpec(name=str(folder)).model_dump(), tmp_path)
    assert not mark.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert mark.exists(), "it was no bomb"


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_code_that_comes_with_a_model_is_not_run_unless_the_spec_says_so(load, tiny_model_dir, tmp_path):
    folder, mark = Path(shutil.copytree(tiny_model_dir, tmp_path / "base")), tmp_path / "mark"
    (folder / "theirs.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    for name, kinds in (("config.json", ["AutoConfig", "AutoModelForCausalLM"]), ("tokenizer_config.json", [])):
        config = json.loads((folder / name).read_text()) | {"model_type": "theirs", "tokenizer_class": "Theirs"}
        theirs = dict.fromkeys(kinds, "theirs.Theirs") | {"AutoTokenizer": ["theirs.Theirs", None]}
        (folder / name).write_text(json.dumps(config | {"auto_map": theirs}))
    with pytest.raises(TunerError, match="contains custom code"):
        load(ModelSpec(name=str(folder)).model_dump(), tmp_path)
    assert not mark.exists()
    with suppress(TunerError, AttributeError):
        load(ModelSpec(name=str(folder), trust_remote_code=True).model_dump(), tmp_path)
    assert mark.exists()


# --- passwords in errors


@pytest.mark.parametrize(
    "url", ["me:${PASSWORD}@127.0.0.1:1/db", "me:${PASSWORD}@h:${PASSWORD}/db", "127.0.0.1:1/db?password=${PASSWORD}"]
)
def test_an_error_quotes_no_password_of_the_database(url, tmp_path, monkeypatch):
    monkeypatch.setenv("PASSWORD", "canary:47/11@")
    with pytest.raises(TunerError) as refused:
        Store.create(make_spec(tmp_path, storage={"root": str(tmp_path), "study": f"postgresql+psycopg://{url}"}))
    assert "canary" not in "".join(traceback.format_exception(refused.value))
