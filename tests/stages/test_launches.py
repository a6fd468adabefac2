"""The real command in processes of its own: ZeRO on two, kill and resume, sweeps, overlays, a wheel."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from conftest import cli, only_run, read_metrics, timeless
from safetensors.torch import load_file

from grpo_safe.versions import checkpoint

TWO = ("launch.processes=2", "launch.device=cpu")


def close_to(one: list[dict], two: list[dict]) -> None:
    """Equal completions and scores; loss, gradient norm and KL to 1e-4, over every step."""
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for key in ("completion_tokens", "length/mean", "truncated", "zero_spread_groups"):
            assert a[key] == b[key], key
        for key in a:
            if key.startswith(("score/", "reward/", "score_group_std/")) or key in ("loss", "grad_norm", "kl", "entropy"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=2e-5), key


def samples(run_dir: Path) -> list[tuple[int, str, str]]:
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [(r["step"], r["prompt"], r["completion"]) for r in rows]


@pytest.fixture(scope="module")
def store(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny store: publishing in processes of its own must not disturb other tests."""
    return Path(shutil.copytree(tiny_store, tmp_path_factory.mktemp("launches") / "store"))


@pytest.mark.parametrize(("strategy", "words"), [
    ("zero2", ()),
    ("zero3", ("policy.lora.enabled=false", "policy.gradient_checkpointing=selective")),
    pytest.param("zero3", (), marks=pytest.mark.slow),
    pytest.param("zero1", (), marks=pytest.mark.slow),
    pytest.param("zero2", ("policy.lora.enabled=false", "algo.minibatches=2", "algo.updates_per_rollout=2"), marks=pytest.mark.slow),
])  # fmt: skip
def test_two_processes_reproduce_one(strategy: str, words: tuple[str, ...], store: Path, tmp_path: Path) -> None:
    common = ("train-policy", "+debug=tiny", f"store={store}", "reward_model=v1", "tracking.sample_count=2", *words)
    cli(*common, "name=one", cwd=tmp_path)
    cli(*common, "name=two", f"launch={strategy}", *TWO, cwd=tmp_path)
    one, two = (only_run(tmp_path / "runs" / "train-policy" / name) for name in ("one", "two"))
    close_to(read_metrics(one), read_metrics(two))
    assert samples(two)[0] == samples(one)[0]
    weights = [load_file(checkpoint.open_version(store, "policy", v).path / "model.safetensors") for v in newest_two(store)]
    assert all(torch.allclose(weights[0][k].float(), weights[1][k].float(), atol=1e-2) for k in weights[0])  # bf16 on disk


def newest_two(store: Path) -> list[str]:
    return sorted(p.name for p in (store / "policy").iterdir())[-2:]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_two_processes_fit_the_same_reward_model(strategy: str, tmp_path: Path) -> None:
    common = ("train-rm", "+debug=tiny", "data.limit=128", "backbone.dropout=0", "train.log_every=1", "optim.lr=1e-3")
    cli(*common, "name=one", "store=one", cwd=tmp_path)
    cli(*common, "name=two", "store=two", f"launch={strategy}", *TWO, cwd=tmp_path)
    one, two = (read_metrics(only_run(tmp_path / "runs" / "train-rm" / name)) for name in ("one", "two"))
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    figures = [
        checkpoint.open_version(tmp_path / s, "reward-model", "latest").manifest["metrics"]["objectives"] for s in ("one", "two")
    ]
    assert figures[0]["safety"]["n"] == figures[1]["safety"]["n"]
    assert figures[0]["actionability"]["spearman"]["value"] == pytest.approx(
        figures[1]["actionability"]["spearman"]["value"], abs=1e-2
    )


@pytest.mark.slow
def test_eval_on_two_processes_says_the_same(store: Path, tmp_path: Path) -> None:
    cli("train-policy", "+debug=tiny", f"store={store}", "reward_model=v1", cwd=tmp_path)
    for name, words in (("one", ()), ("two", ("launch=zero2", *TWO))):
        cli("eval", "+debug=tiny", f"store={store}", f"name={name}", *words, cwd=tmp_path)
    one, two = (json.loads((only_run(tmp_path / "runs" / "eval" / n) / "metrics.json").read_text()) for n in ("one", "two"))
    assert one["objectives"]["safety"]["policy"]["value"] == pytest.approx(
        two["objectives"]["safety"]["policy"]["value"], abs=1e-6
    )
    assert one["refusals"] == two["refusals"]


PARTITIONED = """
import os, sys, json, torch
from pathlib import Path
from grpo_safe.checks import load_frozen, typed
from grpo_safe.stages.train_policy import set_up
cfg = typed(load_frozen("train-policy", Path(sys.argv[1])))
s = set_up(cfg, Path(sys.argv[1]).parent)
parameters = list(s.trainable.module.parameters())
held = sum(p.numel() for p in parameters)
whole = sum(p.ds_numel for p in parameters)
judge = sum(p.numel() for p in s.reward_model.model.parameters())
if s.rt.is_main:
    print("RESULT", json.dumps([held, whole, judge, sum(p.numel() == p.ds_numel for p in parameters)]))
"""


@pytest.mark.slow
def test_zero3_really_partitions_and_leaves_the_reward_model_whole(store: Path, tmp_path: Path) -> None:
    words = (
        "train-policy",
        "+debug=tiny",
        f"store={store}",
        "reward_model=v1",
        "launch=zero3",
        "launch.freeze_only=true",
        "launch.device=cpu",
    )
    run_dir = cli(*words, cwd=tmp_path).stdout.splitlines()[0]
    (tmp_path / "look.py").write_text(PARTITIONED)
    out = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "look.py", f"{run_dir}/config.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    held, whole, judge, kept_whole = json.loads(
        next(line for line in out.stdout.splitlines() if "RESULT" in line).split("RESULT")[1]
    )
    assert held == 0  # outside a forward a partitioned tensor is empty
    assert kept_whole == 0
    assert whole > 1_000_000
    assert judge > 900_000


@pytest.mark.slow
def test_outside_launcher_runs_a_frozen_config(store: Path, tmp_path: Path) -> None:
    frozen = cli(
        "train-policy",
        "+debug=tiny",
        f"store={store}",
        "reward_model=v1",
        "launch=zero2",
        "launch.freeze_only=true",
        cwd=tmp_path,
    )
    run_dir = Path(frozen.stdout.splitlines()[0])
    before = len(list((store / "policy").glob("v*"))) if (store / "policy").is_dir() else 0
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "grpo_safe.stages", "train_policy",
         str(run_dir / "config.yaml")],
        cwd=tmp_path, check=True, capture_output=True, timeout=600,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    assert len(read_metrics(run_dir)) == 2
    assert len(list((store / "policy").glob("v*"))) == before + 1


@pytest.mark.parametrize(("words", "resumed_on"), [
    ((), ()),
    pytest.param(("launch=zero2", *TWO), (), marks=pytest.mark.slow),
    pytest.param(("launch=zero3", *TWO), (), marks=pytest.mark.slow),
    pytest.param((), ("launch=zero2", *TWO), marks=pytest.mark.slow),
])  # fmt: skip
def test_killed_and_resumed_equals_unbroken(
    words: tuple[str, ...], resumed_on: tuple[str, ...], store: Path, tmp_path: Path
) -> None:
    common = ("train-policy", "+debug=tiny", f"store={store}", "reward_model=v1", "train.steps=6", "optim.lr=1e-2", *words)
    cli(*common, "name=unbroken", cwd=tmp_path)
    kill_after_step_4(common, tmp_path)
    killed = only_run(tmp_path / "runs" / "train-policy" / "killed")
    cli("train-policy", "name=killed", "resume=latest", *resumed_on, cwd=tmp_path)
    unbroken, resumed = (read_metrics(only_run(tmp_path / "runs" / "train-policy" / n)) for n in ("unbroken", "killed"))
    weights = [
        load_file(checkpoint.open_version(store, "policy", v).path / "adapter" / "adapter_model.safetensors")
        for v in newest_two(store)
    ]
    assert [r["step"] for r in resumed] == [1, 2, 3, 4, 5, 6]
    if resumed_on:  # another number of processes sums in another order
        close_to(unbroken, resumed)
    else:
        assert timeless(unbroken) == timeless(resumed)
        assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not (killed / "error.json").exists()


def kill_after_step_4(common: tuple[str, ...], cwd: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_safe", *common, "name=killed"], cwd=cwd, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(cwd.glob("runs/train-policy/killed/*/state/step-000004")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)  # torchrun's workers lead sessions of their own
    for one in (process, *family):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_sweep_gives_four_versions_with_one_parent(store: Path, tmp_path: Path) -> None:
    before = {p.name for p in (store / "policy").glob("v*")}
    words = ("objectives.safety.weight=0.5,2", "seed=0,1", "train.steps=1")
    cli("train-policy", "+debug=tiny", f"store={store}", "reward_model=v1", "-m", *words, cwd=tmp_path)
    new = sorted({p.name for p in (store / "policy").glob("v*")} - before)
    manifests = [checkpoint.open_version(store, "policy", v).manifest for v in new]
    assert len(new) == 4
    settings = {(m["config"]["seed"], m["objectives"][0]["weight"]) for m in manifests}
    assert settings == {(0, 0.5), (0, 2.0), (1, 0.5), (1, 2.0)}
    assert len({m["parents"][0]["content_sha256"] for m in manifests}) == 1
    shown = cli("checkpoints", f"store={store}", cwd=tmp_path).stdout
    assert all(f"policy {v}" in shown for v in new)


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Qwen2 of tiny width with SmolLM2's tokenizer, in place of a download."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from grpo_safe.models.embedded import embedded_folder

    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-llama"))
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ("+model=7b",),
    ("+model=14b",),
    ("+model=7b", "launch=zero3", "policy.lora.enabled=false", "launch.param_persistence_threshold=0"),
    ("+model=0.5b", "launch=zero2"),
])  # fmt: skip
def test_model_overlays_run_under_their_own_sharding(
    words: tuple[str, ...], tiny_qwen: Path, store: Path, tmp_path: Path
) -> None:
    small = ("sampling.max_new_tokens=8", "train.steps=2", "train.prompts_per_step=4", "algo.group_size=4", "train.save_every=1",
             "reward_model_gate=warn", "reward_model=v1")  # fmt: skip
    cli("train-policy", *words, f"policy.start={tiny_qwen}", f"store={store}", *small, *TWO, cwd=tmp_path)
    rows = read_metrics(only_run(tmp_path / "runs"))
    assert [r["step"] for r in rows] == [1, 2]
    assert rows[0]["grad_norm"] > 0
    found = checkpoint.open_version(store, "policy", "latest")
    assert found.manifest["config"]["launch"]["strategy"] in ("zero2", "zero3")


@pytest.mark.slow
def test_a_wheel_in_a_clean_environment_trains_from_another_folder(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path / "dist"),
            str(root),
        ],
        check=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "grpo_safe/conf/train_rm.yaml" in zipfile.ZipFile(wheel).namelist()
    # A clean environment that sees this one's dependencies, but not this checkout.
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    dependencies = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "dependencies.pth").write_text(dependencies + "\n")
    work = tmp_path / "elsewhere"
    work.mkdir()
    done = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "grpo-safe"), "train-rm", "+debug=tiny", "data.limit=64"], cwd=work, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    where = subprocess.run(
        [str(python), "-c", "import grpo_safe; print(grpo_safe.__file__)"], capture_output=True, text=True, check=True, cwd=work
    )
    assert str(tmp_path / "venv") in where.stdout
    assert (work / "checkpoints" / "reward-model" / "v001" / "manifest.json").is_file()
