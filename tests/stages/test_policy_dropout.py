"""A policy whose start has dropout: the update, the reference and the old log-probs see none of it; what is published keeps the setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import read_metrics, stage_config
from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel

from grpo_safe.models.embedded import embedded_folder
from grpo_safe.stages import train_policy
from grpo_safe.versions import checkpoint


def start_with_dropout(folder: Path, kind: str) -> Path:
    """GPT-2 holds its dropouts as modules; Falcon reads some from its config in the forward."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-llama"))
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=4))
    else:
        model = FalconForCausalLM(FalconConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.1, attention_dropout=0.1,
        ))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "lora"), [("gpt2", "true"), ("gpt2", "false"), ("falcon", "true")])
def test_dropout_of_the_start_is_off_in_training_and_stands_in_what_is_published(
    tiny_store: Path, tmp_path: Path, kind: str, lora: str
) -> None:
    start = start_with_dropout(tmp_path / "start", kind)
    words = (
        f"policy.start={start}",
        f"policy.lora.enabled={lora}",
        "optim.lr=1e-9",
        "train.steps=3",
        "algo.updates_per_rollout=2",
    )
    cfg = stage_config("train-policy", tmp_path / "run", tiny_store, *words)
    train_policy.run(cfg, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 3
    assert all(abs(row["kl"]) < 1e-4 and row["ratio"] == pytest.approx(1.0, abs=1e-3) for row in rows), rows
    published = json.loads((checkpoint.locate(tiny_store, "policy", "latest", "policy").path / "config.json").read_text())
    before = json.loads((start / "config.json").read_text())
    dropouts = {name: value for name, value in before.items() if "drop" in name}
    assert any(dropouts.values())
    assert {name: published[name] for name in dropouts} == dropouts
