"""Engines that sample completions, one a file. Each decodes by a function of the same arguments; `open_engine` chooses one by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from grpo_safe.algorithm.sampling import completion_noise
from grpo_safe.config import RolloutConfig, SamplingConfig
from grpo_safe.models import Start
from grpo_safe.records import Prompt, Rollout
from grpo_safe.rollout import generate, graphs, native, static, vllm
from grpo_safe.rollout.engine import Engine
from grpo_safe.rollout.rollouts import as_rollout


def engine(name: str, cuda_graphs: bool = False) -> Engine:
    """The engine of this name that samples with the trainer's own modules.

    cuda_graphs: on a GPU, native replays its steps; keep the engine, as it keeps what it has recorded.
    """
    if name in ("native", "dataset") and cuda_graphs:
        return Engine(partial(native.decode, static=static.StaticDecoder(graphs.Graphs(graphs.Cuda()))))
    sampled = {"native": native.decode, "generate": generate.decode, "dataset": native.decode}  # dataset: its validation samples
    return Engine(sampled[name])


def check_engine(rollout: RolloutConfig, config: Any, on_gpu: bool) -> None:
    """UserError where the engine cannot run here; no model is loaded. config: the policy's, of transformers."""
    if rollout.engine == "vllm":
        vllm.check(rollout, config, on_gpu)


def open_engine(
    rollout: RolloutConfig, start: Start, dtype: str, sampling: SamplingConfig, prompt_ids: list[list[int]], device: torch.device,
    say: Callable[[str], None],
) -> Engine:  # fmt: skip
    """The engine that the config names, ready for any of these prompts."""
    if rollout.engine != "vllm":
        return engine(rollout.engine, rollout.cuda_graphs)
    return vllm.open_engine(rollout, start, dtype, sampling, max(map(len, prompt_ids)), device, say)


def sample(
    engine: Engine, model: nn.Module, tokenizer: Any, prompts: list[Prompt], prompt_ids: list[list[int]], group_size: int,
    sampling: SamplingConfig, seed: int, step: int, repeats: list[int] | None = None,
) -> Rollout:  # fmt: skip
    """group_size completions of each prompt, rows of a group neighbours, in chunks of at most sampling.batch_size rows (see Engine).

    repeats: how often each prompt came before in this step, over all ranks; its completions are counted on from there, so their noise differs.
    """
    ends = end_tokens(model, tokenizer)
    pad = int(tokenizer.pad_token_id)
    per_chunk = len(prompts) if engine.all_at_once else max(1, sampling.batch_size // group_size)
    ids: list[list[int]] = []
    logps: list[list[float]] = []
    ended: list[bool] = []
    for first in range(0, len(prompts), per_chunk):
        chunk = prompts[first : first + per_chunk]
        earlier = repeats[first : first + per_chunk] if repeats else [0] * len(chunk)
        noise = np.stack([
            completion_noise(seed, step, prompt.id, before * group_size + g, sampling.max_new_tokens)
            for prompt, before in zip(chunk, earlier, strict=True) for g in range(group_size)
        ])  # fmt: skip
        with torch.no_grad():
            decoded = engine.decode(model, prompt_ids[first : first + per_chunk], noise, group_size, sampling, ends, pad)
        ids += decoded.ids
        logps += decoded.logps
        ended += decoded.ended
    return as_rollout(tokenizer, prompts, prompt_ids, group_size, ids, logps, ended, ends, pad)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end a completion: the model's generation config and the tokenizer's end token."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = {configured} if isinstance(configured, int) else set(configured or [])
    return ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def answer_end(model: Any, tokenizer: Any) -> int:
    """The token that a whole answer ends with when the policy samples it: the one of end_tokens that its chat template puts behind an answer.

    That need not be the tokenizer's end token (which it is where there is no such template): Llama 3 and Gemma end a turn with another.
    """
    answer = "Good morning."
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    if tokenizer.chat_template:
        behind = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)[2]
        ends = end_tokens(model, tokenizer)
        for token in tokenizer(behind, add_special_tokens=False)["input_ids"]:
            if token in ends:
                return int(token)
    return int(tokenizer.eos_token_id)
