"""An objective that scores nothing stops the run at its first step; nothing is published."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import stage_config

from grpo_safe.errors import UserError
from grpo_safe.stages import train_policy


def silent(prompts, completions):
    return [None] * len(completions)


def test_all_none(tiny_store: Path, tmp_path: Path) -> None:
    before = sorted(tiny_store.glob("policy/*"))
    cfg = stage_config(
        "train-policy", tmp_path, tiny_store, "objectives.mine.function=test_unscored.silent", "objectives.mine.weight=1"
    )
    with pytest.raises(UserError, match=r"objectives\.mine: it scored none of the completions of step 1"):
        train_policy.run(cfg, tmp_path)
    assert sorted(tiny_store.glob("policy/*")) == before
