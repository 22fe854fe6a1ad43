"""Versions and the alias: kept, moved in one step, moved back, safe among processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tuner.errors import AliasMoved, NotFoundError, PromotionRefused, TunerError
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


def _copied_without_links(root: Root, home: Path) -> None:
    link = home / "current"
    folder = home / os.readlink(link)
    link.unlink()
    shutil.copytree(folder, link)


def _in_place_of_the_link(root: Root, home: Path) -> None:
    (home / "current").unlink()
    (home / "current").write_text("v1")


def _leads_nowhere(root: Root, home: Path) -> None:
    shutil.rmtree(home / "v1")


def _leads_elsewhere(root: Root, home: Path) -> None:
    publish_one(root, "other")
    (home / "current").unlink()
    (home / "current").symlink_to("../other/v1")


def _leads_out(root: Root, home: Path) -> None:
    (home / "current").unlink()
    (home / "current").symlink_to("/usr")


BROKEN_LINKS = {
    "no symbolic link to a version: it was copied without links": _copied_without_links,
    "no symbolic link to a version": _in_place_of_the_link,
    "points at v1, which is no version of it; there is none": _leads_nowhere,
    "other/v1, which is no version of it": _leads_elsewhere,
    "current is, or lies behind, a symbolic link that leads out of": _leads_out,
}


@pytest.mark.parametrize("said", BROKEN_LINKS)
def test_an_alias_that_was_copied_or_moved_by_hand_is_refused_before_anything_is_written(tmp_path: Path, said: str):
    root = Root(tmp_path)
    first = publish_one(root)
    BROKEN_LINKS[said](root, first.path.parent)
    before = sorted(first.path.parent.iterdir())
    for act in (publish_one, lambda root: rollback(root, "production")):
        with pytest.raises(TunerError, match=said):
            act(root)
    assert sorted(first.path.parent.iterdir()) == before


def test_what_is_said_of_a_copied_alias_mends_it(tmp_path: Path):
    root = Root(tmp_path / "a place")
    publish_one(root)
    home = publish_one(root).path.parent
    _copied_without_links(root, home)
    with pytest.raises(TunerError) as refused:
        current(root, "production")
    subprocess.run(str(refused.value).partition("such as the last: ")[2], shell=True, check=True)
    assert name_of_current(root) == "v2"


def test_an_absolute_link_to_a_version_is_followed(tmp_path: Path):
    version = publish_one(Root(tmp_path))
    link = version.path.parent / "current"
    link.unlink()
    link.symlink_to(version.path)
    assert name_of_current(Root(tmp_path)) == "v1"


@pytest.mark.parametrize("text", [None, "", '{"previous": ', "[]", "{}"])
def test_a_manifest_that_is_gone_or_broken_is_a_sentence_and_the_alias_stays(tmp_path: Path, text: str | None):
    root = Root(tmp_path)
    publish_one(root)
    manifest = publish_one(root).path / "manifest.json"
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    with pytest.raises(TunerError, match="the manifest of v2 cannot be read"):
        rollback(root, "production")
    assert name_of_current(root) == "v2"


def test_a_move_that_was_cut_off_in_the_history_swallows_no_other(tmp_path: Path):
    root = Root(tmp_path)
    publish_one(root)
    publish_one(root)
    file = root.alias("production") / "history.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    rollback(root, "production")
    assert [move["action"] for move in history(root, "production")] == ["promote", "rollback"]
    file.write_bytes(file.read_bytes()[:-1])  # the line end alone
    publish_one(root)
    assert [move["action"] for move in history(root, "production")] == ["promote", "rollback", "promote"]


def test_a_rollback_during_a_promotion_says_that_it_waits_and_leaves_the_new_version_alone(tmp_path: Path):
    root = Root(tmp_path)
    publish_one(root)
    publish_one(root)
    waits = threading.Event()

    def go_back() -> None:
        rollback(root, "production", lambda line: waits.set())

    with ThreadPoolExecutor(1) as pool:
        with staging(root, "production") as working:
            before = current(root, "production")
            back = pool.submit(go_back)
            assert waits.wait(10)
            (working / "model").mkdir()
            (working / "model" / "manifest.json").write_text('{"previous": "v2"}')
            publish(next_version(root, "production"), before, working / "model")
        with pytest.raises(AliasMoved, match="was moved by somebody else meanwhile"):
            back.result(timeout=10)
    assert name_of_current(root) == "v3"


def test_a_folder_of_models_in_which_one_may_not_write_is_a_sentence(tmp_path: Path):
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(TunerError, match=r"cannot write in .*models/production: Not a directory"):
        publish_one(Root(tmp_path))
