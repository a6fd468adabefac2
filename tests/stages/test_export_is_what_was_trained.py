"""What train-policy publishes, opened again, is the policy that was trained: bfloat16 must not round an adapter away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import stage_config

from grpo_safe import models
from grpo_safe.errors import UserError
from grpo_safe.stages import evaluate, train_policy
from grpo_safe.stages.train_policy import finishing
from grpo_safe.versions import checkpoint

SMALL = ("optim.lr=1e-4", "optim.warmup=0", "optim.schedule=constant", "train.steps=3", "train.save_every=3")


def sharp_start(folder: Path) -> Path:
    """The tiny policy with weights as large as real models', in bfloat16: a small adapter is below their last digit."""
    start = models.resolve_start("embedded:tiny-llama", None, False, "x")
    model = models.load_causal_lm(start, "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.to(torch.bfloat16).save_pretrained(folder)
    models.load_tokenizer(start).save_pretrained(folder)
    return folder


def versions(store: Path) -> list[str]:
    return sorted(p.name for p in (store / "policy").glob("*"))


def published(store: Path) -> checkpoint.Version:
    return checkpoint.open_version(store, "policy", "latest")


@pytest.mark.parametrize("words", [
    ("policy.dtype=bfloat16",),
    ("policy.dtype=float32",),
    ("policy.dtype=bfloat16", "policy.lora.enabled=false"),
])  # fmt: skip
def test_the_export_has_the_log_probs_of_what_was_trained(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    seen: dict[str, Any] = {}
    write = models.save_policy

    def noting(policy: Any, tokenizer: Any, start: Any, folder: Path, cfg: Any, export: Any, rows: Any) -> dict[str, Any]:
        """What was trained, in float32: base weights and adapter as they are, nothing merged."""
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            if cfg.dtype == "float32":
                seen["trained"] = models.log_probs(policy, rows)
            else:
                wide = models.detached_copy(policy, models.load_causal_lm(start, "float32"), cfg.lora, "CAUSAL_LM")
                seen["trained"] = models.log_probs(wide, rows)
        seen["rows"] = rows
        return write(policy, tokenizer, start, folder, cfg, export, rows)

    monkeypatch.setattr(finishing.models, "save_policy", noting)
    train_policy.run(stage_config("train-policy", tmp_path, tiny_store, *SMALL, *words), tmp_path)
    found = published(tiny_store)
    layout = found.manifest["layout"]
    assert layout["dtype"] == "float32"
    figures = layout["export"]
    assert figures["log_prob_change"] > 1e-4 and figures["tokens"] > 20  # it was trained, and much was compared
    assert figures["log_prob_gap"] <= max(1e-4, 0.02 * figures["log_prob_change"])
    opened = models.load_causal_lm(models.resolve_start(str(found.path), None, False, "x"), "float32")
    gap = (models.log_probs(opened, seen["rows"]) - seen["trained"]).abs().mean()
    assert float(gap) <= max(1e-4, 0.02 * figures["log_prob_change"])
    assert float(gap) == pytest.approx(figures["log_prob_gap"], abs=1e-5)
    assert f"{figures['log_prob_change']:.1e}" in (found.path / "README.md").read_text()


def test_an_export_that_rounds_the_adapter_away_is_refused_and_can_be_published_in_float32(
    tiny_store: Path, tmp_path: Path
) -> None:
    before = versions(tiny_store)
    words = (f"policy.start={sharp_start(tmp_path / 'start')}", "policy.dtype=bfloat16", "export.dtype=bfloat16")
    cfg = stage_config("train-policy", tmp_path / "run", tiny_store, *SMALL, *words)
    with pytest.raises(
        UserError, match=r"export\.dtype=bfloat16: .* differs from what was trained by \d\.\d+e.* changed \d\.\d+e"
    ):
        train_policy.run(cfg, tmp_path / "run")
    assert versions(tiny_store) == before  # nothing, no draft either
    cfg.export.dtype, cfg.resume = "float32", str(tmp_path / "run")  # the state is there: nothing has to be trained anew
    train_policy.run(cfg, tmp_path / "run")
    assert len(versions(tiny_store)) == len(before) + 1
    assert published(tiny_store).manifest["layout"]["export"]["log_prob_gap"] < 1e-4


def test_eval_in_bfloat16_keeps_what_the_adapter_has_learned(tiny_store: Path, tmp_path: Path) -> None:
    train_policy.run(stage_config("train-policy", tmp_path / "p", tiny_store, *SMALL), tmp_path / "p")
    found = published(tiny_store)
    opened = models.open_policy(found.path, found.manifest, "bfloat16")
    exact = models.open_policy(found.path, found.manifest, "float32")
    start = models.load_causal_lm(models.resolve_start("embedded:tiny-llama", None, False, "x"), "float32")
    moved = {n: (p - start.get_parameter(n)).abs() for n, p in exact.named_parameters()}
    lost = max(float((opened.get_parameter(n).float() - p).abs().max()) for n, p in exact.named_parameters())
    assert max(float(m.max()) for m in moved.values()) > 1e-5
    assert lost == 0.0
    evaluate.run(
        stage_config("eval", tmp_path / "e", tiny_store, "dtype=bfloat16", f"policy={found.name}", "reward_model=v1"),
        tmp_path / "e",
    )
    assert (tmp_path / "e" / "report.md").is_file()


def test_the_bound_of_an_export() -> None:
    before = torch.zeros(100)
    trained = torch.full((100,), 0.1)
    assert models.checked_export(trained + 0.0019, trained, before, "float32")["log_prob_gap"] == pytest.approx(0.0019, rel=1e-3)
    with pytest.raises(UserError, match=r"by 2\.10e-03 nats a token, where training changed 1\.00e-01; at most 2\.00e-03"):
        models.checked_export(trained + 0.0021, trained, before, "bfloat16")
    models.checked_export(before + 0.9e-4, before, before, "float32")  # nothing was trained: rounding has room
    with pytest.raises(UserError):
        models.checked_export(before * torch.nan, before, before, "float32")
