"""Which completions a loss that compares them gets: none that is masked, no group whose differences are rounding, and the reference reads no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import read_metrics, stage_config

from grpo_safe.algorithm.advantages import GroupAdvantages
from grpo_safe.algorithm.comparison import Comparison
from grpo_safe.config import AlgoConfig, TrainPolicyConfig
from grpo_safe.records import TrainBatch
from grpo_safe.rewards import Objectives
from grpo_safe.runtime import Runtime
from grpo_safe.stages import train_policy
from grpo_safe.stages.train_policy import collecting
from grpo_safe.stages.train_policy.comparing import arranged
from grpo_safe.stages.train_policy.method import build_method


def compared(loss: str, rewards: list[float], masked: set[int], tie_spread: float = 1e-3) -> tuple[list[int], list[float]]:
    """Rows of groups of four, and their factors; completion_ids tell the rows apart."""
    n = len(rewards)
    mask = torch.tensor([[0 if i in masked else 1] for i in range(n)])
    ids = torch.arange(n)[:, None]
    ones = torch.ones(n, 1, dtype=torch.long)
    batch = TrainBatch(ones, ones, ids, mask, ones[:, 0], -ones.float(), torch.zeros(n))
    algo = AlgoConfig(loss=loss, kl_coef=0.0, group_size=4, tie_spread=tie_spread)
    method = build_method(algo, Objectives(["safety"], [1.0], [0], [None]), {"safety": "absolute"}, 8)
    r = torch.tensor(rewards)
    found = Comparison(r, torch.ones(n).bool(), GroupAdvantages(r, r[::4], r[::4] > 2), [], {})
    s: Any = SimpleNamespace(rt=Runtime(0, 1, torch.device("cpu"), "single"), method=method)
    batch = arranged(TrainPolicyConfig(algo=algo), s, SimpleNamespace(prompts=[]), batch, found)  # type: ignore[arg-type]
    return batch.completion_ids[:, 0].tolist(), batch.advantages.tolist()


REWARDS = [0.9, 0.5, 0.1, 0.3, 0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize("loss", ["dpo", "tdpo", "gflow_dpo"])
def test_a_pair_has_no_masked_half(loss: str) -> None:
    assert compared(loss, REWARDS, set()) == ([0, 2, 7, 4], [1.0] * 4)
    assert compared(loss, REWARDS, {0, 4}) == ([1, 2, 7, 5], [1.0] * 4)  # the best of one group, the worst of the other
    assert compared(loss, REWARDS, {0, 1, 2})[1] == [0.0, 0.0, 1.0, 1.0]  # one is left: nothing to compare


def test_what_is_masked_is_neither_ranked_nor_the_best() -> None:
    rows, factors = compared("pro", REWARDS, {0, 7})
    assert (rows, factors) == ([1, 3, 2, 0, 6, 5, 4, 7], [1.0, 1.0, 1.0, 0.0] * 2)
    assert compared("best_of_group", REWARDS, {0, 7}) == ([1, 6], [1.0, 1.0])


def test_a_group_whose_differences_are_rounding_is_not_compared() -> None:
    rounding = [0.5, 0.5001, 0.5, 0.5, *REWARDS[4:]]  # std .00005
    assert compared("dpo", rounding, set())[1] == [0.0, 0.0, 1.0, 1.0]
    assert compared("pro", rounding, set())[1] == [0.0] * 4 + [1.0] * 4
    assert compared("dpo", rounding, set(), tie_spread=0.0)[1] == [1.0] * 4
    assert compared("best_of_group", rounding, set()) == ([1, 7], [1.0, 1.0])  # is not pushed against the others


@pytest.mark.parametrize(("preset", "rows"), [("dpo", 2), ("superhf", 1), ("grpo", 4)])
def test_the_reference_reads_what_trains(preset: str, rows: int, tiny_store: Path, tmp_path: Path, monkeypatch) -> None:
    seen: list[int] = []
    whole = collecting.fixed_outputs

    def counting(cfg, rt, model, batch, extras):
        seen.append(len(batch))
        found = whole(cfg, rt, model, batch, extras)
        assert found.logps is not None and len(found.logps) == len(batch)
        return replace(found)

    monkeypatch.setattr(collecting, "fixed_outputs", counting)
    words = (f"algo={preset}", "algo.group_size=4", "train.steps=1", "train.prompts_per_step=3")
    train_policy.run(stage_config("train-policy", tmp_path, tiny_store, *words), tmp_path)
    assert seen == [3 * rows]
    assert read_metrics(tmp_path)[0]["kl"] == pytest.approx(0.0, abs=1e-6)
