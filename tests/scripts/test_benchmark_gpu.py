"""scripts/benchmark_gpu.py where there is no GPU: the floor, what TRL is told, the sentence; the whole path at tiny size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_gpu

    return benchmark_gpu


def test_the_floor_counts_every_byte_of_every_step(script: ModuleType) -> None:
    from grpo_safe.models.memory import ModelShape

    shape = ModelShape(layers=3, hidden=16, intermediate=40, heads=4, kv_heads=2, head_dim=4, vocab=50, tied=True, qkv_bias=False)
    prompts, group, prompt_tokens, new = 2, 3, 7, 9
    read = 0
    for t in range(1, new):
        for _ in range(3):  # layers
            read += 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 40
            for _ in range(prompts):
                read += prompt_tokens * 2 * 2 * 4
                read += group * t * 2 * 2 * 4
        read += 50 * 16
    assert script.decode_floor(shape, 2, prompts, group, prompt_tokens, new, 1000.0) == pytest.approx(2 * read / 1000.0)


def test_the_floor_of_a_known_model_is_its_weights_and_a_little_more(script: ModuleType) -> None:
    from grpo_safe.models.memory import QWEN2_5

    one = script.decode_floor(QWEN2_5["0.5b"], 2, 1, 1, 1, 2, 1e9)  # one step
    assert one == pytest.approx(2 * 0.494e9 / 1e9, rel=0.001)
    assert script.decode_floor(QWEN2_5["0.5b"], 2, 4, 8, 128, 512, 1e12) > 511 * one / 1e3


def test_what_trl_is_told(script: ModuleType) -> None:
    on_gpu = {name: script.trl_settings(name, cuda=True) for name in script.TRL_VARIANTS}
    assert all(s["bf16"] and s["tf32"] and s["optim"] == "adamw_torch_fused" and not s["use_cpu"] for s in on_gpu.values())
    assert "use_transformers_continuous_batching" not in on_gpu["generate"]
    assert [on_gpu[n]["transformers_continuous_batching_config"]["use_cuda_graph"] for n in ("batching", "batching-graphs")] == [
        False,
        True,
    ]
    assert "tf32" not in script.trl_settings("generate", cuda=False)


def test_qwens_shape_is_the_published_one(script: ModuleType) -> None:
    from transformers import AutoConfig

    from grpo_safe.models.memory import QWEN2_5, shape_of

    assert shape_of(AutoConfig.for_model("qwen2", **script.QWEN_SHAPE)) == QWEN2_5["0.5b"]


@pytest.mark.parametrize("variant", ["generate", "batching", "batching-graphs"])
def test_trl_takes_what_it_is_told(script: ModuleType, variant: str, tmp_path: Path) -> None:
    from trl import GRPOConfig

    settings = script.trl_settings(variant, cuda=False)
    config = GRPOConfig(str(tmp_path), use_cpu=True, **settings)
    assert config.bf16 and config.use_transformers_continuous_batching == (variant != "generate")


def test_a_random_qwen_opens_and_its_tokenizer_skips_ids_that_it_lacks(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from grpo_safe import models

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(script, "QWEN_SHAPE", script.QWEN_SHAPE | small)
    start = models.resolve_start(script.random_qwen(tmp_path / "qwen"), None, False, "--models")
    model, tokenizer = models.load_causal_lm(start, "bfloat16"), models.load_tokenizer(start)
    assert model.config.vocab_size == 151_936 and model.dtype == torch.bfloat16
    words = tokenizer(" hello", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([151_000, *words, 150_000], skip_special_tokens=True) == " hello"


def test_the_fastest_setting_is_taken_and_one_that_fails_is_said(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {"generate": [9.0, 2.0, 2.2], "batching-graphs": [1.0, 1.5, 1.4]}

    class Fake:
        def __init__(self, system, job, memory_gb) -> None:
            self.left = list(seconds.get(job.folder.name.removeprefix("screen-"), []))

        def step(self):
            if not self.left:
                sys.exit("a benchmark process ended before its last step")
            return {"seconds": self.left.pop(0)}

        def close(self) -> None:
            pass

    monkeypatch.setattr(script, "Worker", Fake)
    job = script.Job(Path("x"), Path("s"), "p", "lora", 8, 8, 2, 1, 4, 3, "callable")
    found, tried = script.fastest(job, list(script.TRL_VARIANTS), True)
    assert found == "batching-graphs" and tried == {"generate": 2.1, "batching": None, "batching-graphs": 1.45}
    assert "batching: failed" in capsys.readouterr().out
    seconds.clear()
    with pytest.raises(SystemExit, match="none of its settings"):
        script.fastest(job, ["generate"], True)


def test_bandwidth_is_measured(script: ModuleType) -> None:
    assert 1e8 < script.copy_bandwidth(torch.device("cpu"), 2**22) < 1e13


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is visible: the command would run")
def test_without_a_gpu_it_stops_with_a_sentence(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main([])
    out = capsys.readouterr()
    assert stopped.value.code == 2 and out.out == "" and len(out.err.splitlines()) == 1
    assert "no CUDA device is visible" in out.err


@pytest.mark.slow
def test_the_whole_path_at_tiny_size(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--models", "embedded:tiny-llama", "--backbone", "embedded:tiny-bert", "--tuning", "lora"]
    words += [
        "--prompt-tokens",
        "60",
        "--new-tokens",
        "6",
        "--group-size",
        "4",
        "--prompts",
        "2",
        "--steps",
        "2",
        "--warm-up",
        "1",
    ]
    words += ["--no-check"]  # the check is benchmark.py's, and tested there
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmark_gpu.py"), *words, "--trl", "generate", "--out", str(tmp_path / "out.json")],
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "expected at most" not in done.stdout
    (found,) = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert found["trl_setting"] == "generate" and found["floor_seconds"] > 0
    for name in ("ours", "trl"):
        assert found[name]["step_seconds"] > 0 and found[name]["decoded_per_second"] > 0
        assert math.isclose(found[name]["floor_share"], found["floor_seconds"] / found[name]["seconds_in"]["sampling"])
    assert found["ratio"]["step_seconds"] == pytest.approx(found["ours"]["step_seconds"] / found["trl"]["step_seconds"])
