"""data.limit holds for the prompts of train-policy and eval, and for the given answers, as it does for train-rm's rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import stage_config

from grpo_safe.data.rows import load_answers, load_prompts
from grpo_safe.stages import evaluate, train_policy


def test_limit_draws_prompts_with_the_seed(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "response": f"Answer {a}."} for i in range(20) for a in range(2)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("data=files", f"data.train={path}", f"data.validation={path}", "data.limit=5")
    spec = stage_config("train-policy", tmp_path / "run", tmp_path / "store", *words).data
    order = [f"Question {i}?" for i in range(20)]
    drawn = [[p.text for p in load_prompts(spec, split, seed)[0]] for split in ("train", "validation") for seed in (0, 0, 1)]
    assert all(len(texts) == 5 and texts == sorted(texts, key=order.index) for texts in drawn)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != order[:5]
    answers, _ = load_answers(spec, False, 0)
    assert list(dict.fromkeys(row.prompt.text for row in answers)) == drawn[0] and len(answers) == 10  # whole groups


def test_stages_keep_to_the_limit(tiny_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    words = ("data.limit=4", "reward_model=latest")
    cfg = stage_config("train-policy", tmp_path / "run", store, "train.steps=1", *words)
    assert len(train_policy_prompts(cfg, tmp_path)) == 4
    train_policy.run(cfg, tmp_path / "run")
    eval_dir = tmp_path / "eval"
    evaluate.run(stage_config("eval", eval_dir, store, "eval.prompts=null", *words), eval_dir)
    assert json.loads((eval_dir / "metrics.json").read_text())["prompts"] == 4


def train_policy_prompts(cfg: Any, tmp_path: Path) -> list[str]:
    return [p.text for p in train_policy.set_up(cfg, tmp_path / "run").read.prompts]
