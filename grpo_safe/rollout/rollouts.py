"""Decoded rows -> a rollout; rollouts put together and picked apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from grpo_safe.records import Prompt, Rollout
from grpo_safe.rollout.engine import left_padded


def join(rollouts: list[Rollout], pad: int) -> Rollout:
    """Rollouts one below the other, prompts padded on the left and completions on the right."""
    if len(rollouts) == 1:
        return rollouts[0]

    def stacked(name: str, left: bool, fill: float) -> torch.Tensor:
        parts = [getattr(r, name) for r in rollouts]
        width = max(p.shape[1] for p in parts)
        return torch.cat([F.pad(p, (width - p.shape[1], 0) if left else (0, width - p.shape[1]), value=fill) for p in parts])

    return Rollout(
        [p for r in rollouts for p in r.prompts], stacked("prompt_ids", True, pad), stacked("prompt_mask", True, 0),
        stacked("completion_ids", False, pad), stacked("completion_mask", False, 0), stacked("sampler_logps", False, 0.0),
        torch.cat([r.truncated for r in rollouts]), [t for r in rollouts for t in r.texts],
    )  # fmt: skip


def select(rollout: Rollout, rows: list[int]) -> Rollout:
    """The rows `rows`."""
    return Rollout(
        [rollout.prompts[i] for i in rows], rollout.prompt_ids[rows], rollout.prompt_mask[rows], rollout.completion_ids[rows],
        rollout.completion_mask[rows], rollout.sampler_logps[rows], rollout.truncated[rows], [rollout.texts[i] for i in rows],
    )  # fmt: skip


def as_rollout(
    tokenizer: Any, prompts: list[Prompt], prompt_ids: list[list[int]], group_size: int, ids: list[list[int]],
    logps: list[list[float]], ended: list[bool], ends: set[int], pad: int,
) -> Rollout:  # fmt: skip
    """What was decoded, as padded tensors; the text of a completion leaves out its end token."""
    repeated = [i for i in range(len(prompts)) for _ in range(group_size)]
    p_ids, p_mask = left_padded(prompt_ids, pad)
    width = max(1, max(map(len, ids)))
    c_ids = torch.full((len(ids), width), pad)
    c_mask = torch.zeros_like(c_ids)
    c_logps = torch.zeros(len(ids), width)
    for i, (row, row_logps) in enumerate(zip(ids, logps, strict=True)):
        c_ids[i, : len(row)] = torch.tensor(row)
        c_mask[i, : len(row)] = 1  # by length, not by id: the end token may be the pad token
        c_logps[i, : len(row)] = torch.tensor(row_logps)
    texts = [
        tokenizer.decode(row[:-1] if done and row and row[-1] in ends else row, skip_special_tokens=True).strip()
        for row, done in zip(ids, ended, strict=True)
    ]
    return Rollout(
        [prompts[i] for i in repeated], p_ids[repeated], p_mask[repeated], c_ids, c_mask, c_logps, ~torch.tensor(ended), texts
    )
