"""Objectives -> scores [N, K]: the heads of one reward model, in one forward, and plain functions beside them."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from grpo_safe.config import LimitConfig, ObjectiveConfig
from grpo_safe.data.rows import import_function
from grpo_safe.errors import UserError
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


def choose_objectives(
    configured: dict[str, ObjectiveConfig], heads: list[str], head_weights: dict[str, float] | None = None
) -> Objectives:
    """Every head by its own weight (head_weights; 1 where none is said), changed and extended by what the config names.

    Raises UserError for a head that the reward model lacks, and where no weight is left.
    """
    functions = {name: o for name, o in configured.items() if o.function is not None}
    for name in configured:
        if name not in functions and name not in heads:
            raise UserError(f"objectives.{name}: the reward model has no such head; it has {', '.join(heads)}")
        if name in functions and name in heads:
            raise UserError(f"objectives.{name}.function: the reward model has a head of that name; choose another name")
    names = [*heads, *functions]
    told = {n: o.weight for n, o in configured.items() if o.weight is not None}
    weights = [told.get(n, (head_weights or {}).get(n, 1.0)) for n in names]
    if not any(weights):
        raise UserError("objectives: every weight is 0; give at least one objective a weight")
    ends = {n: o.weight_end for n, o in configured.items() if o.weight_end is not None}
    if not any(ends.get(n, w) for n, w in zip(names, weights, strict=True)):
        raise UserError("objectives: every weight ends at 0 (weight_end); leave at least one objective a weight at the last step")
    meeting = _all_zero_at(weights, [ends.get(n, w) for n, w in zip(names, weights, strict=True)])
    if meeting is not None:
        raise UserError(
            f"objectives: every weight is 0 at {meeting:.0%} of the run, where those that move (weight_end: {', '.join(sorted(ends))}) cross 0 together; "
            "give one of them another weight_end, or another objective a weight"
        )
    return Objectives(
        names,
        weights,
        [heads.index(n) if n in heads else None for n in names],
        [import_function(str(functions[n].function), f"objectives.{n}.function") if n in functions else None for n in names],
        {name: o.weight_end for name, o in configured.items() if o.weight_end is not None},
        {name: o.limit for name, o in configured.items() if o.limit is not None},
    )


def _all_zero_at(first: list[float], last: list[float]) -> float | None:
    """The share of the run at which weights that move in a line from `first` to `last` are all 0; None where there is no such point."""
    moved = [(a, b) for a, b in zip(first, last, strict=True) if a or b]
    if any(a * b >= 0 for a, b in moved):
        return None
    crossings = [a / (a - b) for a, b in moved]
    return crossings[0] if max(crossings) - min(crossings) < 1e-6 else None


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
    """A number per completion, NaN where the function gave None. Raises UserError naming the objective for whatever else it does.

    It gets copies: what it changes is not seen by the next objective, the log or the loss.
    """
    where = f"objectives.{name}.function"
    try:
        answers = function(deepcopy(prompts), list(texts))
        if inspect.isawaitable(answers):
            raise UserError(f"{where} is async; expected a plain function (prompts, completions) -> list of numbers")
        if (
            isinstance(answers, (str, bytes, dict))
            or not hasattr(answers, "__iter__")
            or len(getattr(answers, "shape", "1")) != 1
        ):
            shape = f" of shape {tuple(answers.shape)}" if hasattr(answers, "shape") else ""
            raise UserError(
                f"{where} gave {_short(answers)} ({type(answers).__name__}{shape}); expected a list of {len(texts)} numbers, one a completion"
            )
        listed = list(answers)
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{where} failed on {len(texts)} completions, the first of prompt {prompts[0].id}: {type(error).__name__}: {error} "
            f"({place.filename}:{place.lineno}); expected (prompts, completions) -> list of numbers"
        ) from error
    if len(listed) != len(texts):
        raise UserError(f"{where} gave {len(listed)} numbers for {len(texts)} completions")
    return [_number(answer, where, prompt) for answer, prompt in zip(listed, prompts, strict=True)]


def _short(value: Any) -> str:
    return " ".join(repr(value).split())[:60]


def _number(answer: Any, where: str, prompt: Prompt) -> float:
    if answer is None:
        return math.nan
    if isinstance(answer, (str, bytes)) or len(getattr(answer, "shape", "")):
        raise UserError(f"{where} gave {_short(answer)} for a completion of prompt {prompt.id}; expected a number or None")
    try:
        return float(answer)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where} gave {_short(answer)} for a completion of prompt {prompt.id}; expected a number or None"
        ) from error
