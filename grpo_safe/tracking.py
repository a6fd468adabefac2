"""Where a run's figures go: metrics.jsonl, samples.jsonl, one line a step in the terminal, and wandb if asked."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from grpo_safe.config import TrackingConfig
from grpo_safe.runtime.peak import forget_peak, peak_since_gb


class Tracker:
    """Writes on the main rank only; elsewhere every call is a no-op."""

    def __init__(self, cfg: TrackingConfig, run_dir: Path, run_config: dict[str, Any], is_main: bool) -> None:
        self.cfg, self.run_dir, self.is_main = cfg, run_dir, is_main
        self.bar: Any = None
        self.wandb: Any = None
        if is_main and cfg.kind == "wandb":
            os.environ["WANDB_MODE"] = cfg.mode
            import wandb

            quiet = wandb.Settings(disable_code=True, disable_git=True, x_disable_meta=True, console="off", host="", silent=True)
            kept = run_dir / "wandb_id.txt"  # a resumed run goes on in the wandb run that it began
            known = kept.read_text(encoding="utf-8").strip() if kept.is_file() else ""
            name, place = str(run_config.get("name")), str(run_dir)
            self.wandb = wandb.init(
                project=cfg.project, name=name, dir=place, config=run_config, settings=quiet, id=known or None, resume="allow"
            )
            kept.write_text(f"{self.wandb.id}\n", encoding="utf-8")

    def start(self, total: int, done: int, what: str, unit: str = "step") -> None:
        """Open the progress bar: rate and time left."""
        if self.is_main:
            watched = sys.stderr.isatty()  # in a log file: a line every half minute
            self.bar = tqdm(
                total=total,
                initial=done,
                desc=what,
                unit=unit,
                dynamic_ncols=True,
                mininterval=0.2 if watched else 30,
                smoothing=0.1,
            )

    def advance(self, note: str = "", count: int = 1) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl; a figure that is not finite is written as null."""
        if not self.is_main:
            return
        row = {"step": step, **{k: _plain(v) for k, v in metrics.items()}}
        _append(self.run_dir / "metrics.jsonl", row)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A few completions with their scores, to read what the figures mean."""
        if not self.is_main:
            return
        for row in rows:
            _append(self.run_dir / "samples.jsonl", {"step": step, **{k: _plain(v) for k, v in row.items()}})
        if self.wandb is not None and self.cfg.samples and rows:
            import wandb

            table = wandb.Table(columns=list(rows[0]), data=[[str(v) for v in r.values()] for r in rows])
            self.wandb.log({"samples": table}, step=step)

    def say(self, text: str) -> None:
        """A line for the person watching, above the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()


def truncate_metrics(run_dir: Path, last_step: int) -> None:
    """Drop what a killed run wrote after its last resume state, so that the resumed run writes it again once."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = run_dir / name
        if path.is_file():
            lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a completion may hold other line ends
            kept = [line for line in lines if _whole(line) and json.loads(line)["step"] <= last_step]
            draft = path.with_suffix(".tmp")
            draft.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            draft.replace(path)


class Stopwatch:
    """Seconds of each phase of a step and, given a device, the peak of its memory in each.

    Example: with watch("sampling"): ...; watch.seconds -> {"sampling": 1.2}
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}  # GB
        self._device = device
        self._open: list[tuple[str, float]] = []

    def __call__(self, phase: str) -> Stopwatch:
        self._open.append((phase, 0.0))
        return self

    def __enter__(self) -> None:
        if self._device is not None:
            forget_peak(self._device)
        self._open[-1] = (self._open[-1][0], time.perf_counter())

    def __exit__(self, *_: object) -> None:
        phase, began = self._open.pop()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
        if self._device is not None:
            self.peaks[phase] = max(self.peaks.get(phase, 0.0), peak_since_gb(self._device))


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _whole(line: str) -> bool:
    """A line that a kill tore in half is no JSON; it is written again by the resumed run."""
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True
