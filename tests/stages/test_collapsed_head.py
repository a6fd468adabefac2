"""A head that says the same of every answer is not stretched into noise; its card says so, and the gate refuses it by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import stage_config

from grpo_safe.algorithm.statistics import affine_fit, collapsed
from grpo_safe.errors import UserError
from grpo_safe.stages import train_policy, train_rm
from grpo_safe.versions import checkpoint


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-7, 1e-6, 9e-6])
def test_the_slope_is_bounded(spread: float) -> None:
    label = np.linspace(0, 1, 50)
    raw = np.float32(0.6) + spread * (label - 0.5)
    assert collapsed(raw, label)
    assert affine_fit(raw, label) == (1.0, pytest.approx(float(label.mean() - raw.mean())))


def test_a_narrow_head_is_stretched_and_labels_without_spread_collapse_nothing() -> None:
    label = np.linspace(0, 1, 50)
    assert affine_fit(0.6 + 1e-3 * label, label)[0] == pytest.approx(1000.0)
    flat = np.full(50, 0.5)
    assert not collapsed(label, flat) and not collapsed(flat, flat)


@pytest.mark.parametrize("calibrate", ["true", "false"])
def test_the_card_names_a_collapsed_head_and_the_gate_refuses_it(
    calibrate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predict = train_rm.predict

    def flat_safety(*given):
        scores = predict(*given)
        return [np.concatenate([0.6 + (s[:, :1] - 0.6) * 1e-3, s[:, 1:]], axis=1) for s in scores]

    monkeypatch.setattr(train_rm, "predict", flat_safety)
    monkeypatch.setattr(train_rm, "check_export", lambda *given: None)  # the written model does not say what is made up here
    words = ("data.limit=200", f"train.calibrate={calibrate}", "train.epochs=0.2")
    train_rm.run(stage_config("train-rm", tmp_path / "run", tmp_path / "store", *words), tmp_path / "run")
    assert "head safety is collapsed" in capsys.readouterr().out
    (version,) = checkpoint.all_versions(tmp_path / "store")
    heads = version.manifest["metrics"]["objectives"]
    assert next(name for name, entry in heads.items() if entry.get("collapsed")) == "safety"
    assert version.manifest["objectives"][0]["slope"] == 1.0
    assert "Head safety is collapsed" in (version.path / "README.md").read_text()
    policy = stage_config("train-policy", tmp_path / "policy", tmp_path / "store", "reward_model_gate=error")
    with pytest.raises(UserError, match="head safety: collapsed"):
        train_policy.run(policy, tmp_path / "policy")
