"""A number of a config that is no number, or infinite, is refused by its key, wherever it stands."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from in_process import composed
from omegaconf import OmegaConf

from grpo_safe.checks import load_frozen, typed, validated
from grpo_safe.errors import UserError


def float_keys(node: Any, prefix: str = "") -> list[str]:
    """Dotted keys of the fields of dataclasses that are annotated as floats."""
    found = []
    for field in fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            found += float_keys(value, f"{key}.")
        elif "float" in str(field.type) and "list" not in str(field.type):
            found.append(key)
    return found


@pytest.mark.parametrize("command", ["train-rm", "train-policy", "eval"])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_every_float_of_every_command(command: str, number: str) -> None:
    plain = composed(command, "+debug=tiny")
    keys = float_keys(typed(validated(command, plain)))
    assert len(keys) > 3
    for key in keys:
        cfg = plain.copy()
        OmegaConf.update(cfg, key, float(number), force_add=True)
        if command == "train-policy":
            key = key.replace("rollout.sampler_cap", "algo.sampler_cap")  # which takes its value from there
        with pytest.raises(UserError, match=f"^{key}={number}: expected a finite number"):
            validated(command, cfg)


@pytest.mark.parametrize(
    "word, message",
    [
        ("+objectives.safety.weight=nan", r"objectives.safety.weight=nan"),
        ("+objectives.safety.limit.at_least=inf", r"objectives.safety.limit.at_least=inf"),
        ("algo.loss={name: dpo, beta: inf}", r"algo.loss.beta=inf"),
        ("algo.reference={name: soup, policies: [a, b], weights: [nan, 1.0]}", r"algo.reference.weights.0=nan"),
        ("data.objectives.safety.range=[0.0, inf]", r"data.objectives.safety.range.1=inf"),
    ],
)
def test_numbers_of_objectives_and_slots(word: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}: expected a finite number"):
        validated("train-policy", composed("train-policy", "+debug=tiny", word))


def test_a_frozen_config_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        OmegaConf.to_yaml(validated("train-policy", composed("train-policy", "+debug=tiny"))).replace("lr: 0.", "lr: .nan #", 1)
    )
    assert ".nan" in path.read_text()
    with pytest.raises(UserError, match="lr=nan: expected a finite number"):
        load_frozen("train-policy", path)
