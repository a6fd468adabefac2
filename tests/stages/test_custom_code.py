"""A policy whose architecture comes with its checkpoint (trust_remote_code) is trained, and evaluated where eval is told to trust it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import stage_config

from grpo_safe.errors import UserError
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.stages import evaluate, train_policy

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_eval_of_a_policy_with_its_own_code(tiny_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    start = Path(shutil.copytree(embedded_folder("embedded:tiny-llama"), tmp_path / "model"))
    (start / "own.py").write_text(CODE)
    described = json.loads((start / "config.json").read_text()) | {
        "model_type": "own-llama", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }  # fmt: skip
    (start / "config.json").write_text(json.dumps(described))
    cfg = stage_config(
        "train-policy", tmp_path / "run", store, f"policy.start={start}", "train.steps=1", "policy.trust_remote_code=true"
    )
    train_policy.run(cfg, tmp_path / "run")

    words = ("reward_model=latest", "eval.prompts=4")
    with pytest.raises(UserError, match=r"its (config|tokenizer) cannot be loaded .*trust_remote_code"):
        evaluate.run(stage_config("eval", tmp_path / "no", store, *words), tmp_path / "no")
    evaluate.run(stage_config("eval", tmp_path / "yes", store, "trust_remote_code=true", *words), tmp_path / "yes")
    assert json.loads((tmp_path / "yes" / "metrics.json").read_text())["prompts"] == 4
