"""What is computed over all ranks is the same on each of them, and the same as in one process with the whole batch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf

from grpo_safe.cli import conf_dir
from grpo_safe.config import AlgoConfig, LimitConfig, TrainPolicyConfig
from grpo_safe.records import Prompt, Rollout, Scores, TrainBatch
from grpo_safe.rewards import Objectives
from grpo_safe.runtime import Runtime
from grpo_safe.stages.train_policy.collecting import own_rows, untied
from grpo_safe.stages.train_policy.comparing import compare_all
from grpo_safe.stages.train_policy.method import build_method
from grpo_safe.stages.train_policy.updating import count

GROUPS, SIZE, K, C = 6, 4, 3, 5
NAMES = ["safety", "politeness", "actionability"]
SLOTS = ["group_std", "centred", "leave_one_out", "batch_std", "whitened", "group_whitened", "running_clip"]
CASES: dict[str, dict[str, Any]] = {
    **{f"{name} and limits": {"normalization": name} for name in SLOTS},
    "gdpo": {"order": "normalize_first", "aggregation": "total", "whiten": True},
    "worst_head": {"aggregation": "worst_head"},
    "max_min": {"aggregation": "max_min"},
    "hc_grpo": {"constraint": "pessimistic", "normalization": "leave_one_out"},
    "best_random": {"filter": "best_random"},
    "rloo": {"normalization": "leave_one_out", "kl_in": "reward", "kl_estimator": "k1"},
}


@dataclass
class Meeting:
    """Where the threads of a fake world leave their values."""

    barrier: threading.Barrier
    values: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadRuntime(Runtime):
    """A rank that is a thread: gather returns what both have brought."""

    meeting: Any = None

    def gather(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait(timeout=60)
        found = [self.meeting.values[rank] for rank in range(self.world_size)]
        self.meeting.barrier.wait(timeout=60)
        return found


def batch_of(seed: int) -> tuple[Rollout, Scores, TrainBatch]:
    """A step's whole batch: ranks get neighbouring groups of it. Ties, NaN, missing scores, and levels that differ between ranks."""
    g = torch.Generator().manual_seed(seed)
    n = GROUPS * SIZE
    values = torch.rand(n, K, generator=g) * torch.linspace(0.2, 1.0, n)[:, None]
    values[:SIZE] = 0.5
    values[[SIZE + 1, n - 1], 1] = torch.nan
    mask = torch.rand(n, K, generator=g) > 0.1
    lengths = torch.randint(1, C + 1, (n, 1), generator=g)
    inside = (torch.arange(C) < lengths).long()
    prompts = [Prompt(f"p{i // SIZE}", ()) for i in range(n)]
    logps, ref = (-torch.rand(n, C, generator=g) * inside for _ in range(2))
    zeros = torch.zeros(n, C, dtype=torch.long)
    rollout = Rollout(prompts, zeros, zeros, zeros, inside, logps, lengths[:, 0] == C, [""] * n)
    return (
        rollout,
        Scores(NAMES, values, mask),
        TrainBatch(zeros, zeros, zeros, inside, lengths[:, 0], logps, torch.zeros(n), None, ref),
    )


def rows_of(record: Any, rows: slice) -> Any:
    """Those rows of a record of tensors and lists."""
    parts = {name: getattr(record, name) for name in record.__dataclass_fields__ if name != "objectives"}
    return replace(
        record, **{name: part if part is None or isinstance(part, int) else part[rows] for name, part in parts.items()}
    )


def settings(case: str) -> tuple[TrainPolicyConfig, Any]:
    algo = {
        **OmegaConf.to_container(OmegaConf.load(conf_dir() / "algo" / "grpo.yaml")),
        "group_size": SIZE,
        "truncated": "penalize",
    }
    cfg = TrainPolicyConfig(algo=AlgoConfig(**{**algo, **CASES[case]}))
    limits = {"safety": LimitConfig(0.6, 0.9), "politeness": LimitConfig(0.4)}
    objectives = Objectives(NAMES, [1.0, 0.5, 2.0], [0, 1, 2], [None] * 3, {}, limits)
    return cfg, build_method(cfg.algo, objectives, dict.fromkeys(NAMES, "absolute"), C)


def steps_of(rt: Runtime, case: str) -> list[tuple]:
    """Two steps of one rank: what it trains on, and what it knows of the whole."""
    cfg, method = settings(case)
    s, state, found = SimpleNamespace(rt=rt, method=method), {}, []
    for step in (1, 2):
        rollout, scores, batch = batch_of(step)
        share = rt.share(list(range(GROUPS)))
        rows = slice(share[0] * SIZE, (share[-1] + 1) * SIZE)
        rollout, scores, batch = (rows_of(r, rows) for r in (rollout, scores, batch))
        ties = untied(cfg, s, scores, torch.tensor([1.0, 0.5, 2.0]), state)
        seen = compare_all(cfg, s, rollout, scores, batch, step, torch.tensor([1.0, 0.5, 2.0]), state)
        state = seen.state
        mine = own_rows(rt, seen.groups.advantages, len(batch))
        whole = [
            seen.groups.advantages.tolist(),
            seen.rewards.tolist(),
            seen.groups.spread.tolist(),
            repr(seen.limits),
            repr(state),
        ]
        found.append((mine.tolist(), ties, whole))
    return found


def check(ranks: list[list[tuple]], alone: list[tuple]) -> None:
    """Bit for bit."""
    for step, (advantages, ties, whole) in enumerate(alone):
        assert any(abs(a) > 0.01 for a in advantages) and False in ties and True in ties
        assert len(ranks) == 2 and all(len(rank[step][0]) == GROUPS * SIZE // 2 for rank in ranks)
        assert [a for rank in ranks for a in rank[step][0]] == advantages
        assert [tie for rank in ranks for tie in rank[step][1]] == ties
        assert all(rank[step][2] == whole for rank in ranks)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_bit_for_bit(case) -> None:
    meeting = Meeting(threading.Barrier(2))
    ranks = [ThreadRuntime(rank, 2, torch.device("cpu"), "zero2", None, meeting) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rt: steps_of(rt, case), ranks))
    check(found, steps_of(Runtime(0, 1, torch.device("cpu"), "single"), case))


def test_ties_are_those_of_the_objective_that_all_ranks_find_worst() -> None:
    """On rank 0 safety looks worst, and ties there; over both ranks it is politeness, where nothing ties."""
    cfg, method = settings("worst_head")
    values = torch.tensor([[0.2, 0.3, 1.0], [0.2, 0.4, 1.0], [0.2, 0.5, 1.0], [0.2, 0.6, 1.0]])
    values = torch.cat([values, torch.tensor([[0.9, 0.1, 1.0], [0.8, 0.2, 1.0], [0.9, 0.0, 1.0], [0.8, 0.3, 1.0]])])
    meeting = Meeting(threading.Barrier(2))

    def of_rank(rank: int) -> list[bool]:
        rt = ThreadRuntime(rank, 2, torch.device("cpu"), "zero2", None, meeting)
        scores = Scores(NAMES, values[rank * SIZE : (rank + 1) * SIZE], torch.ones(SIZE, K).bool())
        return untied(cfg, SimpleNamespace(rt=rt, method=method), scores, torch.ones(K), {})

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(of_rank, range(2))) == [[True], [True]]
    alone = SimpleNamespace(rt=Runtime(0, 1, torch.device("cpu"), "single"), method=method)
    assert untied(cfg, alone, Scores(NAMES, values, torch.ones(2 * SIZE, K).bool()), torch.ones(K), {}) == [True, True]
    assert untied(cfg, alone, Scores(NAMES, values[:SIZE], torch.ones(SIZE, K).bool()), torch.ones(K), {}) == [False]


def process_rank(rank: int, where: str, queue: Any) -> None:
    """One real process of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
    rt = Runtime(rank, 2, torch.device("cpu"), "zero2")
    batch = batch_of(1)[2]
    counted = count(rt, rows_of(batch, slice(rank * 8, 8 + rank * 16)), range(8 + rank * 8))  # 8 rows here, 16 there
    queue.put((rank, {case: steps_of(rt, case) for case in CASES}, (counted.sequences, counted.tokens), rt.maximum(rank + 3)))
    dist.destroy_process_group()


def test_two_real_processes_equal_one_bit_for_bit(tmp_path) -> None:
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=process_rank, args=(rank, str(tmp_path / "meet"), queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    rt = Runtime(0, 1, torch.device("cpu"), "single")
    for case in CASES:
        check([answer[1][case] for answer in found], steps_of(rt, case))
    whole = count(rt, batch_of(1)[2], range(24))
    assert [answer[2] for answer in found] == [(whole.sequences, whole.tokens)] * 2 == [(24.0, whole.tokens)] * 2
    assert [answer[3] for answer in found] == [4, 4]
