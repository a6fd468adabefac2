"""A resumed run goes on in the wandb run that it began."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_safe.config import TrackingConfig
from grpo_safe.tracking import Tracker


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "of-wandb"))
    monkeypatch.setenv("WANDB_MODE", "online")  # the tracker sets it: put back when the test ends


def wandb_id(run_dir: Path, is_main: bool = True) -> str | None:
    """The id of the wandb run that a run logs one step to."""
    run_dir.mkdir(exist_ok=True)
    t = Tracker(TrackingConfig(kind="wandb", mode="offline"), run_dir, {"name": "trial"}, is_main)
    t.log(1, {"loss": 0.5})
    found = t.wandb.id if t.wandb is not None else None
    t.close()
    return found


def test_a_resumed_run_has_the_id_that_it_had_and_another_run_its_own(tmp_path: Path, offline: None) -> None:
    first = wandb_id(tmp_path / "run")
    assert first and (tmp_path / "run" / "wandb_id.txt").read_text() == first + "\n"
    assert wandb_id(tmp_path / "run") == first
    assert wandb_id(tmp_path / "other") not in (None, first)


def test_an_empty_file_of_a_killed_run_gives_a_new_id(tmp_path: Path, offline: None) -> None:
    (tmp_path / "wandb_id.txt").write_text("")
    found = wandb_id(tmp_path)
    assert found and (tmp_path / "wandb_id.txt").read_text() == found + "\n"


def test_wandb_is_told_to_resume(tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    told: list[dict] = []
    monkeypatch.setattr(wandb, "init", lambda **given: told.append(given) or type("Run", (), {"id": "abc"}))
    for _ in range(2):
        Tracker(TrackingConfig(kind="wandb", mode="online"), tmp_path, {"name": "trial"}, True)
    assert [(given["id"], given["resume"]) for given in told] == [(None, "allow"), ("abc", "allow")]


def test_other_ranks_and_runs_without_wandb_keep_no_id(tmp_path: Path) -> None:
    assert wandb_id(tmp_path, is_main=False) is None
    Tracker(TrackingConfig(), tmp_path, {"name": "trial"}, True)
    assert list(tmp_path.iterdir()) == []
