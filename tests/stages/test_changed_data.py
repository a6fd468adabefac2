"""A run that is resumed reads the data that it began with, or stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import stage_config

from grpo_safe.errors import UserError
from grpo_safe.stages import train_policy, train_rm

STAGES = {
    "train-rm": (train_rm, ("train.save_every=1", "train.epochs=1")),
    "train-policy": (train_policy, ("train.save_every=1", "train.steps=1", "train.eval_every=1")),
}
LONGER = {"train-rm": "train.epochs=2", "train-policy": "train.steps=2"}


def written(path: Path, first: int, count: int = 24) -> str:
    rows = [
        {"prompt": f"Question {n}?", "response": f"Answer {n}.", "labels": {"safety": n % 2}} for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("command", STAGES)
def test_changed_data_is_refused_on_resume(command: str, tiny_store: Path, tmp_path: Path) -> None:
    stage, fixed = STAGES[command]
    train, validation = (written(tmp_path / f"{split}.jsonl", first) for split, first in (("train", 0), ("validation", 100)))
    words = ("data=files", f"data.train={train}", f"data.validation={validation}", "data.objectives.safety.range=[0,1]", *fixed)
    run, store = tmp_path / "run", tiny_store if command == "train-policy" else tmp_path / "store"
    stage.run(stage_config(command, run, store, *words), run)
    again = (*words, LONGER[command])

    def resumed(*more: str):
        cfg = stage_config(command, run, store, *again, *more)
        cfg.resume = str(run)
        return cfg

    for changed, first in ((train, 0), (validation, 100)):
        before = Path(changed).read_text()
        written(Path(changed), first, 25)
        with pytest.raises(UserError, match=f"resume=.*{changed} is not what the run began with"):
            stage.run(resumed(), run)
        Path(changed).write_text(before)
    moved = str(Path(train).rename(tmp_path / "moved.jsonl"))
    metrics = (run / "metrics.jsonl").read_text()
    stage.run(resumed(f"data.train={moved}"), run)  # the same content under another name
    assert len((run / "metrics.jsonl").read_text()) > len(metrics)
