"""Prompts as the policy reads them: chat templates of other families, tokenizers that end every text, prompts that are too long."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics, stage_config
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from grpo_safe.data.text import encode_for_scoring, encode_prompts
from grpo_safe.errors import UserError
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.records import Prompt
from grpo_safe.stages import evaluate, train_policy

STRICT_TURNS = (  # no system role, turns that alternate: as Gemma's
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEAF = STRICT_TURNS.replace("{{ raise_exception('System role not supported') }}", "{% set messages = messages[1:] %}")  # drops it
LONG = " ".join(f"word{i}" for i in range(200))


def policy_with(folder: Path, template: str | None = None, ends_texts: bool = False) -> Path:
    """The tiny policy with another chat template (null: none), or a tokenizer that puts its end token behind every text."""
    shutil.copytree(embedded_folder("embedded:tiny-llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.chat_template = template
    if ends_texts:
        end = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        )
    tokenizer.save_pretrained(folder)
    return folder


def data(path: Path, *prompts: Any) -> tuple[str, ...]:
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return ("data=files", f"data.train={path}", f"data.validation={path}")


def train(tmp_path: Path, store: Path, *words: str) -> Path:
    cfg = stage_config("train-policy", tmp_path / "run", store, "train.steps=1", *words)
    train_policy.run(cfg, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


# --- chat templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [STRICT_TURNS, DEAF])
def test_a_system_text_opens_the_first_turn_where_the_template_takes_none(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str], template: str
) -> None:
    start = policy_with(tmp_path / "model", template)
    tokenizer = AutoTokenizer.from_pretrained(start)
    prompt = Prompt("p", [{"role": "user", "content": "Hi"}])
    (ids,) = encode_prompts(tokenizer, [prompt], "Be kind.", 200).ids
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nBe kind.\n\nHi<|im_end|>\n<|im_start|>assistant\n")
    scored = encode_for_scoring(tokenizer, Prompt("p", [{"role": "system", "content": "S."}, *prompt.messages]), "Yes", 200)
    assert "user\nS.\n\nHi<|im_end|>" in tokenizer.decode(scored.ids)
    capsys.readouterr()
    train(
        tmp_path, store, f"policy.start={start}", *data(tmp_path / "rows.jsonl", "Hi", "Name a colour.", "Boil an egg?", "Why?")
    )
    said = capsys.readouterr()
    assert (said.out + said.err).count("4 of 4 prompts bring a system text that the chat template does not take") == 1


def test_turns_that_the_template_refuses_name_the_prompt(tmp_path: Path, store: Path) -> None:
    start = policy_with(tmp_path / "model", STRICT_TURNS)
    twice = [{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}]
    with pytest.raises(UserError, match=r"policy\.start, prompt \w{16} .*One.*\(system, user, user\): .*must alternate"):
        train(tmp_path, store, f"policy.start={start}", *data(tmp_path / "rows.jsonl", "Hi", twice))


def test_a_broken_template_is_one_sentence(tmp_path: Path, store: Path) -> None:
    start = policy_with(tmp_path / "model", "{% for message in messages %}{{ message['content'] }}")
    with pytest.raises(UserError, match=r"policy\.start, prompt .*the chat template refuses"):
        train(tmp_path, store, f"policy.start={start}", *data(tmp_path / "rows.jsonl", "Hi"))


def test_no_prompt_ends_with_the_end_token(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_with(tmp_path / "model", None, ends_texts=True))
    assert tokenizer("Hi\n\n")["input_ids"][-1] == tokenizer.eos_token_id
    (ids,) = encode_prompts(tokenizer, [Prompt("p", [{"role": "user", "content": "Hi"}])], None, 200).ids
    assert tokenizer.decode(ids) == "Hi\n\n"


# --- prompts that are too long ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "bound"),
    [
        ("sampling.max_prompt_tokens=40", r"sampling\.max_prompt_tokens=40 leaves 40\."),
        ("sampling.max_new_tokens=480", r"the model's context of 512 beside sampling\.max_new_tokens=480 leaves 32\."),
    ],
)
def test_the_bound_that_a_prompt_breaks_is_named(tmp_path: Path, store: Path, word: str, bound: str) -> None:
    with pytest.raises(UserError, match=rf"prompt \w{{16}} .*word0.*{bound}.*data\.overlong"):
        train(tmp_path, store, word, "policy.system_prompt=null", *data(tmp_path / "rows.jsonl", LONG))


@pytest.mark.parametrize("overlong", ["skip", "cut"])
def test_prompts_that_are_too_long_are_left_out_or_cut(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str], overlong: str
) -> None:
    short = ["Hi", "Name a colour.", "Boil an egg?", "Why?"]
    words = ("sampling.max_prompt_tokens=64", f"data.overlong={overlong}", *data(tmp_path / "rows.jsonl", *short, LONG))
    heldout = tmp_path / "heldout.jsonl"
    data(heldout, *(f"{prompt} And then?" for prompt in (*short, LONG)))
    words += (f"data.heldout={heldout}",)
    capsys.readouterr()
    run_dir = train(tmp_path, store, "train.prompts_per_step=5" if overlong == "cut" else "train.prompts_per_step=4", *words)
    assert len(read_metrics(run_dir)) == 1
    eval_dir = tmp_path / "eval"
    evaluate.run(stage_config("eval", eval_dir, store, "reward_model=latest", *words), eval_dir)
    said = capsys.readouterr()
    what = {"skip": "are left out", "cut": "lost the left side of their text"}[overlong]
    for split in ("train", "heldout"):
        assert sum(f"data.{split}: 1 of 5 prompts" in line and what in line for line in (said.out + said.err).splitlines()) == 1
    found = json.loads((eval_dir / "metrics.json").read_text())
    assert found["prompts"] == (4 if overlong == "skip" else 5)


def test_a_cut_prompt_fits_and_keeps_its_end_and_its_turns() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-llama"))
    messages = [
        {"role": "user", "content": "ä" * 300}, {"role": "assistant", "content": "earlier"}, {"role": "user", "content": LONG},
    ]  # fmt: skip
    read = encode_prompts(tokenizer, [Prompt("p", messages)], "Be kind.", 120, "cut")
    text = tokenizer.decode(read.ids[0])
    assert len(read.ids[0]) <= 120 and len(read.ids[0]) > 110
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>") and text.endswith(
        "word199<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [m["role"] for m in read.prompts[0].messages] == ["user", "assistant", "user"] and read.prompts[0].id == "p"
    assert messages[2]["content"] == LONG  # what was given is not changed
    with pytest.raises(UserError, match="cannot make it fit"):
        encode_prompts(tokenizer, [Prompt("p", messages)], "Be kind.", 12, "cut")


def test_all_prompts_left_out_is_an_error(tmp_path: Path, store: Path) -> None:
    words = ("sampling.max_prompt_tokens=64", "data.overlong=skip", *data(tmp_path / "rows.jsonl", LONG))
    with pytest.raises(UserError, match=r"all 1 prompts have more than 64 tokens.*max_prompt_tokens=64"):
        train(tmp_path, store, *words)
