"""Runs of the real commands at tiny size, shared by the stage tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from grpo_safe import launch
from grpo_safe.checks import typed, validated
from grpo_safe.cli import STAGES, conf_dir, prepared_overrides
from grpo_safe.versions import checkpoint


def stage_config(command: str, run_dir: Path, store: Path, *overrides: str) -> Any:
    """The typed config of a command, as the launcher would freeze it."""
    words = prepared_overrides(command, ["+debug=tiny", *overrides, f"store={store}"])
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose(config_name=STAGES[command], overrides=words)
    OmegaConf.update(cfg, "run_dir", str(run_dir))
    run_dir.mkdir(parents=True, exist_ok=True)
    cfg = validated(command, cfg)
    if command == "eval":
        launch.inherit(cfg, checkpoint.locate(Path(cfg.store), "policy", cfg.policy, "policy"))
    return typed(cfg)


def cli(*words: str, cwd: Path, check: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    environment = {**os.environ, "COLUMNS": "200", **(env or {})}
    done = subprocess.run(
        [sys.executable, "-m", "grpo_safe", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def only_run(root: Path) -> Path:
    """The one run directory below a folder of runs."""
    (found,) = [p.parent for p in root.rglob("config.yaml")]
    return found


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what a clock or the memory says."""
    return [{k: v for k, v in row.items() if not k.startswith(("seconds/", "peak_", "tokens_per"))} for row in rows]


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one tiny reward model. Calibration stretches its scores (else every group would tie), and rounding with them."""
    from grpo_safe.stages import train_rm

    root = tmp_path_factory.mktemp("tiny")
    train_rm.run(stage_config("train-rm", root / "run", root / "store", "data.limit=200"), root / "run")
    return root / "store"


@pytest.fixture
def config() -> Callable[..., Any]:
    return stage_config
