"""What is published is what was trained: merged in float32, refused where it rounds away, opened again as an adapter's base and start."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import cli, stage_config

from grpo_safe import models
from grpo_safe.config import BackboneConfig, LoraConfig, PolicyConfig
from grpo_safe.errors import UserError
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.stages import train_policy

PROBE = [list(range(5, 40)), list(range(100, 150))]


def adapted(scale: float) -> torch.nn.Module:
    """A tiny policy whose adapter has moved it a little."""
    torch.manual_seed(0)
    start = models.resolve_start("embedded:tiny-llama", None, False, "policy.start")
    policy = models.load_policy(start, PolicyConfig(), master_weights=False)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=scale)
    return policy


def written(policy: torch.nn.Module, folder: Path, dtype: str | None) -> dict:
    start = models.resolve_start("embedded:tiny-llama", None, False, "policy.start")
    return models.save_policy(policy, models.load_tokenizer(start), start, folder, PolicyConfig(), False, dtype, PROBE)


def test_the_default_export_is_the_trained_policy(tmp_path: Path) -> None:
    policy = adapted(1e-3)
    layout = written(policy, tmp_path, None)
    again = models.open_policy(tmp_path, {"layout": layout}, "float32")
    gap = (models.token_logps(again, PROBE) - models.token_logps(policy, PROBE)).abs().mean()
    assert gap < 1e-6 and layout["dtype"] == "float32" and layout["log_prob_gap"] < 1e-6 < layout["log_prob_moved"]


def test_an_export_that_rounds_the_training_away_is_refused_with_its_figures(tmp_path: Path) -> None:
    start = models.resolve_start("embedded:tiny-llama", None, False, "policy.start")
    model = models.load_causal_lm(start, "float32")
    model.get_input_embeddings().weight.data.mul_(20)  # a tiny random model is nearly uniform: rounding would not show
    model.save_pretrained(tmp_path / "start")
    start = replace(start, location=str(tmp_path / "start"))
    policy = models.load_policy(start, PolicyConfig(), master_weights=False)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-5)
    with pytest.raises(
        UserError, match=r"export\.dtype=bfloat16: .* away from the trained one's .* resume with export\.dtype=float32"
    ):
        models.save_policy(policy, models.load_tokenizer(models.resolve_start("embedded:tiny-llama", None, False, "x")), start, tmp_path / "p",
                           PolicyConfig(), False, "bfloat16", PROBE)  # fmt: skip


def test_a_run_writes_its_gap_into_manifest_and_card(tiny_store: Path, tmp_path: Path) -> None:
    train_policy.run(stage_config("train-policy", tmp_path, tiny_store, "policy.dtype=bfloat16", "train.steps=1"), tmp_path)
    version = max((tiny_store / "policy").glob("v*"))
    layout = json.loads((version / "manifest.json").read_text())["layout"]
    assert layout["dtype"] == "float32" and layout["log_prob_gap"] <= 1e-4
    assert f"{layout['log_prob_gap']:.1e} a token from the trained policy's" in (version / "README.md").read_text()


def test_layers_that_the_start_lacks_are_published_as_they_were_judged(tmp_path: Path) -> None:
    """An encoder folder without its pooler: the pooler is drawn when the start is loaded, and must not be drawn again."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "start"
    shutil.copytree(embedded_folder("embedded:tiny-bert"), folder)
    weights = {n: w for n, w in load_file(folder / "model.safetensors").items() if "pooler" not in n}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    start = models.resolve_start(str(folder), None, False, "backbone.start")
    cfg = BackboneConfig(lora=LoraConfig(enabled=True, r=2))
    torch.manual_seed(1)
    trained = models.load_backbone(start, cfg, ["a", "b"], 0).eval()
    plain = replace(cfg, lora=replace(cfg.lora, enabled=False))
    copy = models.detached_copy(trained, lambda: models.load_backbone(start, plain, ["a", "b"], 0), cfg.lora, "SEQ_CLS").eval()
    ids = torch.arange(5, 25)[None]
    assert torch.allclose(copy(input_ids=ids).logits, trained(input_ids=ids).logits, atol=1e-6)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine without a network whose hub cache holds one tiny model."""
    root = tmp_path_factory.mktemp("hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = root / "models--owner--tiny"
    shutil.copytree(embedded_folder("embedded:tiny-llama"), model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    return {"HF_HUB_CACHE": str(root), "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")}


def test_a_policy_on_a_hub_base_is_gone_on_from_and_evaluated(hub: dict[str, str], tiny_store: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_store / "reward-model", tmp_path / "checkpoints" / "reward-model")
    words = ("+debug=tiny", "policy.start=owner/tiny", "optim.lr=1e-2", "optim.warmup=0", "train.steps=2")
    cli("train-policy", *words, cwd=tmp_path, env=hub)
    first = json.loads((tmp_path / "checkpoints/policy/v001/manifest.json").read_text())
    assert first["layout"] == {
        "layout": "adapter", "base": "owner/tiny", "revision": "0123456789abcdef0123456789abcdef01234567",
    }  # fmt: skip
    cli("train-policy", "+debug=tiny", "policy.start=v1", "optim.lr=1e-9", cwd=tmp_path, env=hub)
    second = json.loads((tmp_path / "checkpoints/policy/v002/manifest.json").read_text())
    assert second["layout"]["layout"] == "merged"
    assert [p["content_sha256"] for p in second["parents"] if p["kind"] == "policy"] == [first["content_sha256"]]
    found = cli("eval", "+debug=tiny", "policy=v1", "dtype=bfloat16", cwd=tmp_path, env=hub)
    assert "compared in float32" in found.stdout
    base = models.load_causal_lm(models.resolve_start("embedded:tiny-llama", None, False, "x"), "float32")
    last = models.open_policy(tmp_path / "checkpoints/policy/v002", second, "float32")
    assert (models.token_logps(last, PROBE) - models.token_logps(base, PROBE)).abs().max() > 1e-3  # v1's training is in v2
