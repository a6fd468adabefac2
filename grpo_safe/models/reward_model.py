"""A published reward model: opened, and asked for the scores [N, K] of its heads in one forward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo_safe.data.text import ScoringInput, encode_for_scoring
from grpo_safe.models import DTYPES, Start, load_tokenizer
from grpo_safe.records import Prompt
from grpo_safe.versions.checkpoint import Version


@dataclass(frozen=True)
class RewardModel:
    """A frozen multi-label scorer with the words to feed it."""

    model: nn.Module
    tokenizer: Any
    objectives: list[str]  # K names, in head order
    offsets: torch.Tensor  # [K] what calibration could not fold into the weights
    max_length: int


def open_classifier(folder: Path, dtype: str) -> Any:
    """The weights of a published reward model alone."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=DTYPES[dtype]).eval()


def open_reward_model(found: Version, device: torch.device, dtype: str = "float32") -> RewardModel:
    """A published reward model, through plain AutoModelForSequenceClassification."""
    scoring = found.manifest["scoring"]
    model = open_classifier(found.path, dtype)
    tokenizer = load_tokenizer(Start(str(found.path), str(found.path), {}))
    names = [o["name"] for o in found.manifest["objectives"]]
    offsets = torch.tensor([o["offset"] for o in found.manifest["objectives"]])
    return RewardModel(model.to(device).requires_grad_(False), tokenizer, names, offsets, scoring["max_length"])


def score_texts(
    reward_model: RewardModel, prompts: list[Prompt], texts: list[str], batch_tokens: int
) -> tuple[torch.Tensor, int]:
    """Head scores [N, K] on CPU, and how many inputs lost some of their prompt. One forward for all heads."""
    tokenizer = reward_model.tokenizer
    inputs = [encode_for_scoring(tokenizer, p, t, reward_model.max_length) for p, t in zip(prompts, texts, strict=True)]
    scores = torch.empty(len(inputs), len(reward_model.objectives))
    device = next(reward_model.model.parameters()).device
    with torch.inference_mode():
        for index in token_batches([len(i.ids) for i in inputs], batch_tokens):
            batch = collate([inputs[i] for i in index], tokenizer.pad_token_id, device)
            scores[index] = reward_model.model(**batch).logits.float().cpu()
    return scores + reward_model.offsets, sum(i.cut > 0 for i in inputs)


def tokens_to_score(reward_model: RewardModel, prompts: list[Prompt], texts: list[str]) -> int:
    """Tokens that the reward model reads for these completions, padding not counted."""
    return sum(
        len(encode_for_scoring(reward_model.tokenizer, p, t, reward_model.max_length).ids)
        for p, t in zip(prompts, texts, strict=True)
    )


def collate(inputs: list[ScoringInput], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Right-padded model inputs."""
    width = max(len(i.ids) for i in inputs)
    ids = torch.full((len(inputs), width), pad_token_id)
    mask = torch.zeros_like(ids)
    types = torch.zeros_like(ids)
    for row, item in enumerate(inputs):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        mask[row, : len(item.ids)] = 1
        if item.type_ids is not None:
            types[row, : len(item.ids)] = torch.tensor(item.type_ids)
    batch = {"input_ids": ids, "attention_mask": mask}
    if inputs[0].type_ids is not None:
        batch["token_type_ids"] = types
    return {name: tensor.to(device) for name, tensor in batch.items()}


def token_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices in batches of like length, each at most `budget` tokens with its padding (one over-long row stands alone).

    Example: token_batches([5, 1, 2], 6) -> [[1, 2], [0]]
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= budget:  # ascending: the new row is the widest
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
