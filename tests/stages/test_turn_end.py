"""A policy whose turns end with another token than its tokenizer's end token: given answers end as sampled ones do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import stage_config
from transformers import AutoTokenizer

from grpo_safe import models
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.rollout import answer_end, end_tokens
from grpo_safe.stages import train_policy
from grpo_safe.stages.train_policy import collecting


def two_ends(folder: Path, listed: bool = True) -> Path:
    """The tiny policy with <|endoftext|> as its tokenizer's end, and <|im_end|> behind each turn; listed: in its generation config."""
    shutil.copytree(embedded_folder("embedded:tiny-llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [tokenizer.eos_token_id, *([turn_end] if listed else [])]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))
    return folder


@pytest.mark.parametrize(("listed", "expected"), [(True, "<|im_end|>"), (False, "<|endoftext|>")])
def test_an_answer_ends_with_a_token_that_ends_sampling(tmp_path: Path, listed: bool, expected: str) -> None:
    start = models.Start("x", str(two_ends(tmp_path / "model", listed)), {})
    tokenizer, model = models.load_tokenizer(start), models.load_causal_lm(start, "float32")
    end = answer_end(model, tokenizer)
    assert tokenizer.convert_ids_to_tokens(end) == expected
    assert end in end_tokens(model, tokenizer)
    tokenizer.chat_template = None
    assert answer_end(model, tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize("lora", ["true", "false"])
def test_given_answers_end_as_sampled_ones(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: str) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    seen = []
    kept = collecting.given
    monkeypatch.setattr(collecting, "given", lambda *a, **k: seen.append(kept(*a, **k)) or seen[-1])
    cfg = stage_config(
        "train-policy", tmp_path / "run", store, f"policy.start={two_ends(tmp_path / 'model')}", f"policy.lora.enabled={lora}",
        "rollout=dataset", "algo=dpo", "train.steps=1", "sampling.max_new_tokens=200",
    )  # fmt: skip
    train_policy.run(cfg, tmp_path / "run")
    (rollout, rows) = seen[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    last = [row[mask.bool()][-1].item() for row, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]
    assert not rollout.truncated.any() and set(tokenizer.convert_ids_to_tokens(last)) == {"<|im_end|>"}
    assert rollout.texts == [row.response.strip() for row in rows]
