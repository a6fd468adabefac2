"""Policies of a hub model: published as an adapter at a commit, trained on from there, mixed in a soup, evaluated; all without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import stage_config
from omegaconf import OmegaConf

from grpo_safe import models
from grpo_safe.checks import typed, validated
from grpo_safe.config import LoraConfig
from grpo_safe.errors import UserError
from grpo_safe.launch import _resolve_versions
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.stages import evaluate, train_policy
from grpo_safe.versions import checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"
LEARNS = ("optim.lr=1e-2", "optim.warmup=0", "train.steps=2")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds someone/tiny at COMMIT, and no network."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    shutil.copytree(embedded_folder("embedded:tiny-llama"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def move_main(hub: Path) -> None:
    """The hub's main goes on to other weights."""
    repository = hub / "models--someone--tiny"
    shutil.copytree(repository / "snapshots" / COMMIT, repository / "snapshots" / LATER)
    model = models.load_causal_lm(models.resolve_start(str(repository / "snapshots" / COMMIT), None, False, "x"), "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(repository / "snapshots" / LATER)
    (repository / "refs" / "main").write_text(LATER)


def trained(store: Path, run_dir: Path, *words: str) -> checkpoint.Version:
    """One run of train-policy, its versions resolved as the launcher does; what it published."""
    cfg = OmegaConf.structured(stage_config("train-policy", run_dir, store, *LEARNS, *words))
    _resolve_versions("train-policy", cfg)
    train_policy.run(typed(validated("train-policy", cfg)), run_dir)
    return checkpoint.locate(store, "policy", "latest", "policy")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits.float()


def test_training_goes_on_from_an_adapter_of_a_hub_model(tiny_store: Path, tmp_path: Path, hub: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_store / "reward-model", store / "reward-model")
    first = trained(store, tmp_path / "a", "policy.start=someone/tiny")
    layout = first.manifest["layout"]
    assert (layout["layout"], layout["base"], layout["revision"]) == ("adapter", "someone/tiny", COMMIT)
    assert first.manifest["base"] == {"start": "someone/tiny", "revision": COMMIT}
    assert (first.path / "adapter_config.json").is_file() and not (first.path / "model.safetensors").exists()
    before = logits(models.open_policy(first.path, first.manifest, "float32"))
    base = logits(models.load_causal_lm(models.resolve_start("someone/tiny", None, False, "x"), "float32"))
    assert (before - base).abs().max() > 1e-3  # it was trained

    move_main(hub)  # what was published stays on the commit that it was trained on
    assert torch.equal(logits(models.open_policy(first.path, first.manifest, "float32")), before)
    start = models.resolve_start(str(first.path), None, False, "policy.start")
    assert not start.is_hub
    assert torch.equal(logits(models.load_causal_lm(start, "float32")), before)

    second = trained(store, tmp_path / "b", f"policy.start=v{first.manifest['version']}")
    assert first.link in second.manifest["parents"]
    assert second.manifest["layout"]["layout"] == "merged"
    assert second.manifest["layout"]["dtype"] == "float32"
    opened = models.load_causal_lm(models.resolve_start(str(second.path), None, False, "x"), "float32")
    assert not models.is_lora(opened) and not hasattr(opened, "peft_config")
    assert (logits(opened) - before).abs().max() > 1e-3  # it went on
    adapted = models.add_lora(models.load_causal_lm(start, "float32"), typed_lora(second), "CAUSAL_LM")
    adapted.load_adapter(str(second.path / "adapter"), "default")
    assert torch.allclose(logits(adapted), logits(opened), atol=1e-5)  # from where the first one stood

    mixed = trained(store, tmp_path / "c", "policy.start=v2", "algo.reference={name: soup, policies: [v1, v2]}")
    assert mixed.manifest["version"] == 3
    for version in (first, second):
        for dtype in ("float32", "bfloat16"):
            run_dir = tmp_path / f"eval-{version.name}-{dtype}"
            cfg = OmegaConf.structured(stage_config("eval", run_dir, store, f"policy={version.name}", f"dtype={dtype}"))
            _resolve_versions("eval", cfg)
            evaluate.run(typed(validated("eval", cfg)), run_dir)
            assert (run_dir / "report.md").is_file()


def typed_lora(version: checkpoint.Version) -> LoraConfig:
    return LoraConfig(**version.manifest["config"]["policy"]["lora"])


def test_full_fine_tuning_goes_on_from_an_adapter_too(tiny_store: Path, tmp_path: Path, hub: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_store / "reward-model", store / "reward-model")
    trained(store, tmp_path / "a", "policy.start=someone/tiny")
    second = trained(store, tmp_path / "b", "policy.start=v1", "policy.lora.enabled=false")
    assert second.manifest["layout"]["layout"] == "full"


def test_a_foreign_adapter_folder_is_a_start_and_one_without_a_base_is_refused(tmp_path: Path) -> None:
    start = models.resolve_start("embedded:tiny-llama", None, False, "x")
    adapted = models.add_lora(models.load_causal_lm(start, "float32"), LoraConfig(r=4), "CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    models.save_adapter(adapted, tmp_path / "own")
    opened = models.load_causal_lm(models.resolve_start(str(tmp_path / "own"), None, False, "policy.start"), "float32")
    assert torch.allclose(logits(opened), logits(adapted), atol=1e-5)
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (tmp_path / "own" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names no base model"):
        models.resolve_start(str(tmp_path / "own"), None, False, "policy.start")


def test_an_adapter_that_transformers_injects_from_the_hub_is_refused(tmp_path: Path, hub: Path) -> None:
    start = models.resolve_start("embedded:tiny-llama", None, False, "x")
    adapted = models.add_lora(models.load_causal_lm(start, "float32"), LoraConfig(r=4), "CAUSAL_LM")
    repository = hub / "models--someone--adapter"
    models.save_adapter(adapted, repository / "snapshots" / COMMIT)
    shutil.copy(Path(start.location) / "config.json", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    with pytest.raises(UserError, match="someone/adapter: the hub holds a LoRA adapter"):
        models.load_causal_lm(models.resolve_start("someone/adapter", None, False, "policy.start"), "float32")
