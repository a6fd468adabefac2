"""Forward and backward of the policy, plain against packed, in turn in one process: medians, their ratio, peak memory.

    OMP_NUM_THREADS=1 taskset -c 0 python scripts/measure_packing.py --prompt 40 256 --train lora full

G completions of each prompt, all of one length, random tokens, the embedded SmolLM2-135M in float32; a loss whose gradient
reaches every log-prob. Seconds are of the processor, so a busy neighbour does not count. Memory is the resident peak of a
pass above what lay there before (Linux, glibc).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from pathlib import Path

import torch

from grpo_safe import models
from grpo_safe.config import LoraConfig
from grpo_safe.forward import PackedForward, PlainForward, policy_outputs
from grpo_safe.records import TrainBatch


def batch_of(vocab: int, prompts: int, group_size: int, prompt_tokens: int, new_tokens: int) -> TrainBatch:
    """Rows of a group are neighbours."""
    generator = torch.Generator().manual_seed(0)
    n = prompts * group_size
    prompt_ids = torch.randint(vocab, (prompts, prompt_tokens), generator=generator).repeat_interleave(group_size, 0)
    ids = torch.randint(vocab, (n, new_tokens), generator=generator)
    ones, zeros = torch.ones_like(ids), torch.zeros(n, new_tokens)
    return TrainBatch(prompt_ids, torch.ones_like(prompt_ids), ids, ones, ones.sum(1), zeros, torch.randn(n, generator=generator))


def once(path: PlainForward | PackedForward, batch: TrainBatch, budget: int, backward: bool) -> tuple[float, float]:
    """Processor seconds of one pass over the batch in micro-batches, and the peak of resident memory above its start in GB."""
    before = _reset_peak()
    began = time.process_time()
    with torch.set_grad_enabled(backward):
        for index in path.micro_batches(batch, range(len(batch)), budget):
            rows = batch.rows(index)
            outputs = policy_outputs(path, rows, 1.0, "detached" if backward else "no")
            if backward:
                (outputs.logps * rows.advantages[:, None]).sum().backward()
    seconds = time.process_time() - began
    for parameter in path.parameters():
        parameter.grad = None
    return seconds, _status("VmHWM") - before


def _reset_peak() -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> float:
    """GB of a line in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default="embedded:SmolLM2-135M-Instruct")
    parser.add_argument(
        "--train", nargs="+", default=["lora"], choices=["lora", "full", "none"], help="none: the reference's forward"
    )
    parser.add_argument("--prompt", nargs="+", type=int, default=[40, 256], help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="completion tokens")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--budget", type=int, default=4096, help="train.micro_batch_tokens")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    start = models.resolve_start(args.start, None, False, "--start")
    print("train  prompt  plain s  packed s  ratio (spread)       plain GB  packed GB  ratio")
    for train in args.train:
        model = models.load_causal_lm(start, "float32")
        if train == "lora":
            model = models.add_lora(model, LoraConfig(), "CAUSAL_LM")
        model.train()
        plain, packed = PlainForward(model), PackedForward(model)
        for tokens in args.prompt:
            vocab = model.config.vocab_size
            batch = batch_of(vocab, args.prompts, args.group_size, tokens, args.new)
            runs = [
                [once(path, batch, args.budget, train != "none") for path in (plain, packed)] for _ in range(args.rounds + 1)
            ][1:]
            seconds, peaks = ([[run[path][figure] for run in runs] for path in (0, 1)] for figure in (0, 1))
            ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
            (a, b), (c, d) = (map(statistics.median, figure) for figure in (seconds, peaks))
            print(
                f"{train:5}  {tokens:6}  {a:7.2f}  {b:8.2f}  {b / a:5.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})  {c:8.2f}  {d:9.2f}  {d / c:5.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
