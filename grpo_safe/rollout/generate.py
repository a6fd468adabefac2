"""The reference engine: transformers' generate(), told which token to take by a logits processor. Any causal LM works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList

from grpo_safe.algorithm.sampling import pick_tokens
from grpo_safe.config import SamplingConfig
from grpo_safe.rollout.engine import Decoded, left_padded, whole


def decode(
    model: Any,
    prompt_ids: list[list[int]],
    noise: np.ndarray,
    group_size: int,
    sampling: SamplingConfig,
    ends: set[int],
    pad: int,
) -> Decoded:
    """group_size completions of each prompt, every row a prompt of its own."""
    device = next(model.parameters()).device
    ids, mask = (t.to(device).repeat_interleave(group_size, 0) for t in left_padded(prompt_ids, pad))
    uniforms = torch.from_numpy(noise).to(device)
    prompt_width = ids.shape[1]
    logps = torch.zeros(ids.shape[0], sampling.max_new_tokens, device=device)

    def force_picked(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        t = input_ids.shape[1] - prompt_width
        chosen, logps[:, t] = pick_tokens(scores, uniforms[:, t], sampling.temperature, sampling.top_p)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)

    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    with _own_settings_only(model) as lm:
        output = lm.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([force_picked])
        )
    rows = output[:, prompt_width:].tolist()
    lengths = [next((t + 1 for t, token in enumerate(row) if token in ends), len(row)) for row in rows]
    ids_out = [row[:c] for row, c in zip(rows, lengths, strict=True)]
    return Decoded(
        ids_out,
        [row[:c] for row, c in zip(logps.tolist(), lengths, strict=True)],
        [bool(row) and row[-1] in ends for row in ids_out],
    )


@contextmanager
def _own_settings_only(model: Any) -> Iterator[Any]:
    """generate() fills what is left open from the model's own generation config (a repetition penalty, say), which is not the policy."""
    lm = whole(model)
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield lm
    finally:
        lm.generation_config = own
