"""Weights that do not load are named and refused: from_pretrained would draw them at random, and they would train."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from grpo_safe import models
from grpo_safe.config import BackboneConfig
from grpo_safe.errors import UserError
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.versions.checkpoint import require_room


def changed(folder: Path, start: str, rename) -> models.Start:
    """A copy of an embedded model whose weights are renamed (None: left out)."""
    shutil.copytree(embedded_folder(start), folder)
    weights = {rename(name): weight for name, weight in load_file(folder / "model.safetensors").items()}
    weights.pop(None, None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return models.resolve_start(str(folder), None, False, "policy.start")


def test_a_whole_policy_opens(tmp_path: Path) -> None:
    models.load_causal_lm(changed(tmp_path / "m", "embedded:tiny-llama", lambda name: name), "float32")


@pytest.mark.parametrize(
    ("rename", "named"),
    [
        (lambda name: f"wrapped.{name}", "lacks lm_head.weight and 20 more"),
        (lambda name: None if "layers.1.mlp.up" in name else name, "lacks model.layers.1.mlp.up_proj.weight,"),
        (lambda name: name.replace("layers.1.", "layers.7."), "lacks model.layers.1."),
    ],
)
def test_a_policy_that_loads_in_part_is_refused(tmp_path: Path, rename, named: str) -> None:
    with pytest.raises(UserError, match=named):
        models.load_causal_lm(changed(tmp_path / "m", "embedded:tiny-llama", rename), "float32")


def test_a_backbone_may_lack_its_head_and_pooler(tmp_path: Path) -> None:
    start = changed(tmp_path / "m", "embedded:tiny-bert", lambda name: None if "pooler" in name else name)
    models.load_backbone(start, BackboneConfig(), ["safety"], 0)


def test_a_backbone_that_loads_in_part_is_refused(tmp_path: Path) -> None:
    start = changed(tmp_path / "m", "embedded:tiny-bert", lambda name: name.replace("encoder.layer.1", "encoder.block.1"))
    with pytest.raises(UserError, match=r"lacks .*encoder\.layer\.1\..* more, which would be drawn at random"):
        models.load_backbone(start, BackboneConfig(), ["safety"], 0)


def test_a_store_that_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"store=.*file/store: a reward model cannot be written there \(.*file: Not a directory\)"
    ):
        require_room(tmp_path / "file" / "store", 1, "a reward model")
    require_room(tmp_path / "new" / "store", 1, "a reward model")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
