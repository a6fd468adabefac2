"""Every stage under every launch strategy, in both dtypes, with LoRA and with all weights: it runs, says what one process says, resumes.

A cell runs the stage's worker on two ranks (one under single). The few cells that differ most are among the quick tests, the whole is slow.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics, stage_config, timeless
from forked import preloaded, run_forked
from omegaconf import OmegaConf
from safetensors.torch import load_file

from grpo_safe import launch
from grpo_safe.versions import checkpoint

STRATEGIES = ("single", "zero1", "zero2", "zero3", "zero3_offload")
DTYPES = ("float32", "bfloat16")
WEIGHTS = ("lora", "all")
QUICK = {
    ("train-rm", "zero2", "bfloat16", "all"),
    ("train-policy", "zero3", "bfloat16", "all"),
    ("train-policy", "zero1", "bfloat16", "lora"),
    ("train-rm", "zero3_offload", "float32", "lora"),
}
Cell = tuple[str, str, str, str]


def cells(stage: str) -> list[Any]:
    """The stage's cells; those outside QUICK are slow."""
    table = [(stage, s, d, w) for s in STRATEGIES for d in DTYPES for w in WEIGHTS]
    return [pytest.param(*c, id="-".join(c[1:]), marks=() if c in QUICK else pytest.mark.slow) for c in table]


def frozen(command: str, run_dir: Path, store: Path, strategy: str, *words: str) -> Path:
    """A run directory with the config.yaml that the launcher would freeze."""
    cfg = OmegaConf.create(asdict(stage_config(command, run_dir, store, f"launch={strategy}", "launch.device=cpu", *words)))
    launch._resolve_versions(command, cfg)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    return run_dir


def resumed(run_dir: Path) -> Path:
    """The same run directory, to be taken up again from its newest state."""
    cfg = OmegaConf.load(run_dir / "config.yaml")
    cfg.resume = str(run_dir)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (run_dir / "published.txt").unlink()
    return run_dir


def ranks_of(strategy: str) -> int:
    return 1 if strategy == "single" else 2


@pytest.fixture(scope="module")
def go() -> Callable[[str, Path, str], None]:
    context = preloaded()
    return lambda module, run_dir, strategy: run_forked(context, module, run_dir, strategy, ranks_of(strategy))


@pytest.fixture(scope="module")
def store(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny store: cells publish into it."""
    return Path(shutil.copytree(tiny_store, tmp_path_factory.mktemp("matrix") / "store"))


@pytest.fixture(scope="module")
def by_one(go: Callable[..., None], store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The run directory of one process in float32, which a cell is held against; each is run once."""
    known: dict[tuple[str, str], Path] = {}

    def ran(stage: str, weights: str) -> Path:
        if (stage, weights) not in known:
            run_dir = tmp_path_factory.mktemp("one")
            module, words = MODULES[stage], (*words_of(stage, "float32", weights),)
            go(module, frozen(stage, run_dir, run_dir / "store" if stage == "train-rm" else store, "single", *words), "single")
            known[stage, weights] = run_dir
        return known[stage, weights]

    return ran


def after_first_step(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights that train, after the first update."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in (run_dir / "state" / "step-000001").glob("*.safetensors"):
        tensors |= load_file(shard)
    return {name: tensor for name, tensor in tensors.items() if name.startswith("weight/")}


MODULES = {"train-rm": "train_rm", "train-policy": "train_policy"}


def words_of(stage: str, dtype: str, weights: str) -> tuple[str, ...]:
    lora = str(weights == "lora").lower()
    if stage == "train-rm":
        return (
            "data.limit=64",
            "backbone.dropout=0",
            f"backbone.dtype={dtype}",
            f"backbone.lora.enabled={lora}",
            "train.log_every=1",
        )
    return ("reward_model=v1", f"policy.dtype={dtype}", f"policy.lora.enabled={lora}", "train.keep_states=2", "optim.lr=1e-3")


def close_to(rows: list[dict[str, Any]], one: list[dict[str, Any]], rel: float) -> None:
    for a, b in zip(rows, one, strict=True):
        for key in ("loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=rel, abs=2e-5), key


@pytest.mark.parametrize(("stage", "strategy", "dtype", "weights"), cells("train-rm"))
def test_a_reward_model(
    stage: str, strategy: str, dtype: str, weights: str, go: Callable[..., None], by_one: Callable[..., Any], tmp_path: Path
) -> None:
    """It fits as one process in float32 does, publishes finite weights; a run cut off before its card comes to the same card."""
    run_dir = frozen(stage, tmp_path / "run", tmp_path / "store", strategy, *words_of(stage, dtype, weights))
    go("train_rm", run_dir, strategy)
    close_to(read_metrics(run_dir), read_metrics(by_one(stage, weights)), rel=1e-3 if dtype == "float32" else 0.05)
    go("train_rm", resumed(run_dir), strategy)
    first, again = (checkpoint.open_version(tmp_path / "store", "reward-model", v) for v in ("v1", "v2"))
    assert again.manifest["metrics"]["objectives"] == first.manifest["metrics"]["objectives"]
    one, two = (load_file(v.path / "model.safetensors") for v in (first, again))
    assert all(torch.isfinite(w).all() for w in one.values())
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("stage", "strategy", "dtype", "weights"), cells("train-policy"))
def test_a_policy(
    stage: str, strategy: str, dtype: str, weights: str, go: Callable[..., None], by_one: Callable[..., Any], store: Path, tmp_path: Path
) -> None:  # fmt: skip
    """It trains (in float32 as one process does), and resumed after its first step it takes the same second one."""
    run_dir = frozen(stage, tmp_path / "run", store, strategy, *words_of(stage, dtype, weights))
    go("train_policy", run_dir, strategy)
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "grad_norm", "kl"))
    assert rows[0]["grad_norm"] > 0
    if dtype == "float32":  # in bfloat16, and after an update summed in another order, another token may be drawn
        one = by_one(stage, weights)
        close_to(rows[:1], read_metrics(one)[:1], rel=1e-3)
        mine, theirs = after_first_step(run_dir), after_first_step(one)
        assert mine and mine.keys() == theirs.keys()
        for name, weight in mine.items():
            assert (weight - theirs[name]).abs().max() < 1e-5, name  # a step is 1e-3
    published = [(run_dir / "published.txt").read_text().strip()]
    shutil.rmtree(run_dir / "state" / "step-000002")
    go("train_policy", resumed(run_dir), strategy)
    assert timeless(read_metrics(run_dir)) == timeless(rows)
    published.append((run_dir / "published.txt").read_text().strip())
    first, again = (load_file(Path(folder) / "model.safetensors") for folder in published)
    assert all(torch.isfinite(w).all() for w in first.values())
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_evaluation(dtype: str, go: Callable[..., None], store: Path, tmp_path: Path) -> None:
    """It says the same under every strategy: no weight is trained, and each rank answers its share of the prompts."""
    go(
        "train_policy",
        frozen("train-policy", tmp_path / "policy", store, "single", *words_of("train-policy", dtype, "lora")),
        "single",
    )
    said = {}
    for strategy in STRATEGIES:
        words = (f"dtype={dtype}", f"reward_model_dtype={dtype}", "policy=latest")
        run_dir = frozen("eval", tmp_path / strategy, store, strategy, *words)
        go("evaluate", run_dir, strategy)
        said[strategy] = json.loads((run_dir / "metrics.json").read_text())
    for strategy in STRATEGIES[1:]:
        assert said[strategy]["refusals"] == said["single"]["refusals"]
        for name, entry in said["single"]["objectives"].items():
            mine = said[strategy]["objectives"][name]["policy"]["value"]
            assert mine == pytest.approx(entry["policy"]["value"], abs=1e-6 if dtype == "float32" else 1e-2), (strategy, name)
