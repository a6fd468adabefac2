"""rollout=dataset: losses that compare answers, on the embedded answers, scored by the reward model or by their labels."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import read_metrics, stage_config, timeless

from grpo_safe.errors import UserError
from grpo_safe.stages import train_policy
from grpo_safe.stages.train_policy.method import COMPARING_LOSSES

GIVEN = ("rollout=dataset", "sampling.max_new_tokens=40")
PRESETS = {
    "dpo": "dpo", "tdpo": "tdpo", "group_robust": "group_robust", "gflow_dpo": "gflow_dpo", "pro": "pro", "best_of_group": "superhf",
    "a_lol": "a_lol",
}  # fmt: skip


def test_every_loss_that_compares_is_tried() -> None:
    assert set(PRESETS) == set(COMPARING_LOSSES)


@pytest.mark.parametrize("preset", sorted(PRESETS.values()))
def test_two_steps_on_labels(preset: str, tiny_store: Path, tmp_path: Path) -> None:
    run_dir, store = tmp_path / "run", Path(shutil.copytree(tiny_store, tmp_path / "store"))
    train_policy.run(stage_config("train-policy", run_dir, store, f"algo={preset}", "train.scores=labels", *GIVEN), run_dir)
    rows = read_metrics(run_dir)
    assert len(rows) == 2 and all(row["grad_norm"] > 0 and "sampler_gap" not in row for row in rows)
    assert all(0 <= row["score/safety"] <= 1 and row["missing/safety"] == 0 for row in rows)


def test_scored_by_the_reward_model_and_resumed(tiny_store: Path, tmp_path: Path) -> None:
    run_dir, store = tmp_path / "run", Path(shutil.copytree(tiny_store, tmp_path / "store"))
    cfg = stage_config("train-policy", run_dir, store, "algo=dpo", "train.eval_every=2", "train.eval_prompts=2", *GIVEN)
    train_policy.run(cfg, run_dir)
    whole = timeless(read_metrics(run_dir))
    assert len(whole) == 2 and "validation/safety" in whole[1]  # the policy's own answers
    shutil.rmtree(run_dir / "state" / "step-000002")
    (run_dir / "published.txt").unlink()
    cfg.resume = str(run_dir)
    train_policy.run(cfg, run_dir)
    assert timeless(read_metrics(run_dir)) == whole


def test_dpo_on_labelled_pairs_learns_which_is_better(tiny_store: Path, tmp_path: Path) -> None:
    """One pair, again and again: whatever the rounding, its log-ratio grows, and the loss falls from log 2."""
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "Hi", "chosen": "Hello there, friend.", "rejected": "Go away.", "objective": "politeness"}\n')
    run_dir, store = tmp_path / "run", Path(shutil.copytree(tiny_store, tmp_path / "store"))
    others = [f"objectives.{name}.weight=0" for name in ("safety", "meaningfulness", "actionability")]
    words = (
        *GIVEN, "algo=dpo", "train.scores=labels", "algo.group_size=2", f"data.train={rows}", "train.prompts_per_step=1", "train.steps=6",
        "optim.lr=5e-3", "optim.schedule=constant", "optim.warmup=0", *others,
    )  # fmt: skip
    train_policy.run(stage_config("train-policy", run_dir, store, *words), run_dir)
    found = read_metrics(run_dir)
    assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert found[-1]["loss"] < 0.6 and found[-1]["pair_accuracy"] == 1.0
    assert found[0]["score/politeness"] == 0.5 and found[0]["missing/safety"] == 1.0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("algo=grpo",), "nobody knows who wrote a data set's answers; choose a loss that compares answers"),
        (("algo=ppo",), "nobody knows who wrote a data set's answers"),
        (("algo=dpo", "algo.group_size=9"), "no prompt of data.train has algo.group_size=9 different answers, the most is 7"),
        (("algo=dpo", "algo.resample_ties=2"), "nothing is sampled"),
        (("algo=dpo", "algo.calibration=difference"), "nothing is sampled"),
        (("algo=dpo", "train.profile=true"), "nothing is sampled"),
        (("algo=dpo", "rollout=native", "train.scores=labels"), "only the answers of a data set have labels"),
    ],
)
def test_what_makes_no_sense_is_refused(words, sentence, tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        train_policy.run(stage_config("train-policy", tmp_path / "run", tiny_store, *GIVEN, *words), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_objective_that_nobody_labelled_is_named(tiny_store: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "Hi", "response": "{c}", "politeness": 1}}\n' for c in "abcd"))
    words = (*GIVEN, "algo=dpo", "train.scores=labels", f"data.train={tmp_path / 'rows.jsonl'}")
    with pytest.raises(UserError, match=r"no answer of data.train has a label for objective safety"):
        train_policy.run(stage_config("train-policy", tmp_path / "run", tiny_store, *words), tmp_path / "run")


def test_an_evaluation_samples(tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an evaluation samples from the policy"):
        stage_config("eval", tmp_path / "run", tiny_store, "rollout=dataset")
