"""Versions and the alias: kept, moved in one step, moved back, safe among processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tuner.errors import NotFoundError, PromotionRefused
from tuner.promotion.registry import Version, current, history, next_version, publish, rollback, staging, versions
from tuner.spec.layout import Root


def publish_one(root: Root, alias: str = "production", forced: bool = False) -> Version:
    """Publish a folder that holds a manifest only."""
    with staging(root, alias) as working:
        before = current(root, alias)
        (working / "model").mkdir()
        (working / "model" / "manifest.json").write_text(json.dumps({"previous": before.name if before else None}))
        (working / "model" / "model.safetensors").write_bytes(next_version(root, alias).name.encode())
        version = next_version(root, alias)
        publish(version, before, working / "model", forced=forced)
        return version


def name_of_current(root: Root) -> str | None:
    version = current(root, "production")
    return version.name if version else None


def test_every_version_is_kept_and_the_alias_points_at_the_last(tmp_path: Path):
    root = Root(tmp_path)
    assert versions(root, "production") == []
    assert current(root, "production") is None
    for _ in range(11):
        publish_one(root)
    assert [version.name for version in versions(root, "production")] == [f"v{number}" for number in range(1, 12)]
    assert name_of_current(root) == "v11"
    assert (root.alias("production") / "current" / "model.safetensors").read_bytes() == b"v11"


def test_the_link_is_relative_so_that_the_root_can_be_moved(tmp_path: Path):
    publish_one(Root(tmp_path / "here"))
    os.rename(tmp_path / "here", tmp_path / "there")
    assert name_of_current(Root(tmp_path / "there")) == "v1"
    assert (tmp_path / "there/models/production/current/manifest.json").is_file()


def test_rollback_goes_back_one_promotion_at_a_time_until_there_is_none(tmp_path: Path):
    root = Root(tmp_path)
    for _ in range(3):
        publish_one(root)
    assert [version.name for version in rollback(root, "production")] == ["v3", "v2"]
    assert [version.name for version in rollback(root, "production")] == ["v2", "v1"]
    with pytest.raises(NotFoundError, match="v1 is the first version"):
        rollback(root, "production")
    assert name_of_current(root) == "v1"
    assert len(versions(root, "production")) == 3


def test_rollback_after_a_rollback_and_a_promotion_skips_what_was_rolled_back(tmp_path: Path):
    root = Root(tmp_path)
    publish_one(root)
    publish_one(root)
    rollback(root, "production")
    assert publish_one(root).name == "v3"
    assert [version.name for version in rollback(root, "production")] == ["v3", "v1"]


def test_rollback_of_an_alias_without_a_version_is_an_error(tmp_path: Path):
    with pytest.raises(NotFoundError, match="nothing is promoted"):
        rollback(Root(tmp_path), "production")
    assert not Root(tmp_path).models.exists()


def test_rollback_to_a_deleted_version_is_an_error_and_the_alias_stays(tmp_path: Path):
    root = Root(tmp_path)
    first = publish_one(root)
    publish_one(root)
    os.rename(first.path, tmp_path / "elsewhere")
    with pytest.raises(NotFoundError, match="v1, which stood before v2, is no longer there"):
        rollback(root, "production")
    assert name_of_current(root) == "v2"


def test_every_move_of_the_alias_is_in_its_history(tmp_path: Path):
    root = Root(tmp_path)
    publish_one(root)
    publish_one(root, forced=True)
    rollback(root, "production")
    moves = [(move["action"], move["from"], move["to"], move["forced"]) for move in history(root, "production")]
    assert moves == [
        ("promote", None, "v1", False),
        ("promote", "v1", "v2", True),
        ("rollback", "v2", "v1", False),
    ]


def test_names_that_leave_the_root_are_refused(tmp_path: Path):
    for name in ("../other", "a/b", ".hidden", ""):
        with pytest.raises(NotFoundError):
            current(Root(tmp_path), name)


def test_what_a_refused_promotion_wrote_is_removed(tmp_path: Path):
    root = Root(tmp_path)

    def refuse() -> None:
        with staging(root, "production") as working:
            (working / "model").mkdir()
            raise PromotionRefused(["not good enough"])

    with pytest.raises(PromotionRefused):
        refuse()
    assert [path.name for path in root.alias("production").iterdir()] == [".lock"]


def test_a_reader_always_finds_a_whole_version_while_the_alias_moves(tmp_path: Path):
    root = Root(tmp_path)
    publish_one(root)
    link, stop, seen = root.alias("production") / "current", threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append((link / "model.safetensors").read_bytes())
            assert current(root, "production") is not None
            assert (link / "manifest.json").is_file()

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for _ in range(30):
            publish_one(root)
            rollback(root, "production")
        stop.set()
        reader.result(timeout=10)
    assert len(set(seen)) > 1


def test_promotions_at_once_each_get_their_own_version(tmp_path: Path):
    root = Root(tmp_path)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        made = pool.map(publish_one, [root] * 12)
    assert sorted(version.number for version in made) == list(range(1, 13))
    for version in versions(root, "production"):
        assert (version.path / "model.safetensors").read_bytes() == version.name.encode()
    chain = [move["from"] for move in history(root, "production")]
    assert chain == [None, *(f"v{number}" for number in range(1, 12))]


@pytest.mark.timeout(60)
def test_a_promotion_killed_before_its_rename_leaves_the_alias_and_no_half_version(tmp_path: Path):
    root = Root(tmp_path)
    publish_one(root)
    program = (
        "import sys, time; from pathlib import Path; from tuner.promotion.registry import staging; "
        "from tuner.spec.layout import Root\n"
        "with staging(Root(Path(sys.argv[1])), 'production') as working:\n"
        "    (working / 'model').mkdir(); print('staged', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "staged\n"
        process.send_signal(signal.SIGKILL)
    assert name_of_current(root) == "v1"
    assert [version.name for version in versions(root, "production")] == ["v1"]
    started = time.monotonic()
    assert publish_one(root).name == "v2"
    assert time.monotonic() - started < 5, "the killed process still holds the lock"
    assert not list(root.alias("production").glob(".incoming-*"))


def test_a_promotion_killed_between_rename_and_link_leaves_the_alias(tmp_path: Path):
    root = Root(tmp_path)
    publish_one(root)
    orphan = root.alias("production") / "v2"
    orphan.mkdir()
    (root.alias("production") / ".current").symlink_to("v2")
    assert name_of_current(root) == "v1"
    assert publish_one(root).name == "v3"
    assert [version.name for version in rollback(root, "production")] == ["v3", "v1"]
