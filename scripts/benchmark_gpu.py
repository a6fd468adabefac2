"""grpo-safe and TRL in turn on one CUDA GPU: step time, tokens a second, memory, and decoding against the memory-bandwidth floor.

    python scripts/benchmark_gpu.py --out gpu.json                       # SmolLM2-135M and a random Qwen2.5-0.5B, LoRA and all weights
    python scripts/benchmark_gpu.py --models smollm2 --tuning lora       # one of them

Both in bfloat16, G=8, 512 new tokens, end tokens forbidden. TRL runs without vLLM, in each of its settings that may be its fastest (TRL_VARIANTS);
a short run alone finds which one is, and that one then makes its steps in turn with ours. Before that, both make the same updates on the same
stored completions in float32 and must agree (benchmark.check).

The floor of decoding is the time to read, at the bandwidth measured here by a large copy, what every token must read at least: all weights once,
and the keys and values so far, a prompt's once per group.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from benchmark import Worker, check
from benchmark_systems import Job, ours, publish_reward_model, theirs

from grpo_safe.models.memory import ModelShape, shape_of

SMOLLM2, QWEN = "embedded:SmolLM2-135M-Instruct", "qwen2.5-0.5b"
MODELS = ("smollm2", QWEN)
QWEN_SHAPE = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
HEADS = 4  # objectives of the reward model
SCREEN_STEPS = 3  # of each TRL setting alone; the first is warm-up
EXPECTED = 0.4  # step time, ours over TRL's
BATCHING: dict[str, Any] = {"use_transformers_continuous_batching": True}
# What TRL may be fastest with. generate() decodes eagerly (its trainer disables compilation); continuous batching pages its cache.
TRL_VARIANTS: dict[str, dict[str, Any]] = {
    "generate": {},
    "batching": BATCHING | {"transformers_continuous_batching_config": {"use_cuda_graph": False, "max_memory_percent": 0.5}},
    "batching-graphs": BATCHING
    | {"transformers_continuous_batching_config": {"use_cuda_graph": True, "max_memory_percent": 0.5}},
}


def trl_settings(variant: str, cuda: bool) -> dict[str, Any]:
    """Fields of GRPOConfig for a GPU, over those that benchmark_systems fixes for both."""
    settings = {"bf16": True, "optim": "adamw_torch_fused", "generation_kwargs": None, **TRL_VARIANTS[variant]}
    return settings | ({"tf32": True, "use_cpu": False} if cuda else {})


def decode_floor(
    shape: ModelShape, weight_bytes: int, prompts: int, group_size: int, prompt_tokens: int, new_tokens: int, bytes_per_second: float
) -> float:  # fmt: skip
    """Seconds that new_tokens - 1 decoding steps read for, at least; the first token comes from reading the prompt.

    Step t = 1 ... new_tokens - 1 reads the layers and the LM head once, and keys and values of `prompts` prompts and of t tokens of each of
    prompts * group_size completions. An adapter's weights are not counted.
    """
    steps = new_tokens - 1
    weights = shape.layers * sum(i * o for i, o in shape.linears) + shape.vocab * shape.hidden
    per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim
    read = steps * (weights + per_token * prompts * prompt_tokens) + per_token * prompts * group_size * steps * (steps + 1) // 2
    return read * weight_bytes / bytes_per_second


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written per second by a copy of `size` bytes: the median of ten."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size / statistics.median(seconds[2:])


def random_qwen(folder: Path) -> str:
    """A Qwen2.5-0.5B of random weights with SmolLM2's tokenizer; ids that the tokenizer lacks decode to nothing, for both systems."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from grpo_safe import models

    tokenizer = models.load_tokenizer(models.resolve_start(SMOLLM2, None, False, "--models"))
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **QWEN_SHAPE, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def fastest(job: Job, variants: list[str], cuda: bool) -> tuple[str, dict[str, Any]]:
    """The TRL setting with the shortest step, each tried alone; what each took, or that it failed."""
    tried: dict[str, Any] = {}
    for variant in variants:
        worker = Worker(
            theirs,
            replace(job, folder=job.folder / f"screen-{variant}", steps=SCREEN_STEPS, trl=trl_settings(variant, cuda)),
            None,
        )
        try:
            tried[variant] = statistics.median([made(worker)["seconds"] for _ in range(SCREEN_STEPS)][1:])
            worker.close()
            print(f"  TRL, {variant}: {tried[variant]:.2f} s a step", flush=True)
        except SystemExit:  # its own error stands above; the others are still of use
            tried[variant] = None
            print(f"  TRL, {variant}: failed", flush=True)
    times = {name: seconds for name, seconds in tried.items() if seconds is not None}
    if not times:
        sys.exit("TRL ran in none of its settings; their errors stand above")
    return min(times, key=lambda name: times[name]), tried


def made(worker: Worker) -> dict[str, Any]:
    """A step of it; exits where the GPU's memory does not suffice."""
    step = worker.step()
    if step is None:
        sys.exit("out of memory; a smaller --prompts or --new-tokens needs less")
    return step


def measure(job: Job, warm_up: int) -> dict[str, Any]:
    """Alternating steps; medians over those after the warm-up, their spread, and the ratios ours / TRL's."""
    workers = {
        "ours": Worker(ours, replace(job, folder=job.folder / "ours"), None),
        "trl": Worker(theirs, replace(job, folder=job.folder / "trl"), None),
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(job.steps):
        for name, worker in workers.items():
            rows[name].append(made(worker))
    for worker in workers.values():
        worker.close()
    return {name: summary(job, steps, warm_up) for name, steps in rows.items()}


def summary(job: Job, steps: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """Figures of one system's steps."""
    seconds = [s["seconds"] for s in steps[warm_up:]]
    tokens = job.prompts * job.group_size * job.new_tokens
    parts = {k: statistics.median(s["parts"][k] for s in steps[warm_up:]) for k in steps[-1]["parts"]}
    return {
        "step_seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)], "seconds_in": parts,
        "tokens_per_second": tokens / statistics.median(seconds), "decoded_per_second": tokens / parts["sampling"],
        "gpu_allocated_gb": steps[-1].get("gpu_allocated_gb"), "gpu_reserved_gb": steps[-1].get("gpu_reserved_gb"),
    }  # fmt: skip


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Ours over TRL's, of every figure that both have."""
    names = ("step_seconds", "tokens_per_second", "decoded_per_second", "gpu_allocated_gb", "gpu_reserved_gb")
    return {name: found["ours"][name] / found["trl"][name] for name in names if found["ours"][name] and found["trl"][name]}


def show(found: dict[str, Any]) -> None:
    for name in ("ours", "trl"):
        f = found[name]
        low, high = f["spread"]
        memory = (
            f"{f['gpu_allocated_gb']:.2f} GB allocated, {f['gpu_reserved_gb']:.2f} reserved"
            if f["gpu_allocated_gb"]
            else "no GPU"
        )
        print(
            f"  {name:5} {f['step_seconds']:8.3f} s a step ({low:.3f} to {high:.3f})  {f['tokens_per_second']:8.1f} tokens/s  "
            f"decoding {f['decoded_per_second']:8.1f} tokens/s, {f['floor_share']:.1%} of the floor's  {memory}"
        )
    print("  ratio " + ", ".join(f"{k} {v:.3f}" for k, v in found["ratio"].items()))
    print("  ours, seconds in: " + ", ".join(f"{k} {v:.3f}" for k, v in found["ours"]["seconds_in"].items()))
    if "gpu_allocated_gb" not in found["ratio"]:
        return  # a trial without a GPU: its ratios say nothing of one
    step = found["ratio"]["step_seconds"]
    print(f"  step time {step:.3f} of TRL's; expected at most {EXPECTED}: {'met' if step <= EXPECTED else 'NOT met'}", flush=True)


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="smollm2, qwen2.5-0.5b, or a model as policy.start takes it"
    )
    parser.add_argument("--tuning", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument(
        "--trl", nargs="+", default=list(TRL_VARIANTS), choices=list(TRL_VARIANTS), help="the settings of TRL to try"
    )
    parser.add_argument("--backbone", default="embedded:all-MiniLM-L6-v2", help="of the reward model")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try the script itself at tiny sizes")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    args = parser.parse_args(words)
    if args.steps <= args.warm_up:
        parser.error("--steps must be more than --warm-up")
    if args.new_tokens < 2:
        parser.error("--new-tokens must be 2 or more: the first token is not decoded from the cache")
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("benchmark_gpu: no CUDA device is visible, and this command measures one; --device cpu only tries the script itself")
    if find_spec("trl") is None:
        stop("benchmark_gpu: TRL is not installed; run: pip install -e '.[test]'")
    return args


def stop(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(2)


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    cuda = args.device == "cuda"
    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device, 2**32 if cuda else 2**26)
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    print(f"{name}: {bandwidth / 1e9:.0f} GB/s (a copy, bytes read and written); torch {torch.__version__}", flush=True)
    torch.cuda.empty_cache()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        publish_reward_model(root / "store", args.backbone, HEADS)
        for model in args.models:
            start = {"smollm2": SMOLLM2}.get(model) or (random_qwen(root / "qwen") if model == QWEN else model)
            for tuning in args.tuning:
                results.append(cell(args, root / f"{len(results)}", root / "store", model, start, tuning, bandwidth))
                if args.out:
                    args.out.write_text(
                        json.dumps({"device": name, "bytes_per_second": bandwidth, "cells": results}, indent=1) + "\n"
                    )


def cell(
    args: argparse.Namespace, folder: Path, store: Path, model: str, start: str, tuning: str, bandwidth: float
) -> dict[str, Any]:
    """One model and way of training: the check, TRL's fastest setting, the measurement."""
    from grpo_safe import models

    rows = args.prompts * args.group_size
    whole = rows * (args.prompt_tokens + args.new_tokens)
    job = Job(
        folder, store, start, tuning, args.prompt_tokens, args.new_tokens, args.group_size, args.prompts, HEADS, args.steps, "callable",
        ours=(f"launch.device={args.device}", f"train.micro_batch_tokens={whole}", f"sampling.batch_size={rows}"),
    )  # fmt: skip
    print(
        f"{model}, {tuning}, {args.prompt_tokens}-token prompts, {args.new_tokens} new, {args.prompts} x G={args.group_size}",
        flush=True,
    )
    if not args.no_check:
        check(job, None)
    job = replace(job, dtype="bfloat16", no_end_token=True)
    variant, tried = fastest(job, args.trl, args.device == "cuda")
    found = measure(replace(job, trl=trl_settings(variant, args.device == "cuda")), args.warm_up)
    shape = shape_of(models.load_config(models.resolve_start(start, None, False, "--models")))
    floor = decode_floor(shape, 2, args.prompts, args.group_size, args.prompt_tokens, args.new_tokens, bandwidth)
    for system in ("ours", "trl"):
        found[system]["floor_share"] = floor / found[system]["seconds_in"]["sampling"]
    found |= {"ratio": ratios(found), "floor_seconds": floor, "trl_setting": variant, "trl_settings_tried": tried}
    show(found)
    sizes = ("prompt_tokens", "new_tokens", "group_size", "prompts", "steps")
    return {"model": model, "tuning": tuning, **{k: getattr(args, k) for k in sizes}, **found}


if __name__ == "__main__":
    main()
