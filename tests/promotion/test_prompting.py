"""The card says how to ask: its program makes the very token ids that stood before the answers in training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuner.promotion.card import _loading
from tuner.promotion.prompting import answer_mark, with_example
from tuner.promotion.samples import pick_prompts
from tuner.spec.sweep import DataSpec
from tuner.training.dataset import prepare
from tuner.training.formats import to_example

SYSTEM = {"role": "system", "content": "Answer with ``` or\n</s>."}
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}{{ mood }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant{{ mood }}]{% endif %}"
)


def question(n: int) -> str:
    return f"What is {n} plus {n}?"


def asked(n: int, *first: dict[str, str]) -> list[dict[str, str]]:
    return [*first, {"role": "user", "content": question(n)}]


def answered(n: int) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": f"It is {2 * n}."}]


def alpaca(n: int, given: str = "") -> dict[str, str]:
    return {"instruction": question(n), "input": given, "output": f"It is {2 * n}."}


def rows_of(make: Any) -> list[dict[str, Any]]:
    return [make(n) for n in range(12)]


FORMATS: dict[str, Any] = {
    "chat": (rows_of(lambda n: {"messages": asked(n) + answered(n)}), {}, {}),
    "chat pairs with a system message": (
        rows_of(lambda n: {"prompt": asked(n, SYSTEM), "completion": answered(n)}),
        {},
        {},
    ),
    "chat of another template with settings": (
        rows_of(lambda n: {"messages": asked(n) + answered(n), "chat_template_kwargs": {"mood": "!"}}),
        {},
        {"chat_template_path": "template.jinja"},
    ),
    "prompts": (rows_of(lambda n: {"prompt": f"Q: {question(n)}\nA: ", "completion": f"It is {2 * n}."}), {}, {}),
    "Alpaca": (rows_of(alpaca), {}, {}),
    "Alpaca, every token a target": (rows_of(alpaca), {}, {"completion_only_loss": False}),
    "Alpaca with inputs": (rows_of(lambda n: alpaca(n, "numbers")), {}, {}),
    "Alpaca with an input here and there": (rows_of(lambda n: alpaca(n, "numbers" if n % 2 else "")), {}, {}),
    "a template": (
        rows_of(lambda n: {"the question": question(n), "answer": f"It is {2 * n}."}),
        {"template": '{{Q}} {the question}\n"A": {answer}\n'},
        {},
    ),
    "text": (rows_of(lambda n: {"text": f"{question(n)} It is {2 * n}, as everybody knows."}), {}, {}),
    "tokens": (rows_of(lambda n: {"input_ids": [n + 5, 6, 7, 8], "labels": [-100, -100, 7, 8]}), {}, {}),
}


class Model:
    """Stands for the promoted model where only what it is asked matters."""

    @classmethod
    def from_pretrained(cls, folder: str, dtype: str) -> Model:
        return cls()

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        return input_ids


def inputs_of(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **filled_in: str) -> list[int]:
    """Run the program of a card, its `...` filled in, and return the token ids that it asks with."""
    (program,) = re.findall(r"^`{3,}python\n(.*?)^`{3,}$", card, re.MULTILINE | re.DOTALL)
    program = program.replace('folder = "."', f"folder = {str(folder)!r}")
    for name, value in filled_in.items():
        dots = re.compile(rf"""({name}'?)( = |: )["']\.\.\.["']""")
        program = dots.sub(lambda found, value=value: f"{found[1]}{found[2]}{value!r}", program)
    assert '"..."' not in program
    known: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM", Model)
        exec(program, known)
    return known["inputs"]["input_ids"][0].tolist()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_program_on_the_card_asks_with_the_ids_that_stood_before_the_answers_in_training(
    kind, tiny_model_dir, tmp_path, monkeypatch
):
    rows, data, train = FORMATS[kind]
    monkeypatch.chdir(tmp_path)
    Path("template.jinja").write_text(TEMPLATE)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = DataSpec(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.25, **data).model_dump()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prepared = prepare(spec, train, tokenizer, tmp_path / "cache", 256)
    tokenizer.save_pretrained(tmp_path / "saved")
    facts = prepared.summary["prompting"]
    json.dumps(facts)
    kept = load_from_disk(str(prepared.eval))
    prompts = pick_prompts(kept, 3, tokenizer, answer_mark(facts, tokenizer))
    card = _loading(with_example(facts, tokenizer, prompts))
    for prompt in prompts[: 1 if kind in ("prompts", "text", "tokens") else 3]:
        text = tokenizer.decode(prompt)
        said = re.search(r"What is \d+ plus \d+\?", text)
        filled_in = {"input": "numbers" if "\nnumbers" in text else ""}
        if said:
            filled_in |= dict.fromkeys(("instruction", "the_question", "content"), said[0])
        assert inputs_of(card, tmp_path / "saved", monkeypatch, **filled_in) == prompt
    if "Alpaca" in kind or kind == "a template":
        assert "not on a chat template" in card
    if kind != "text":
        assert "It is" not in tokenizer.decode(prompts[0])


def test_a_sweep_of_an_earlier_version_shows_a_prompt_as_it_was(tiny_model_dir, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.save_pretrained(tmp_path)
    chat = tokenizer.apply_chat_template(asked(3), add_generation_prompt=True)["input_ids"]
    for prompt in (chat, tokenizer("Q: Why?\nA:")["input_ids"]):
        assert inputs_of(_loading(with_example(None, tokenizer, [prompt])), tmp_path, monkeypatch) == prompt


def test_an_end_token_that_a_tokenizer_adds_is_no_part_of_a_prompt(tiny_model_dir, tmp_path, monkeypatch):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompt = tokenizer("Q: Why?\nA:")["input_ids"]
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {end[0]}", special_tokens=[end])
    assert tokenizer("a")["input_ids"][-1] == end[1]
    tokenizer.save_pretrained(tmp_path)
    card = _loading(with_example({"kind": "prompt"}, tokenizer, [prompt]))
    assert inputs_of(card, tmp_path, monkeypatch) == prompt


def test_a_model_that_learned_alpaca_answers_better_as_the_card_asks_than_by_the_chat_template(
    tiny_model_dir, tmp_path, monkeypatch
):
    """Both ways are scored: the nats of each answer's tokens after the prompt."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.save_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    rows = [to_example("alpaca", alpaca(n)) for n in range(12)]
    pairs = [(tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]) for row in rows]  # type: ignore[index]

    def nats(prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + answer])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        return model(input_ids=ids, labels=labels).loss

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for prompt, answer in pairs * 4:
        nats(prompt, answer).backward()
        optimizer.step()
        optimizer.zero_grad()

    card = _loading(with_example({"kind": "alpaca", "input": "none"}, tokenizer, [pairs[0][0]]))
    by_card, by_chat, trained = 0.0, 0.0, 0.0
    for n, (prompt, answer) in enumerate(pairs):
        chat = tokenizer.apply_chat_template(asked(n), add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            trained += float(nats(prompt, answer)) / 12
            by_card += float(nats(inputs_of(card, tmp_path, monkeypatch, instruction=question(n)), answer)) / 12
            by_chat += float(nats(chat, answer)) / 12
    assert by_card == pytest.approx(trained, abs=1e-6)
    assert by_card < by_chat - 0.3, (by_card, by_chat)
