"""Which groups a step takes (dynamic sampling), and which step is published: the stage's own rules, with sampling and scoring faked."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_sharded_statistics import Meeting, ThreadRuntime

from grpo_safe.algorithm.aggregation import linear
from grpo_safe.algorithm.constraints import Limit
from grpo_safe.algorithm.order import derived_seed, rows_of_step
from grpo_safe.config import AlgoConfig, LimitConfig, TrainPolicyConfig
from grpo_safe.records import Prompt, Rollout, Scores
from grpo_safe.rewards import Objectives
from grpo_safe.runtime import Runtime
from grpo_safe.stages.train_policy import collecting, finishing
from grpo_safe.stages.train_policy.method import build_method
from grpo_safe.tracking import Stopwatch

SIZE, PROMPTS, PER_STEP = 3, 40, 4
ALONE = Runtime(0, 1, torch.device("cpu"), "single")


def fake_sample(decode, policy, tokenizer, prompts, ids, size, sampling, seed, step, repeats=None) -> Rollout:
    repeated = [p for p in prompts for _ in range(size)]
    n = len(repeated)
    zeros = torch.zeros(n, 2, dtype=torch.long)
    texts = [f"{p.id} {seed} {i % size}" for i, p in enumerate(repeated)]
    return Rollout(repeated, zeros, zeros, zeros, zeros + 1, torch.zeros(n, 2), torch.zeros(n).bool(), texts)


def two_ranks(of_rank) -> list[Any]:
    meeting = Meeting(threading.Barrier(2))

    class Both(ThreadRuntime):
        def maximum(self, value: int) -> int:
            return max(self.gather(value))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda r: of_rank(Both(r, 2, torch.device("cpu"), "zero2", None, meeting)), range(2)))


def collected(patch, rt: Runtime, ties: set[str], rounds: int = 3):
    """One step's groups, where the prompts named in `ties` give equal scores."""

    def fake_score(objectives, reward_model, prompts, texts, budget) -> Scores:
        values = torch.tensor([[0.5 if p.id in ties else float(t[-1]) / 10] for p, t in zip(prompts, texts, strict=True)])
        return Scores(["safety"], values, torch.ones_like(values).bool())

    patch.setattr(collecting, "sample", fake_sample)
    patch.setattr(collecting, "score", fake_score)
    cfg = TrainPolicyConfig(algo=AlgoConfig(group_size=SIZE, resample_ties=rounds), seed=5)
    cfg.train.prompts_per_step = PER_STEP
    method = build_method(cfg.algo, Objectives(["safety"], [1.0], [0], [None]), {}, 8)
    prompts = [Prompt(f"p{i}", ()) for i in range(PROMPTS)]
    s: Any = SimpleNamespace(
        rt=rt, read=SimpleNamespace(prompts=prompts, prompt_ids=[[1]] * PROMPTS), tokenizer=SimpleNamespace(pad_token_id=0), objectives=None, reward_model=None,
        trainable=SimpleNamespace(gathered=lambda: nullcontext()), method=method, engine=None,
    )  # fmt: skip
    rollout, scores, drawn = collecting.collect(cfg, s, 1, torch.ones(1), {}, Stopwatch())
    assert len(rollout) == len(scores) == PER_STEP // rt.world_size * SIZE
    assert [p.id for p in rollout.prompts] == [t.split()[0] for t in rollout.texts]
    assert [int(t[-1]) for t in rollout.texts] == list(range(SIZE)) * (PER_STEP // rt.world_size)  # groups stay whole
    return [p.id for p in rollout.prompts[::SIZE]], drawn


def drawn_in(round_: int) -> list[str]:
    return [f"p{i}" for i in rows_of_step(PROMPTS, PER_STEP, 1, 5 if round_ == 0 else derived_seed(5, round_))]


def test_tied_groups_make_room_for_later_ones_and_fill_what_stays_open(monkeypatch) -> None:
    first, second, third = drawn_in(0), drawn_in(1), drawn_in(2)
    assert len({*first, *second}) == 8  # of this seed
    assert collected(monkeypatch, ALONE, set()) == (first, 1)
    assert collected(monkeypatch, ALONE, {first[1]}) == ([first[0], first[2], first[3], second[0]], 2)
    assert collected(monkeypatch, ALONE, {*first, *second[:3]}, rounds=1) == ([*first[:3], second[3]], 2)
    everything = {f"p{i}" for i in range(PROMPTS)}
    assert collected(monkeypatch, ALONE, everything, rounds=2) == (first, 3)
    assert collected(monkeypatch, ALONE, everything, rounds=0) == (first, 1)
    kept, rounds = collected(monkeypatch, ALONE, {*first, *second} - {*third})
    assert rounds >= 3 and set(kept) <= {*third, *drawn_in(3)}


def test_ranks_sample_as_many_rounds_as_the_one_in_need(monkeypatch) -> None:
    first, second = drawn_in(0), drawn_in(1)
    found = two_ranks(lambda rt: collected(monkeypatch, rt, {first[3]}))
    assert found == [(first[:2], 2), ([first[2], second[2]], 2)]


def judged(patch, rt: Runtime, values: list[list[float]], mask: list[list[bool]]) -> dict[str, float]:
    def fake_score(objectives, reward_model, prompts, texts, budget) -> Scores:
        rows = [int(p.id) for p in prompts]
        return Scores(objectives.names, torch.tensor(values)[rows], torch.tensor(mask)[rows])

    patch.setattr(finishing, "sample", fake_sample)
    patch.setattr(finishing, "score", fake_score)
    n = len(values)
    s: Any = SimpleNamespace(
        rt=rt, read=SimpleNamespace(validation=[Prompt(str(i), ()) for i in range(n)], validation_ids=[[1]] * n), tokenizer=None, reward_model=None,
        objectives=Objectives(["safety", "charm"], [1.0, 1.0], [0, None], [None, None]),
        trainable=SimpleNamespace(gathered=lambda: nullcontext()), engine=None,
        method=SimpleNamespace(slots=SimpleNamespace(limits=[Limit(0, 0.5), Limit(1, 0.5, 0.9)], aggregate=linear), spoken=list),
    )  # fmt: skip
    return finishing.validate(TrainPolicyConfig(), s)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_score_that_is_missing_is_no_zero_in_the_validation(monkeypatch, ranks) -> None:
    values = [[0.6, 0.7], [0.4, 0.0], [float("nan"), 0.8], [0.8, 0.9], [0.7, 0.6]]
    mask = [[True, True], [True, False], [True, True], [True, True], [True, True]]

    def run(rt):
        return judged(monkeypatch, rt, values, mask)

    for found in [run(ALONE)] if ranks == 1 else two_ranks(run):
        assert found["validation/safety"] == pytest.approx((0.6 + 0.4 + 0.8 + 0.7) / 4)
        assert found["validation/charm"] == pytest.approx(0.75)
        low = 0.75 - 1.637744 * (0.05 / 3) ** 0.5 / 2  # t(.9, 3) of four scores
        assert found["validation/limit/charm/low"] == pytest.approx(low, abs=1e-5)
        assert found["validation/limit/safety/holds"] == found["validation/limit/charm/holds"] == 1.0


def test_the_best_step_is_the_best_reward_among_those_that_hold(monkeypatch, tmp_path) -> None:
    saved: list[int] = []
    monkeypatch.setattr(finishing.resume, "save", lambda folder, step, *rest, keep, also: saved.append(step))
    limits = {"safety": LimitConfig(0.5)}
    objectives = Objectives(["safety", "charm", "logged"], [1.0, 2.0, 0.0], [0, 1, 2], [None] * 3, {}, limits)
    s: Any = SimpleNamespace(objectives=objectives, trainable=None, rt=ALONE)
    best: dict[str, Any] = {}
    nan = float("nan")
    for step, (safety, charm, logged, holds) in enumerate(
        [(0.4, 0.9, 0.0, 0.0), (0.5, nan, 0.0, 1.0), (0.5, 0.2, nan, 1.0), (0.6, 0.5, 0.0, 1.0), (0.9, 0.35, 0.0, 1.0), (0.5, 0.9, 0.0, 0.0)], 1
    ):  # fmt: skip
        seen = {
            "validation/safety": safety,
            "validation/charm": charm,
            "validation/logged": logged,
            "validation/reward": safety + 2 * charm,
            "validation/limit/safety/holds": holds,
        }
        best = finishing.keep_best(s, tmp_path, step, seen, best)
    assert saved == [3, 4] and best["step"] == 4  # .6 + 2 x .5 = .9 + 2 x .35: the first of equals
    assert best["reward"] == pytest.approx(1.6)
    unlimited: Any = SimpleNamespace(objectives=Objectives(["safety"], [1.0], [0], [None]))
    assert finishing.keep_best(unlimited, tmp_path, 1, {"validation/safety": 1.0}, {}) == {}
