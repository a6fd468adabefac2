"""Our own decoding loop: prompts without padding, their keys and values once per group, packed weights, and finished rows leave the batch."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import numpy as np
import torch

from grpo_safe.algorithm.sampling import pick_tokens
from grpo_safe.config import SamplingConfig
from grpo_safe.rollout import generate
from grpo_safe.rollout.attention import GroupCache, group_attention, prefill
from grpo_safe.rollout.engine import Decoded, whole
from grpo_safe.rollout.static import StaticDecoder, obstacle
from grpo_safe.rollout.weights import packed_linears

# model types whose attention takes nothing but a scale and a window; the tests decode one of each. Not gemma2: transformers' own sdpa drops its
# soft cap, which the trainer's forward then has not either
KNOWN = frozenset(
    [
        "cohere", "gemma", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3",
        "starcoder2",
    ]
)  # fmt: skip
log = logging.getLogger(__name__)


def decode(
    model: Any,
    prompt_ids: list[list[int]],
    noise: np.ndarray,
    group_size: int,
    sampling: SamplingConfig,
    ends: set[int],
    pad: int,
    static: StaticDecoder | None = None,
    static_on: str = "cuda",
) -> Decoded:
    """group_size completions of each prompt. A model type that is not in KNOWN goes to the `generate` engine.

    static: what decodes by steps of fixed shape, where the model stands on a `static_on` device and allows it.
    """
    lm = whole(model)
    if lm.config.model_type not in KNOWN:
        _say_fallback(lm.config.model_type)
        return generate.decode(model, prompt_ids, noise, group_size, sampling, ends, pad)
    if static is not None and lm.device.type == static_on:
        if reason := obstacle(lm):
            _say_no_graphs(reason)
        elif static.run.failure is None:  # else it has said so itself
            with group_attention(lm):
                return static.decode(lm, prompt_ids, noise, group_size, sampling, ends, pad)
    with group_attention(lm), packed_linears(lm):
        return _decode(lm, prompt_ids, noise, group_size, sampling, ends, pad)


@cache
def _say_fallback(model_type: str) -> None:
    log.warning(
        "rollout=native does not know %s models: sampling goes through generate() (known: %s)",
        model_type,
        ", ".join(sorted(KNOWN)),
    )


@cache
def _say_no_graphs(reason: str) -> None:
    log.warning("rollout.cuda_graphs: decoding without CUDA graphs, as %s", reason)


def _decode(
    lm: Any, prompt_ids: list[list[int]], noise: np.ndarray, group_size: int, sampling: SamplingConfig, ends: set[int], pad: int
) -> Decoded:
    device = lm.device
    uniforms = torch.from_numpy(noise).to(device)  # [n, max_new_tokens]
    end_ids = torch.tensor(sorted(ends), device=device)
    prompt_lengths = [len(row) for row in prompt_ids]
    group_cache = GroupCache(prompt_lengths, group_size, sampling.max_new_tokens, device)
    logits = prefill(lm, prompt_ids, group_cache).repeat_interleave(group_size, 0)  # [n, V]

    n = len(prompt_ids) * group_size
    tokens = torch.full((n, sampling.max_new_tokens), pad, device=device)
    logps = torch.zeros(n, sampling.max_new_tokens, device=device)
    lengths = torch.zeros(n, dtype=torch.long, device=device)
    rows = torch.arange(n, device=device)  # which completion each row of the batch is
    positions = torch.tensor(prompt_lengths, device=device).repeat_interleave(group_size)[
        :, None
    ]  # [rows, 1], of the first new token
    for t in range(sampling.max_new_tokens):
        chosen, chosen_logps = pick_tokens(logits, uniforms[rows, t], sampling.temperature, sampling.top_p)
        tokens[rows, t], logps[rows, t], lengths[rows] = chosen, chosen_logps, t + 1
        stay = torch.isin(chosen, end_ids, invert=True).nonzero()[:, 0]
        if t + 1 == sampling.max_new_tokens or len(stay) == 0:
            break
        if len(stay) < len(rows):
            group_cache.keep(stay)
            rows, chosen, positions = rows[stay], chosen[stay], positions[stay]
        group_cache.advance()
        step = lm(input_ids=chosen[:, None], position_ids=positions + t, use_cache=False, group_cache=group_cache)
        logits = step.logits[:, 0]
    cut = list(zip(tokens.tolist(), logps.tolist(), lengths.tolist(), strict=True))
    ids = [row[:length] for row, _, length in cut]
    return Decoded(ids, [row[:length] for _, row, length in cut], [row[-1] in ends for row in ids])
