"""Files, overrides and places: what a YAML becomes before anything is done with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.errors import NotFoundError, SpecError
from tuner.spec.load import check_file, dump_spec, load_spec, parse_spec
from tuner.spec.text import parse_yaml, read_scalar, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("2_000_000", 2_000_000),
        ("-3", -3),
        ("017", 17),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("~", None),
        ("12:30:45", "12:30:45"),
        ("2020-01-01", "2020-01-01"),
        ("0x1F", "0x1F"),
        ("1__0", "1__0"),
    ],
)
def test_scalars_are_read_as_yaml_1_2_and_people_write_them(text, value):
    assert read_scalar(text) == value
    assert type(read_scalar(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "place", "got"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1", "a twice"),
        ("a: !!python/object:os.system x", "line 1, column 4", "the tag tag:yaml.org,2002:python/object:os.system"),
        ("a: !secret x", "line 1, column 4", "the tag !secret"),
        ("a: [1\nb: 2", "line 2, column 2", "expected ',' or ']', but got ':'"),
        ("a: b: c", "line 1, column 5", "mapping values are not allowed here"),
        ("? [a]\n: 1", "line 1, column 3", "a list or mapping as a key"),
        ("a: &x [*x]", "line 1, column 8", "*x"),
        ("a: 1\n---\nb: 2", "line 2, column 1", "a second document"),
        ('a: "\\ud800"', "line 1, column 4", "half a character"),
        ("[" * 3000, "line 1, column 42", "values nested over 40 deep"),
    ],
)
def test_broken_or_unsafe_yaml_is_refused_with_its_line(text, place, got):
    with pytest.raises(SpecError) as error:
        parse_yaml(text)
    (problem,) = error.value.problems
    assert (problem.key, problem.got) == (place, got)


def test_aliases_may_share_values_but_not_explode():
    assert parse_yaml("a: &lr [1, 2]\nb: *lr") == {"a": [1, 2], "b": [1, 2]}
    levels = [f"x{n + 1}: &x{n + 1} [{', '.join([f'*x{n}'] * 10)}]" for n in range(9)]
    with pytest.raises(SpecError, match="over 20000 values"):
        parse_yaml("x0: &x0 [1]\n" + "\n".join(levels))


def test_what_is_written_reads_back_as_the_same_value():
    value = {
        "a": ["1e5", "2_000", "no", "null", "", "~", "2020-01-01", "- x", "a: b", "#", " x", "é\u2028\a"],
        "b": 1e-5,
    }
    assert parse_yaml(write_yaml(value)) == value


def test_a_spec_that_is_dumped_loads_as_the_same_spec(good, tmp_path):
    spec = load_spec(good, ["space.model.dtype={type: choice, values: [float32, bfloat16]}", "budget.time_limit=1h30m"])
    assert spec.budget.time_limit == 5400
    file = tmp_path / "elsewhere" / "spec.yaml"
    file.parent.mkdir()
    file.write_text(dump_spec(spec))
    assert load_spec(file) == spec


def test_overrides_reach_every_key(good):
    spec = load_spec(
        good,
        [
            "budget.trials=12",
            "train.learning_rate=1e-4",
            "space.train.learning_rate=null",
            "space.lora.r.values=[16, 32]",
            "space.train.warmup_steps={type: uniform, low: 0, high: 0.5}",
            "space.lora.r.when.train.packing=[bfd]",
            "train.lr_scheduler_kwargs.num_cycles=1",
            "promotion=null",
        ],
    )
    assert spec.budget.trials == 12
    assert spec.train == {"learning_rate": 1e-4, "lr_scheduler_kwargs": {"num_cycles": 1}}
    assert list(spec.space) == ["train.packing", "lora.r", "train.warmup_steps"]
    assert spec.space["lora.r"].model_dump() == {
        "type": "choice",
        "values": [16, 32],
        "when": {"train.packing": ["bfd"]},
    }
    assert spec.promotion is None


def test_overrides_that_cannot_be_followed_are_all_named(good):
    spec, problems = check_file(good, ["budget.trials", "name.first=x", "lora.r=[1", "..=1"])
    assert spec is None
    assert [problem.key for problem in problems] == [
        "--set budget.trials",
        "--set name.first=x",
        "--set lora.r=[1",
        "--set ..=1",
    ]


def test_paths_start_from_the_file_and_the_storage_from_the_current_folder(good, tmp_path, monkeypatch):
    for name in ("rows.jsonl", "eval.jsonl", "chat.jinja"):
        (tmp_path / name).write_text("{}")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("TUNER_ROOT", raising=False)
    template = "train.chat_template_path=chat.jinja"
    spec = load_spec(good, ["data.path=rows.jsonl", "data.eval_path=./eval.jsonl", template, "storage.root=out"])
    assert spec.data.path == str(tmp_path / "rows.jsonl")
    assert spec.data.eval_path == str(tmp_path / "eval.jsonl")
    assert spec.train["chat_template_path"] == str(tmp_path / "chat.jinja")
    assert spec.storage.root == str(here / "out")
    assert spec.model.name == "org/model"


def test_a_folder_with_a_model_is_a_path_and_a_hub_id_is_left_alone(good, tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "org" / "model" / name).write_text("{}")
    assert load_spec(good).model.name == str(tmp_path / "org" / "model")
    assert load_spec(good, ["model.name=Qwen/Qwen2.5-0.5B"]).model.name == "Qwen/Qwen2.5-0.5B"


def test_the_root_is_the_argument_then_the_environment_then_the_spec(good, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNER_ROOT", str(tmp_path / "environment"))
    in_spec = [f"storage.root={tmp_path / 'spec'}"]
    assert load_spec(good, in_spec, root=tmp_path / "argument").storage.root == str(tmp_path / "argument")
    assert load_spec(good, in_spec).storage.root == str(tmp_path / "environment")
    monkeypatch.delenv("TUNER_ROOT")
    assert load_spec(good, in_spec).storage.root == str(tmp_path / "spec")
    monkeypatch.chdir(tmp_path)
    assert load_spec(good).storage.root == str(tmp_path / "runs")


def test_a_relative_sqlite_study_is_made_absolute_and_variables_are_left(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_spec(good, ["storage.study=sqlite:///s.db"]).storage.study == f"sqlite:///{tmp_path / 's.db'}"
    url = "postgresql://tuner:${PASSWORD}@host/tuner"
    assert load_spec(good, [f"storage.study={url}"]).storage.study == url


def test_a_spec_for_elsewhere_may_name_what_is_not_here_but_holds_no_secret(good):
    here = {
        "data.path": "/shared/rows.jsonl",
        "model.name": "package:of_their_image",
        "train.optim": "adamw_anyprecision",
    }
    overrides = [f"{key}={value}" for key, value in here.items()]
    spec = load_spec(good, overrides, elsewhere=True)
    assert (spec.data.path, spec.model.name) == ("/shared/rows.jsonl", "package:of_their_image")
    with pytest.raises(SpecError) as refused:
        load_spec(good, overrides)
    assert {problem.key for problem in refused.value.problems} == set(here)
    with pytest.raises(SpecError, match="a URL with a password"):
        load_spec(good, [*overrides, "storage.study=postgresql://me:secret@host/db"], elsewhere=True)


def test_a_spec_that_is_not_there_is_not_found(good, tmp_path):
    with pytest.raises(NotFoundError, match=r"did you mean .*good\.yaml"):
        load_spec(tmp_path / "goood.yaml")
    with pytest.raises(NotFoundError):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"# nothing", b"[1]", b"name", b"\xff\xfe", b"name: \x00", b"a: [", b"x" * 1_000_001]
)
def test_a_file_that_is_no_spec_is_refused(content, tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_bytes(content)
    with pytest.raises(SpecError):
        load_spec(file)


def test_a_spec_can_be_made_from_plain_values(tmp_path):
    values = {
        "name": "plain",
        "model": {"name": "org/model"},
        "data": {"path": "org/rows"},
        "space": {"lora.r": {"type": "int", "low": 1, "high": 4}},
        "budget": {"trials": 2, "steps_per_trial": 8},
    }
    spec = parse_spec(values, base=tmp_path, root=tmp_path)
    assert spec.name == "plain"
    assert Path(spec.storage.root) == tmp_path
    with pytest.raises(SpecError):
        parse_spec({**values, "name": 5}, base=tmp_path)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("4h", 14400), ("1h30m", 5400), ("1.5d", 129600), ("45", 45)]
)
def test_durations_become_seconds(text, seconds, good):
    assert load_spec(good, [f"budget.time_limit={text}"]).budget.time_limit == seconds
