"""Text of others commands no terminal: the function, and every command over records that are full of it."""

from __future__ import annotations

import ast
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.made_by_hand import TRIALS, make_spec, make_sweep
from tuner.cli import commands, screens
from tuner.cli.live import Lines, LiveTable
from tuner.results.plain import plain, plain_json

HOSTILE = {
    "ansi": ("\x1b]0;owned\x07\x1b[2J", r"\x1b]0;owned\x07\x1b[2J"),
    "one byte CSI": ("\x9b2J", r"\x9b2J"),
    "carriage return": ("good\rbad", r"good\rbad"),
    "backspace": ("abc\b\b", r"abc\x08\x08"),
    "direction": ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
    "invisible": ("a\u200bb\ufeffc\u2060", r"a\u200bb\ufeffc\u2060"),
    "tags": ("\U000e0041", r"\U000e0041"),
    "line separator": ("a\u2028b", r"a\u2028b"),
    "half a character": ("\ud800", r"\ud800"),
}
PLAIN = ["two\n\tlines", "Ünïcode, 漢字, 👩\u200d🔬, می\u200cخواهم", "[red]brackets[/]", "\\x1b"]
RAW = "\x1b\x07\x9b\x08\r\u202e\u200b\u2028"
"""What no command may print."""


@pytest.mark.parametrize(("text", "written"), HOSTILE.values(), ids=HOSTILE)
def test_what_a_terminal_obeys_is_written_out(text, written):
    assert plain(text) == written
    document = json.dumps({"a": text}, ensure_ascii=False, indent=2)
    escaped = plain_json(document)
    assert json.loads(escaped) == {"a": text}
    assert escaped.isascii()


@pytest.mark.parametrize("text", PLAIN)
def test_what_only_says_something_stays(text):
    assert plain(text) == text
    assert plain_json(json.dumps(text, ensure_ascii=False)) == json.dumps(text, ensure_ascii=False)


def test_colours_are_left_out_and_line_ends_are_kept_or_written_out():
    assert plain("\x1b[36m(pid=1)\x1b[0m ready\r\n") == "(pid=1) ready\n"
    assert plain("a\tb\nc", one_line=True) == r"a\tb\nc"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile") / "runs"
    failed = replace(TRIALS[4], reason=f"{RAW}\n[red]why[/]", log_tail=f"last {RAW} words")
    sweep = make_sweep(root, [TRIALS[0], failed], status=None)
    sample = {"prompt": f"ask {RAW}", "before": RAW, "after": f"[bold]{RAW}"}
    sweep.set_promoted(
        {"alias": "production", "version": f"v1{RAW}", "path": f"/models/{RAW}", "trial": 0, "samples": [sample]}
    )
    sweep.set_status("failed", f"because {RAW}")
    make_sweep(root, name="broken").folder.spec.write_text(f'name: "{json.dumps(RAW)[1:-1]}')
    return root


ASKED = ["ls", "status pydoc-lora", "results pydoc-lora", "show pydoc-lora 1", "show pydoc-lora", "report pydoc-lora"]


@pytest.mark.parametrize("as_json", [False, True], ids=["words", "json"])
@pytest.mark.parametrize("words", [*ASKED, "check hostile.yaml", "show pydoc-lora 99"])
def test_no_command_prints_what_a_terminal_obeys(words, as_json, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hostile.yaml").write_text(json.dumps({"name": RAW, RAW: 1, "data": {"path": RAW}, "train": {"optim": RAW}}))
    arguments = [*words.split(), *(["--json"] if as_json else [])]
    result = CliRunner().invoke(commands.app, arguments, env={"TUNER_ROOT": str(root)})
    assert [mark for mark in RAW if mark in result.output] == []
    if as_json and result.exit_code == 0:
        assert json.loads(result.stdout)


def test_json_gives_the_text_exactly(root):
    result = CliRunner().invoke(commands.app, ["show", "pydoc-lora", "1", "--json"], env={"TUNER_ROOT": str(root)})
    assert json.loads(result.stdout)["log_tail"] == f"last {RAW} words"


def test_nor_do_the_displays_of_a_run(tmp_path, monkeypatch, capsys):
    spec = make_spec(tmp_path)
    record = next(one for one in make_sweep(tmp_path).trials() if one.number == 4)
    record = replace(record, reason=f"[red]{RAW}[/]")
    for terminal in (False, True):
        stream = io.StringIO()
        console = Console(file=stream, width=200, height=50, force_terminal=terminal, color_system=None)
        if terminal:
            table = LiveTable(spec, [record], console)
            table.stage(f"[red]{RAW}[/]")
            console.print(table.render())
        else:
            lines = Lines(spec, console)
            lines.stage(f"[red]{RAW}[/]")
            lines.trial_finished(record)
        printed = stream.getvalue()
        assert [mark for mark in RAW if mark in printed] == []
        assert r"[red]\x1b\x07" in printed
    screens.show_endings([record])
    assert r"[red]\x1b\x07" in capsys.readouterr().out


def test_the_commands_print_in_one_place_only():
    """`say` and `deliver` of output.py, `print_line` and `Lines` with what `line` and `plain` made."""
    found = set()
    for file in Path(commands.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "console.print"):
                found.add((file.name, ast.unparse(node.func)))
    assert found == {
        ("output.py", "typer.echo"),
        ("screens.py", "console.print"),
        ("anywhere.py", "print"),  # base64
        ("commands.py", "print"),  # where stdout takes nothing any more
    }
