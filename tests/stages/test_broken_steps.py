"""Steps that go wrong: gradients that are no numbers, a best step that a killed run noted, prompts that come twice in a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import cli, read_metrics, stage_config

from grpo_safe.algorithm.losses import Loss, clip, k3, policy_gradient, sequence_mean
from grpo_safe.errors import StageError
from grpo_safe.stages import train_policy, train_rm
from grpo_safe.versions import resume

calls: list[int] = []


def nan_loss_at(*steps: int):
    """A user's loss that is NaN in the given calls (one a step: one micro-batch)."""
    function = policy_gradient(clip(0.2, 0.2), sequence_mean, k3, 0.0, 0.0)

    def loss(outputs, batch, denominators):
        calls.append(1)
        value, sums = function(outputs, batch, denominators)
        return (value * torch.nan if len(calls) in steps else value), sums

    return lambda: Loss(loss, "no")


last_is_nan = nan_loss_at(2)
always_nan = nan_loss_at(*range(1, 100))


def trained(monkeypatch, store: Path, run_dir: Path, factory, *words: str) -> list[dict]:
    calls.clear()
    monkeypatch.setattr("grpo_safe.stages.train_policy.setup.build_method", with_loss(factory))
    fixed = ("optim.warmup=0", "optim.lr=1e-2", "train.prompts_per_step=2", "train.micro_batch_tokens=100000")
    train_policy.run(stage_config("train-policy", run_dir, store, *fixed, *words), run_dir)
    return read_metrics(run_dir)


def with_loss(factory):
    from dataclasses import replace

    from grpo_safe.stages.train_policy.method import build_method

    return lambda *given: replace(build_method(*given), loss=factory())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def newest_policy(store: Path) -> Path:
    return max((store / "policy").glob("v*"))


def test_a_step_with_a_nan_loss_is_left_out_and_counted(tiny_store: Path, tmp_path: Path, monkeypatch) -> None:
    rows = trained(monkeypatch, tiny_store, tmp_path, last_is_nan, "train.steps=2")
    assert [row["skipped_updates"] for row in rows] == [0.0, 1.0]
    published = weights_of(newest_policy(tiny_store))
    assert all(weight.isfinite().all() for weight in published.values())
    assert any(weight.abs().sum() > 0 for name, weight in published.items() if "lora_B" in name)  # the first step stands


def test_nothing_but_such_steps_stops_the_run(tiny_store: Path, tmp_path: Path, monkeypatch) -> None:
    before = len(list((tiny_store / "policy").glob("v*"))) if (tiny_store / "policy").exists() else 0
    with pytest.raises(StageError, match=r"step 3: the gradient was not finite in 3 steps in a row"):
        trained(monkeypatch, tiny_store, tmp_path, always_nan, "train.steps=6")
    assert not (tiny_store / "policy").exists() or len(list((tiny_store / "policy").glob("v*"))) == before


@pytest.mark.parametrize("command", ["train-policy", "train-rm"])
def test_an_absurd_step_size_publishes_nothing(command: str, tiny_store: Path, tmp_path: Path) -> None:
    """Exit code 1, one sentence, no version."""
    store = tiny_store if command == "train-policy" else tmp_path / "store"
    words = ["policy.lora.enabled=false", "train.steps=8"] if command == "train-policy" else ["train.epochs=20", "data.limit=64"]
    before = sorted(store.rglob("manifest.json"))
    fixed = ("+debug=tiny", f"store={store}", "optim.lr=1e30", "optim.warmup=0", "optim.schedule=constant")
    done = cli(command, *fixed, *words, cwd=tmp_path, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not finite" in done.stderr and "Traceback" not in done.stderr
    assert sorted(store.rglob("manifest.json")) == before


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    from types import SimpleNamespace

    rt = SimpleNamespace(is_main=True, barrier=lambda: None)
    good = SimpleNamespace(state=lambda: iter([("weight/a", torch.ones(2))]))
    bad = SimpleNamespace(state=lambda: iter([("weight/a", torch.tensor([1.0, torch.nan]))]))
    resume.save(tmp_path, 1, good, rt, {}, keep=1)
    with pytest.raises(StageError, match="weight/a is not finite"):
        resume.save(tmp_path, 2, bad, rt, {}, keep=1)
    assert [p.name for p in (tmp_path / "state").glob("step-*")] == ["step-000001"]


def test_a_stale_best_step_gives_way_and_the_noted_one_stays(tmp_path: Path) -> None:
    """Killed after best = 70, resumed from 50 whose best was 30, then best = 60: 30 and 60 are there, 70 is gone."""
    from types import SimpleNamespace

    rt = SimpleNamespace(is_main=True, barrier=lambda: None)
    loaded: dict[str, torch.Tensor] = {}

    def at(step: int) -> SimpleNamespace:
        return SimpleNamespace(
            state=lambda: iter([("weight/a", torch.tensor([float(step)]))]),
            load_state=lambda tensors, done: loaded.update(tensors),
        )

    best = tmp_path / "best"
    resume.save(best, 30, at(30), rt, {}, keep=1, also=resume.best_steps(tmp_path))
    resume.save(tmp_path, 50, at(50), rt, {"best": {"step": 30}}, keep=2)
    resume.save(best, 70, at(70), rt, {}, keep=1, also=resume.best_steps(tmp_path))
    assert resume.load(best, at(0), 30).step == 30 and loaded["weight/a"] == 30  # a resumed run that finds nothing better
    resume.save(best, 60, at(60), rt, {}, keep=1, also=resume.best_steps(tmp_path))
    assert sorted(p.name for p in (best / "state").glob("step-*")) == ["step-000030", "step-000060"]
    assert resume.load(best, at(0), 60).step == 60 and loaded["weight/a"] == 60


def test_a_prompt_that_comes_twice_in_a_step_is_answered_twice(tiny_store: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "one.jsonl"
    prompts.write_text(json.dumps({"prompt": "Say something."}) + "\n")
    words = ("data=files", f"data.train={prompts}", f"data.validation={prompts}", "tracking.sample_count=64")
    cfg = stage_config("train-policy", tmp_path, tiny_store, *words, "train.prompts_per_step=4", "train.steps=1")
    train_policy.run(cfg, tmp_path)
    completions = [json.loads(line)["completion"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(completions) == 4 * cfg.algo.group_size
    assert len(set(completions)) == len(completions)


@pytest.mark.parametrize("preset", ["rloo", "reinforce_pp"])
def test_in_bfloat16_no_rounding_of_the_engine_enters_the_reward(preset: str, tiny_store: Path, tmp_path: Path) -> None:
    """Before any update the policy is its reference, so the KL term of the reward is 0 and the reward the mean of the scores."""
    words = (f"algo={preset}", "policy.dtype=bfloat16", "train.steps=1", "algo.kl_coef=1.0")
    cfg = stage_config("train-policy", tmp_path, tiny_store, *words)
    train_policy.run(cfg, tmp_path)
    (row,) = read_metrics(tmp_path)
    scores = [value for name, value in row.items() if name.startswith("score/")]
    assert row["sampler_gap"] > 1e-5  # what would have been taken for a KL
    assert row["reward/mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)


def test_a_fitted_reward_model_is_safe_before_it_is_judged(tmp_path: Path, monkeypatch) -> None:
    """What fails after the fit costs no fit: the run goes on from its end, and is then refused, as it has published."""
    words = ("data.limit=64",)

    def fails(*given, **named):
        raise RuntimeError("the card cannot be made")

    with monkeypatch.context() as patch:
        patch.setattr(train_rm, "predict", fails)
        with pytest.raises(RuntimeError, match="card"):
            train_rm.run(stage_config("train-rm", tmp_path / "run", tmp_path / "store", *words), tmp_path / "run")
    assert not (tmp_path / "store").exists()
    resumed = stage_config("train-rm", tmp_path / "run", tmp_path / "store", *words, f"resume={tmp_path / 'run'}")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    train_rm.run(resumed, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before  # not a step was fitted again
    assert (tmp_path / "store" / "reward-model" / "v001" / "manifest.json").is_file()
    with pytest.raises(Exception, match="the run is finished, published as"):
        train_rm.run(resumed, tmp_path / "run")


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_reward_model_in_bfloat16_under_zero(strategy: str, tmp_path: Path) -> None:
    fixed = ("+debug=tiny", f"launch={strategy}", "launch.processes=1", "launch.device=cpu", "store=store", "data.limit=64")
    cli("train-rm", *fixed, "backbone.dtype=bfloat16", cwd=tmp_path)
    assert (tmp_path / "store" / "reward-model" / "v001" / "manifest.json").is_file()
