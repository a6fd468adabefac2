"""Stages in processes of their own, forked from one that has imported everything: a run at the price of the run, not of its imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

CPU = {
    "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "DS_LOG_LEVEL": "error", "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false", "LOCAL_RANK": "0", "RANK": "0",
    "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
}  # fmt: skip
IMPORTED = [
    "accelerate",
    "deepspeed",
    "peft",
    "transformers",
    *(f"grpo_safe.stages.{m}" for m in ("train_rm", "train_policy", "evaluate")),
]
SECONDS = 300


def preloaded() -> ForkServerContext:
    """The server of this test session; what it has imported every fork has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # DeepSpeed reads its accelerator while it is imported; a pool of threads is not forked
        for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
            patch.setenv(name, CPU[name])
        forkserver.ensure_running()
    return context


def worker(module: str, frozen: str, environment: Mapping[str, str], log: str) -> None:
    """One rank of a run; its exit code is the stage's."""
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(environment)
    from grpo_safe.stages.__main__ import main

    os._exit(main([module, frozen]))  # at once: no rank waits for another's clean-up


def run_forked(context: ForkServerContext, module: str, run_dir: Path, strategy: str, processes: int) -> None:
    """The stage of RUN_DIR/config.yaml on so many ranks; AssertionError with the logs' ends where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment = CPU | place | {"MASTER_PORT": port}
        log = str(run_dir / f"rank-{rank}.log")
        ranks.append(context.Process(target=worker, args=(module, str(run_dir / "config.yaml"), environment, log)))
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(SECONDS)
        if one.is_alive():
            for other in ranks:
                other.kill()
    ends = "\n".join((run_dir / f"rank-{rank}.log").read_text()[-3000:] for rank in range(processes))
    assert [one.exitcode for one in ranks] == [0] * processes, f"{module} under {strategy}:\n{ends}"
