"""Nobody trains on after the command is gone: signals reach the workers, and the exit code says which it was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


def slow(prompts, completions):
    """An objective that takes its time; it leaves a mark that the run is under way."""
    Path(os.environ["MARK"]).touch()
    time.sleep(60)
    return [0.0] * len(completions)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_command(number: signal.Signals, tiny_store: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_store / "reward-model", tmp_path / "checkpoints" / "reward-model")
    mark = tmp_path / "mark"
    environment = {**os.environ, "MARK": str(mark), "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    words = ["train-policy", "+debug=tiny", "objectives.mine.function=test_signals.slow", "train.steps=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_safe", *words], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    began = time.monotonic()
    while not mark.exists():
        assert process.poll() is None and time.monotonic() - began < 300, process.communicate()[1][-2000:]
        time.sleep(0.2)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(number)
    assert process.wait(timeout=30) == (-9 if number == signal.SIGKILL else 128 + number)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    assert not (tmp_path / "checkpoints" / "policy").exists()
