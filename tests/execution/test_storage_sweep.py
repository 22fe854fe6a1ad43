"""A sweep whose files are in S3 and whose records are in PostgreSQL; its node is lost, and another goes on."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from real_sweeps import Command, write_spec
from servers import PASSWORD, PASSWORD_VARIABLE, Postgres

import tuner
from tuner.promotion.registry import current
from tuner.results.record import TrialRecord
from tuner.spec.layout import Root

pytestmark = pytest.mark.timeout(400)

NAME = "afar"
BUDGET = 12_000
POINTS = [
    {"train.learning_rate": 1e-3, "lora.use_dora": False},
    {"train.learning_rate": 2e-3, "lora.use_dora": False},
    {"train.learning_rate": 3e-3, "lora.use_dora": True},  # trains apart, in a process of its own
]


@dataclass
class Story:
    """What both drivers said, what was there when the first was gone, and what commands elsewhere print in the end."""

    root: str
    first: list[str]
    second: list[str]
    code: int
    cut_off: list[TrialRecord]
    answers: dict[str, str]
    folders: list[Path]


def answer(folder: Path, *arguments: str) -> str:
    command = Command(*arguments, cwd=folder, TUNER_CACHE=str(folder / "client"))
    try:
        assert command.end() == 0, command.lines
    finally:
        command.kill()
    return "\n".join(command.lines)


@pytest.fixture(scope="module")
def story(
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    postgres_server: Postgres,
    s3_server: dict[str, str],
) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("afar")
    root = f"s3://team/{uuid.uuid4().hex[:8]}/runs"
    space: dict[str, Any] = {
        "train.learning_rate": {"type": "log_uniform", "low": 1e-3, "high": 5e-3},
        "lora.use_dora": {"type": "choice", "values": [False, True]},
    }
    file = write_spec(
        folder,
        tiny_model_dir,
        NAME,
        space=space,
        search={"sampler": "random", "enqueue": POINTS},
        budget={"trials": 3, "tokens_per_trial": BUDGET, "evals_per_trial": 4},
        resources={"share_base": 3},
        promotion={"max_regression": 0.5},
        storage={"root": root, "study": postgres_server.new_study()},
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**s3_server, PASSWORD_VARIABLE: PASSWORD, "TUNER_CACHE": str(folder / "client")}.items():
            environment.setenv(name, value)
        run = Command("run", file, cwd=folder, TUNER_CACHE=str(folder / "lost"))
        try:
            run.wait_for("trial 0 at ")
            run.wait_for("trial 1 at ")
        finally:
            run.kill()
        cut_off = tuner.open(NAME, root).records()
        resume = Command("resume", NAME, "--root", root, cwd=folder, TUNER_CACHE=str(folder / "found"))
        try:
            code = resume.end(300)
        finally:
            resume.kill()
        ask = {"results": ["--json"], "show": ["0"], "status": []}
        answers = {name: answer(folder, name, NAME, *words, "--root", root) for name, words in ask.items()}
        folders = [folder / "lost", folder / "found", folder / "client"]
        yield Story(root, run.lines, resume.lines, code, cut_off, answers, folders)


def test_a_driver_on_another_node_ends_the_sweep_with_every_trial_and_a_promoted_model(story):
    assert story.code == 0, story.second
    sweep = tuner.open(NAME, story.root)
    assert sweep.status == "finished"
    assert [trial.outcome for trial in sweep.records()] == ["COMPLETED"] * 3
    promoted = sweep.state().promoted
    assert promoted["path"] == f"{story.root}/models/production/v1"
    version = current(Root.at(story.root), "production")
    assert version is not None
    assert version.manifest()["trial"] == sweep.best.number


def test_trials_go_on_there_from_their_last_evaluation(story):
    done = {trial.number: trial for trial in tuner.open(NAME, story.root).records()}
    cut_off = [trial for trial in story.cut_off if trial.outcome == "INTERRUPTED" and trial.reports]
    assert cut_off
    root = Root.at(story.root)
    log = root.read(root.sweep(NAME).log)
    for trial in cut_off:
        assert done[trial.number].reports[: len(trial.reports) - 1] == trial.reports[:-1]
        assert f"trial {trial.number} goes on from its last evaluation" in log


def test_what_lasts_is_in_the_store_and_nothing_that_only_a_running_trial_needs(story):
    root, sweep = Root.at(story.root), tuner.open(NAME, story.root)
    assert root.names(root.path) == ["models", "sweeps"]
    assert {"eval", "promotion.log", "spec.yaml", "sweep.log", "trials"} == set(root.names(sweep.folder.path))
    kept = [name for trial in range(3) for name in root.names(sweep.folder.trial(trial))]
    assert len([name for name in kept if name.startswith("tokens-")]) == 3
    assert {name for name in kept if not name.startswith("tokens-")} <= {"trial.log"}
    for trial in sweep.records():
        assert trial.adapter_path.startswith(f"{story.root}/sweeps/{NAME}/trials/")
        assert root.exists(sweep.folder.adapter(trial.number, trial.report.tokens))


def test_the_promoted_model_is_fetched_and_loads(story, tmp_path):
    from transformers import AutoModelForCausalLM

    root = Root(tmp_path / "server", story.root)
    version = current(root, "production")
    assert version is not None
    model = AutoModelForCausalLM.from_pretrained(root.fetch(version.path))
    assert model.num_parameters() > 0


def test_other_processes_read_it_with_the_url_alone(story):
    results = json.loads(story.answers["results"])
    assert (results["status"], len(results["trials"])) == ("finished", 3)
    assert all(trial["adapter_path"].startswith(story.root) for trial in results["trials"])
    assert "COMPLETED" in story.answers["show"]
    assert f"{story.root}/models/production/v1" in story.answers["status"]


def test_the_workers_of_one_trial_put_one_adapter_there(tiny_model_dir, tmp_path, s3_root, postgres_study):
    file = write_spec(
        tmp_path,
        tiny_model_dir,
        "two",
        budget={"trials": 1, "tokens_per_trial": 2000, "evals_per_trial": 2},
        resources={"workers_per_trial": 2, "share_base": "off"},
        promotion=None,
        storage={"root": s3_root, "study": postgres_study},
    )
    run = Command("run", file, cwd=tmp_path)
    try:
        assert run.end() == 0, run.lines
    finally:
        run.kill()
    (trial,) = tuner.open("two", s3_root).records()
    assert len(trial.reports) == 2
    root = Root.at(s3_root)
    folder = root.fetch(root.sweep("two").adapter(trial.number, trial.report.tokens))
    assert {file.name for file in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_the_password_is_nowhere(story):
    said = "\n".join([*story.first, *story.second, *story.answers.values()])
    assert PASSWORD not in said
    for file in (file for folder in story.folders for file in folder.rglob("*") if file.is_file()):
        assert PASSWORD.encode() not in file.read_bytes(), file
    root = Root.at(story.root)
    for key in [found["path"] for found in root.objects._api.list(root.objects._store).collect()]:
        assert PASSWORD.encode() not in bytes(root.objects._api.get(root.objects._store, key).bytes()), key
    assert os.environ.get(PASSWORD_VARIABLE) == PASSWORD  # or this test would look for nothing
