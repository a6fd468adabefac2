"""Answers that a data set holds, in place of sampled ones: groups of them, and their labels as scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grpo_safe.algorithm.sampling import completion_noise
from grpo_safe.errors import UserError
from grpo_safe.records import LabelledRow, Prompt, Rollout
from grpo_safe.rollout.rollouts import as_rollout


@dataclass(frozen=True)
class Given:
    """Prompts with at least group_size different answers each."""

    prompts: list[Prompt]  # B
    answers: list[list[LabelledRow]]  # B lists; labels are empty where nobody gave any
    left_out: int  # prompts with fewer


def form_groups(rows: list[LabelledRow], group_size: int) -> Given:
    """The rows by prompt, in file order; the labels of equal answers are put together, the later one counts.

    Raises UserError where no prompt has enough answers.
    """
    by_prompt: dict[str, dict[str, LabelledRow]] = {}
    for row in rows:
        answers = by_prompt.setdefault(row.prompt.id, {})
        earlier = answers[row.response].labels if row.response in answers else {}
        answers[row.response] = LabelledRow(row.prompt, row.response, earlier | row.labels, row.source)
    kept = [list(answers.values()) for answers in by_prompt.values() if len(answers) >= group_size]
    if not kept:
        most = max(map(len, by_prompt.values()))
        raise UserError(
            f"rollout=dataset: no prompt of data.train has algo.group_size={group_size} different answers, the most is {most}; "
            + (f"set algo.group_size={most}" if most > 1 else "a comparison needs two or more answers to a prompt")
        )
    return Given([answers[0].prompt for answers in kept], kept, len(by_prompt) - len(kept))


def given(
    tokenizer: Any, answers: list[list[LabelledRow]], prompt_ids: list[list[int]], group_size: int, max_tokens: int, seed: int,
    step: int, end: int | None = None, repeats: list[int] | None = None,
) -> tuple[Rollout, list[LabelledRow]]:  # fmt: skip
    """group_size answers of each prompt as a rollout, and their rows; of more, a draw that follows from (seed, step, prompt, repeat).

    An answer ends with `end` (see rollout.answer_end; None: the tokenizer's end token); one that has no room for it within max_tokens is cut, and truncated.
    """
    end, pad = int(tokenizer.eos_token_id if end is None else end), int(tokenizer.pad_token_id)
    drawn: list[LabelledRow] = []
    for group, before in zip(answers, repeats or [0] * len(answers), strict=True):
        noise = completion_noise(seed, step, group[0].prompt.id, before, len(group))
        drawn += [group[i] for i in sorted(noise.argsort(kind="stable")[:group_size].tolist())]
    whole = [[*tokenizer(row.response, add_special_tokens=False)["input_ids"], end] for row in drawn]
    ids = [row[:max_tokens] for row in whole]
    ended = [len(row) <= max_tokens for row in whole]
    unknown = [[0.0] * len(row) for row in ids]  # nobody knows how likely their author was to write them
    prompts = [group[0].prompt for group in answers]
    rollout = as_rollout(tokenizer, prompts, prompt_ids, group_size, ids, unknown, ended, {end}, pad)
    rollout.sampled = False
    return rollout, drawn


def label_scores(names: list[str], rows: list[LabelledRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of rows -> values [N, K], mask [N, K]; a label that is missing is masked."""
    mask = torch.tensor([[name in row.labels for name in names] for row in rows])
    return torch.tensor([[row.labels.get(name, 0.0) for name in names] for row in rows]), mask
