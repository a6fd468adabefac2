"""Objectives -> scores [N, K]: the heads of one reward model, in one forward, and plain functions beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grpo_safe.config import LimitConfig, ObjectiveConfig
from grpo_safe.data.rows import import_function
from grpo_safe.errors import UserError
from grpo_safe.models import DTYPES
from grpo_safe.models.reward_model import RewardModel, score_texts
from grpo_safe.records import LabelledRow, Prompt, Scores
from grpo_safe.rollout.dataset import label_scores

Judge = Callable[[list[Prompt], list[str]], list[float | None]]


@dataclass(frozen=True)
class Objectives:
    """What a run scores: names, weights, and who says each."""

    names: list[str]  # K
    weights: list[float]  # K
    heads: list[int | None]  # K index of the reward model's head, None for a function
    functions: list[Judge | None]  # K
    moving: dict[str, float] = field(default_factory=dict)  # name -> weight at the last step, where it moves over the run
    limits: dict[str, LimitConfig] = field(default_factory=dict)  # name -> limit, where there is one

    def weights_at(self, step: int, steps: int) -> torch.Tensor:
        """Weights [K] of a 1-based step."""
        share = (step - 1) / max(1, steps - 1)
        ends = [self.moving.get(name, weight) for name, weight in zip(self.names, self.weights, strict=True)]
        return torch.tensor([a + share * (b - a) for a, b in zip(self.weights, ends, strict=True)])


def open_classifier(folder: Path, dtype: str) -> Any:
    """The weights of a published reward model alone."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=DTYPES[dtype]).eval()


def choose_objectives(configured: dict[str, ObjectiveConfig], heads: list[str]) -> Objectives:
    """Every head with weight 1, changed and extended by what the config names.

    Raises UserError for a head that the reward model lacks, and where no weight is left.
    """
    functions = {name: o for name, o in configured.items() if o.function is not None}
    for name in configured:
        if name not in functions and name not in heads:
            raise UserError(f"objectives.{name}: the reward model has no such head; it has {', '.join(heads)}")
        if name in functions and name in heads:
            raise UserError(f"objectives.{name}.function: the reward model has a head of that name; choose another name")
    names = [*heads, *functions]
    weights = [configured[n].weight if n in configured else 1.0 for n in names]
    if not any(weights):
        raise UserError("objectives: every weight is 0; give at least one objective a weight")
    ends = {n: o.weight_end for n, o in configured.items() if o.weight_end is not None}
    if not any(ends.get(n, w) for n, w in zip(names, weights, strict=True)):
        raise UserError("objectives: every weight ends at 0 (weight_end); leave at least one objective a weight at the last step")
    return Objectives(
        names,
        weights,
        [heads.index(n) if n in heads else None for n in names],
        [import_function(str(functions[n].function), f"objectives.{n}.function") if n in functions else None for n in names],
        {name: o.weight_end for name, o in configured.items() if o.weight_end is not None},
        {name: o.limit for name, o in configured.items() if o.limit is not None},
    )


def score(
    objectives: Objectives, reward_model: RewardModel, prompts: list[Prompt], texts: list[str], batch_tokens: int
) -> Scores:
    """Scores [N, K] of N completions; a function that answers None or NaN masks that score."""
    head_scores, _ = score_texts(reward_model, prompts, texts, batch_tokens)
    values = torch.zeros(len(texts), len(objectives.names))
    mask = torch.ones_like(values, dtype=torch.bool)
    for k, (head, function) in enumerate(zip(objectives.heads, objectives.functions, strict=True)):
        if head is not None:
            values[:, k] = head_scores[:, head]
        elif function is not None:
            answers = _asked(function, objectives.names[k], prompts, texts)
            values[:, k] = torch.tensor([0.0 if math.isnan(a) else a for a in answers])
            mask[:, k] = torch.tensor([not math.isnan(a) for a in answers])
    return Scores(objectives.names, values, mask)


def score_labels(objectives: Objectives, rows: list[LabelledRow]) -> Scores:
    """Scores [N, K] of given answers: their labels in place of the heads, functions as they are."""
    values, mask = label_scores(objectives.names, rows)
    prompts, texts = [row.prompt for row in rows], [row.response for row in rows]
    for k, function in enumerate(objectives.functions):
        if function is not None:
            answers = torch.tensor(_asked(function, objectives.names[k], prompts, texts))
            values[:, k], mask[:, k] = answers.nan_to_num(), ~answers.isnan()
    return Scores(objectives.names, values, mask)


def _asked(function: Judge, name: str, prompts: list[Prompt], texts: list[str]) -> list[float]:
    answers = list(function(prompts, texts))
    if len(answers) != len(texts):
        raise UserError(f"objectives.{name}.function gave {len(answers)} numbers for {len(texts)} completions")
    return [math.nan if a is None else float(a) for a in answers]
