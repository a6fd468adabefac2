"""What every engine gives back and takes: the records of decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grpo_safe.config import SamplingConfig
from grpo_safe.models import is_lora


@dataclass(frozen=True)
class Decoded:
    """What an engine gives back for n rows: tokens with the end token, and their log-probs."""

    ids: list[list[int]]  # n
    logps: list[list[float]]  # n
    ended: list[bool]  # n: an end token came before the length limit


# (model, prompt ids [b], noise [b * G, max_new_tokens], group_size, sampling, end tokens, pad token) -> Decoded of b * G rows
Decode = Callable[[Any, list[list[int]], np.ndarray, int, SamplingConfig, set[int], int], Decoded]


@dataclass(frozen=True)
class Engine:
    """How completions are decoded, and what the others have to know of it."""

    decode: Decode
    all_at_once: bool = (
        False  # takes all prompts in one call and schedules its rows itself; others get sampling.batch_size rows at a time
    )
    exact: bool = True  # it samples with the trainer's own modules, so its log-probs may stand for the trainer's


def whole(model: Any) -> Any:
    """The causal LM itself, its LoRA layers in place."""
    return model.get_base_model() if is_lora(model) else model


def left_padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [n, P], tokens at the right; at least one column."""
    width = max(1, max(map(len, rows)))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        if row:
            ids[i, -len(row) :] = torch.tensor(row)
            mask[i, -len(row) :] = 1
    return ids, mask
