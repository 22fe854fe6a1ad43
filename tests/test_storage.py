"""A root in an object store, against a server that speaks S3: whole or not there, and one of several who try."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from made_by_hand import TRIALS, Made, add_trial, make_report, make_sweep

import tuner
from tuner.errors import AliasMoved, NotFoundError, TunerError
from tuner.execution.retention import drop_worse_adapters, keep_best_adapters
from tuner.promotion.registry import Version, current, history, next_version, publish, rollback, staging, versions
from tuner.results.store import Store
from tuner.results.sweeps import sweep_names
from tuner.spec.layout import Root
from tuner.training.cache import checksums
from tuner.training.checkpoint import newest_checkpoint


def save_adapter(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def publish_one(root: Root, alias: str = "production") -> Version:
    """Publish a folder of a manifest and weights that name their version."""
    with staging(root, alias) as working:
        before, version = current(root, alias), next_version(root, alias)
        (working / "model").mkdir()
        (working / "model" / "manifest.json").write_text(json.dumps({"previous": before.name if before else None}))
        (working / "model" / "model.safetensors").write_bytes(version.name.encode())
        publish(version, before, working / "model")
        return version


def publish_until_it_is_so(root: Root, node: Path) -> tuple[str, int]:
    """As another node promotes: in a folder of its own, again when it came too late. Returns also how often it did."""
    for tries in range(100):
        try:
            return publish_one(Root(node, root.url)).name, tries
        except AliasMoved:
            continue
    raise AssertionError("never")


def test_what_is_kept_is_gone_here_and_can_be_fetched_on_another_node(s3_root, tmp_path):
    root = Root.at(s3_root)
    adapter = save_adapter(root.sweep("demo").adapter(3, 250))
    address = root.keep(adapter)
    assert address == f"{s3_root}/sweeps/demo/trials/00003/tokens-000000000250"
    assert not adapter.exists()
    assert root.names(root.path) == ["sweeps"]
    elsewhere = Root(tmp_path / "another-node", s3_root)
    fetched = elsewhere.fetch(elsewhere.sweep("demo").adapter(3, 250))
    assert (fetched / "adapter_model.safetensors").read_bytes() == b"weights"
    assert fetched.is_relative_to(tmp_path / "another-node")


def test_fetching_again_takes_what_is_there_now_and_nothing_that_was(s3_root):
    root = Root.at(s3_root)
    folder = save_adapter(root.path / "adapter")
    (folder / "old").write_text("")
    root.keep(folder, stays=True)
    root.forget(folder)
    save_adapter(folder, b"new")
    root.keep(folder, stays=True)
    (folder / "old").write_text("")
    (folder / "adapter_model.safetensors").write_bytes(b"stale")
    root.fetch(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").read_bytes() == b"new"


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_a_folder_is_none_whether_it_was_on_its_way_there_or_gone(s3_root, missing, monkeypatch):
    """The upload breaks off at its last object; the removal before it has come to the weights."""
    root = Root.at(s3_root)
    folder = save_adapter(root.path / "adapter")
    calls = {"put": 0, "delete": 0}

    class BreaksOff:
        def __init__(self, api):
            self._api = api

        def __getattr__(self, name):
            return getattr(self._api, name)

        def put(self, *arguments, **options):
            calls["put"] += 1
            if missing == "adapter_config.json" and calls["put"] == 2:
                raise KeyboardInterrupt
            return self._api.put(*arguments, **options)

        def delete(self, *arguments):
            calls["delete"] += 1
            if calls["delete"] == 2:
                raise KeyboardInterrupt
            return self._api.delete(*arguments)

    monkeypatch.setattr(root.objects, "_api", BreaksOff(root.objects._api))
    with suppress(KeyboardInterrupt):
        root.keep(folder)
        root.forget(folder)
    assert root.names(folder) == ["adapter_model.safetensors"]
    assert not root.exists(folder)
    with pytest.raises(FileNotFoundError):
        root.fetch(folder)


def test_a_trial_goes_on_from_a_checkpoint_of_another_node_but_not_from_half_a_one(s3_root, tmp_path):
    root, elsewhere = Root.at(s3_root), Root(tmp_path / "another-node", s3_root)
    sweep = root.sweep("demo")
    for step, whole in [(9, True), (10, True), (11, False)]:
        folder = save_adapter(sweep.trial_checkpoints(3) / f"checkpoint-{step}", str(step).encode())
        root.keep(folder, stays=True)
        if whole:
            written = {"reports": [make_report(step * 100, 2.0).as_dict()], "files": checksums(folder)}
            (folder / "report.json").write_text(json.dumps(written))
            root.keep(folder / "report.json", stays=True)
    there = elsewhere.sweep("demo")
    assert there.goes_on(3)
    assert not there.goes_on(2)
    found = newest_checkpoint(there.trial_checkpoints(3), elsewhere)
    assert found is not None
    assert (found.reports[-1].step, found.folder.name) == (10, "checkpoint-10")
    assert (found.folder / "adapter_model.safetensors").read_bytes() == b"10"
    root.forget(sweep.trial_checkpoints(3))
    assert not there.goes_on(3)


def test_a_sweep_is_opened_listed_and_not_begun_twice(s3_root, postgres_study):
    storage = {"root": s3_root, "study": postgres_study}
    store = make_sweep(Path("unused"), TRIALS[:2], storage=storage)
    opened = Store.open(Root.at(s3_root).sweep("pydoc-lora"))
    assert opened.spec == store.spec
    assert [trial.outcome for trial in opened.trials()] == ["COMPLETED", "STOPPED"]
    assert sweep_names(Root.at(s3_root)) == ["pydoc-lora"]
    assert tuner.sweeps(s3_root)["name"].to_list() == ["pydoc-lora"]
    with pytest.raises(TunerError, match=f"exists already in {s3_root}/sweeps/pydoc-lora"):
        Store.create(store.spec)
    with pytest.raises(NotFoundError, match="did you mean pydoc-lora"):
        tuner.open("pydoc-lore", s3_root)


def test_no_file_and_no_object_holds_the_password(s3_root, postgres_study, tmp_path, monkeypatch):
    make_sweep(Path("unused"), TRIALS[:1], storage={"root": s3_root, "study": postgres_study})
    root = Root.at(s3_root)
    assert "${TUNER_TEST_PASSWORD}" in root.read(root.sweep("pydoc-lora").spec)
    assert "hunter" not in root.read(root.sweep("pydoc-lora").spec)
    assert not any(b"hunter" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_adapters_that_are_kept_no_longer_are_deleted_in_the_store(s3_root, postgres_study):
    storage = {"root": s3_root, "study": postgres_study, "keep_best": 1}
    store = make_sweep(Path("unused"), [], None, storage=storage)
    root, folder = store.folder.root, store.folder

    for number, losses in enumerate([[2.9, 2.7, 2.6, 2.65], [2.8, 2.75, 2.72, 2.7]]):
        add_trial(store, Made(losses, "RUNNING"))
        for index, loss in enumerate(losses):
            tokens = 250 * (index + 1)
            address = root.keep(save_adapter(folder.adapter(number, tokens)))
            store.add_report(number, make_report(tokens, loss, adapter_path=address))
        drop_worse_adapters(store, number)
        kept = [name for name in root.names(folder.trial(number)) if name.startswith("tokens-")]
        assert len(kept) == 2 - number, kept  # the best and the last
        store.finish_trial(number, "COMPLETED")
    keep_best_adapters(store, [0, 1])
    assert root.names(folder.trial(0)) == ["tokens-000000000750"]
    assert root.names(folder.trial(1)) == []
    assert store.record(0).adapter_path == f"{s3_root}/sweeps/pydoc-lora/trials/00000/tokens-000000000750"


def test_what_may_be_written_once_may_be_tried_again_by_who_wrote_it(s3_root):
    """As the client does when the answer to its first try was lost."""
    root = Root.at(s3_root)
    root.create(root.path / "claim", "mine")
    root.create(root.path / "claim", "mine")
    with pytest.raises(FileExistsError):
        root.create(root.path / "claim", "another's")
    assert root.read(root.path / "claim") == "mine"


def test_every_version_is_kept_and_the_alias_follows_promotions_and_rollbacks(s3_root, tmp_path):
    root = Root.at(s3_root)
    assert (versions(root, "production"), current(root, "production")) == ([], None)
    for _ in range(3):
        publish_one(root)
    elsewhere = Root(tmp_path / "another-node", s3_root)
    now = current(elsewhere, "production")
    assert now is not None
    assert (now.name, now.place) == ("v3", f"{s3_root}/models/production/v3")
    assert (elsewhere.fetch(now.path) / "model.safetensors").read_bytes() == b"v3"
    assert [version.name for version in rollback(elsewhere, "production")] == ["v3", "v2"]
    assert publish_one(root).name == "v4"
    assert [version.name for version in rollback(root, "production")] == ["v4", "v2"]
    moves = [(move["action"], move["from"], move["to"]) for move in history(root, "production")]
    assert moves[-3:] == [("rollback", "v3", "v2"), ("promote", "v2", "v4"), ("rollback", "v4", "v2")]
    assert [version.name for version in versions(root, "production")] == ["v1", "v2", "v3", "v4"]


def test_a_model_whose_upload_broke_off_is_no_version_and_its_number_is_not_given_again(s3_root):
    root = Root.at(s3_root)
    publish_one(root)
    half = Version(root, "production", 2)
    root.create(half.path / ".claimed", "somebody")
    root.create(half.path / "model.safetensors", "half")
    assert [version.name for version in versions(root, "production")] == ["v1"]
    assert current(root, "production") == Version(root, "production", 1)
    assert publish_one(root).name == "v3"


def test_who_promotes_what_was_measured_against_another_model_is_told_and_leaves_nothing(s3_root, tmp_path):
    root, elsewhere = Root.at(s3_root), Root(tmp_path / "another-node", s3_root)
    with staging(root, "production") as working:
        version = next_version(root, "production")
        (working / "model").mkdir()
        (working / "model" / "manifest.json").write_text('{"previous": null}')
        publish_one(elsewhere)  # takes the number
        with pytest.raises(AliasMoved):
            publish(version, None, working / "model")
        version = next_version(root, "production")
        with pytest.raises(AliasMoved):  # has a number, but the alias has moved
            publish(version, None, working / "model")
    assert [version.name for version in versions(root, "production")] == ["v1"]
    assert len(history(root, "production")) == 1


def test_of_nodes_that_promote_at_once_each_gets_a_version_of_its_own_and_none_is_lost(s3_root, tmp_path):
    root = Root.at(s3_root)
    nodes = [(root, tmp_path / f"node{number}") for number in range(3) for _ in range(3)]
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        made = pool.starmap(publish_until_it_is_so, nodes)
    assert len({name for name, _ in made}) == 9
    chain = history(root, "production")
    assert [move["from"] for move in chain] == [None, *(move["to"] for move in chain[:-1])]
    for version in versions(root, "production"):
        assert (root.fetch(version.path) / "model.safetensors").read_bytes() == version.name.encode()


def test_a_store_that_does_not_answer_or_refuses_is_named_without_a_traceback(s3_root, monkeypatch):
    found = subprocess.run(
        [sys.executable, "-m", "tuner.cli", "ls", "--root", "s3://no-such-bucket/runs"],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ),
    )
    assert found.returncode == 3, found.stderr
    assert found.stderr.startswith("tuner: s3://no-such-bucket/runs: ")
    assert "Traceback" not in found.stderr
