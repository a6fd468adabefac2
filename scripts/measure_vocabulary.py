"""Peak memory of log-probs and their gradient, over vocabulary and completion length: the chunked path beside one that holds all logits.

    OMP_NUM_THREADS=1 python scripts/measure_vocabulary.py

Each figure is of a process of its own: a random two-layer Llama of this vocabulary in float32, its weights loaded, then a forward and a
backward of all log-probs of --group-size completions of one prompt. GB = 1e9 bytes of resident memory at the peak, above what lay there before
(Linux, glibc), so the weights themselves are not in it. "frozen head" trains LoRA, "trained head" all weights, the tied embedding among
them: its gradients [V, h] are what then grows with V.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from measure_packing import batch_of, once

from grpo_safe.forward.head import CHUNK_ELEMENTS

PATHS = {"chunked": "all logits never at once", "plain": "logits of all positions"}
TRAINED = {"lora": "frozen head", "full": "trained head"}


def peak_gb(vocab: int, new_tokens: int, path: str, train: str, group_size: int, prompt_tokens: int, hidden: int) -> float:
    """GB of one forward and backward above the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from grpo_safe import models
    from grpo_safe.config import LoraConfig
    from grpo_safe.forward import PackedForward, PlainForward

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if train == "lora":
        model = models.add_lora(model, LoraConfig(), "CAUSAL_LM")
    forward = {"chunked": PackedForward, "plain": PlainForward}[path](model.train())
    once(forward, batch_of(vocab, 1, 2, 4, 2), 10**9, backward=True)  # what a first call leaves in memory
    return once(forward, batch_of(vocab, 1, group_size, prompt_tokens, new_tokens), 10**9, backward=True)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", nargs="+", type=int, default=[49_152, 196_608])
    parser.add_argument("--new", nargs="+", type=int, default=[128, 256, 512], help="completion tokens")
    parser.add_argument("--train", nargs="+", default=list(TRAINED), choices=TRAINED)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()

    columns = [(path, train) for train in args.train for path in PATHS]
    lines = [
        "| V | C | G C V, one copy | " + " | ".join(f"{path}, {TRAINED[train]}" for path, train in columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    print("\n".join(lines), flush=True)
    for vocab in args.vocab:
        for new in args.new:
            logits = args.group_size * new * vocab * 4 / 1e9
            found = [_fresh(vocab, new, *column, args.group_size, args.prompt, args.hidden) for column in columns]
            lines.append(f"| {vocab} | {new} | {logits:.3f} | " + " | ".join(f"{gb:.3f}" for gb in found) + " |")
            print(lines[-1], flush=True)
    head = ", ".join(f"{v * args.hidden * 4 / 1e9:.3f} at V = {v}" for v in args.vocab)
    lines.append(
        f"\nGB. G = {args.group_size} completions of C tokens, hidden size h = {args.hidden}. A chunk of logits: {CHUNK_ELEMENTS * 4 / 1e9:.3f} GB. "
        f"One tensor [V, h]: {head}."
    )
    print(lines[-1])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


def _fresh(*work: object) -> float:
    """peak_gb in a process that does nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_gb, *work).result()  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
