"""A start whose config has dropouts: none is active in training, and the published config keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import read_metrics, stage_config
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from grpo_safe.models.embedded import embedded_folder
from grpo_safe.stages import train_policy


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with its default dropouts of .1."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-llama"))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=512, **ends)
    assert config.attn_pdrop == config.resid_pdrop == config.embd_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_no_dropout_in_training(gpt2: Path, tiny_store: Path, tmp_path: Path, lora: bool, packed: bool) -> None:
    words = (f"policy.start={gpt2}", f"policy.lora.enabled={lora}", f"train.packed={packed}")
    fixed = ("optim.lr=1e-9", "algo.kl_coef=0.04", "train.steps=3", "algo.updates_per_rollout=2")
    cfg = stage_config("train-policy", tmp_path, tiny_store, *words, *fixed)
    train_policy.run(cfg, tmp_path)
    for row in read_metrics(tmp_path):
        assert row["kl"] < 1e-5, row["kl"]  # with dropout 2.6 nats a token were seen
        assert row["sampler_gap"] < 1e-4
    published = max((tiny_store / "policy").iterdir(), key=lambda folder: folder.stat().st_mtime)
    assert json.loads((published / "config.json").read_text())["resid_pdrop"] == 0.1
