"""In bfloat16 the reference is the policy's start to the bit: its weights and its arithmetic are the policy's."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import read_metrics, stage_config

from grpo_safe import models
from grpo_safe.config import LoraConfig
from grpo_safe.models import reference
from grpo_safe.stages import train_policy

SOUP = "algo.reference={name: soup, policies: ['embedded:tiny-llama', 'embedded:tiny-llama']}"


@pytest.mark.parametrize(
    "words",
    [
        ("policy.lora.enabled=false",),
        ("policy.lora.enabled=false", "train.packed=false"),
        ("policy.lora.enabled=false", SOUP),
        ("policy.lora.enabled=true",),
        ("policy.lora.enabled=true", SOUP),
    ],
)
def test_before_any_update_the_kl_is_0(words: tuple[str, ...], tiny_store: Path, tmp_path: Path) -> None:
    words = ("policy.dtype=bfloat16", "train.steps=1", "launch.device=cpu", *words)
    train_policy.run(stage_config("train-policy", tmp_path, tiny_store, *words), tmp_path)
    assert read_metrics(tmp_path)[0]["kl"] == 0.0


def test_tdpo_in_bfloat16_starts_at_its_reference(tiny_store: Path, tmp_path: Path) -> None:
    words = ("algo=tdpo", "policy.dtype=bfloat16", "policy.lora.enabled=false", "train.steps=1", "launch.device=cpu")
    train_policy.run(stage_config("train-policy", tmp_path, tiny_store, *words), tmp_path)
    assert abs(read_metrics(tmp_path)[0]["ref_kl"]) < 1e-6


def test_weights_that_are_cast_leave_the_rotary_frequencies_alone(tmp_path: Path) -> None:
    """Of an adapter that is merged, and of a soup: they are those of the model that from_pretrained gives in bfloat16."""
    start = models.resolve_start("embedded:tiny-llama", None, False, "x")
    plain = models.load_causal_lm(start, "bfloat16")
    models.add_lora(models.load_causal_lm(start, "float32"), LoraConfig(), "CAUSAL_LM").save_pretrained(tmp_path)
    merged = models.load_causal_lm(models.Start("x", start.location, start.options, tmp_path), "bfloat16")
    soup = reference.averaged(reference.soup(["embedded:tiny-llama"] * 2), "bfloat16", "sdpa", False)
    frequencies = plain.model.rotary_emb.inv_freq
    assert not (frequencies == frequencies.bfloat16().float()).all()  # else this test could not fail
    for model in (merged, soup):
        assert (model.model.rotary_emb.inv_freq == frequencies).all()
        assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(model.parameters(), plain.parameters(), strict=True))
