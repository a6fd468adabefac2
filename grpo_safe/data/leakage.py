"""Prompts that were trained on are no judges: what validation and held-out data share with training data is left out, and said."""

from __future__ import annotations

import unicodedata

from grpo_safe.data.rows import Split
from grpo_safe.errors import UserError
from grpo_safe.records import LabelledRow, Prompt, Row


def normalized(text: str) -> str:
    """The text without case, white space and punctuation; a mark between two digits stays, as 5-3 is not 5/3.

    Example: "Boil an egg?" and "boil  an egg" both give "boilanegg".
    """
    folded = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    kept = [
        c
        for i, c in enumerate(folded)
        if unicodedata.category(c)[0] not in "PZC" or (folded[i - 1 : i].isdigit() and folded[i + 1 : i + 2].isdigit())
    ]
    return "".join(kept) or folded  # nothing but marks: as they are


def unseen_rows(train: Split, validation: Split) -> tuple[Split, str | None]:
    """The validation rows whose prompts (without a prompt: whose answers) are not in training, and a sentence where some are.

    Raises UserError where none is left, or none for an objective: the gate must not pass on what was learned by heart.
    """
    seen = {_key(row) for row in train.rows}
    kept = [row for row in validation.rows if _key(row) not in seen]
    found = len(validation.rows) - len(kept)
    if not found:
        return validation, None
    what = f"data.validation: {found} of {len(validation.rows)} rows have prompts that data.train has too (case, spaces, punctuation aside)"
    lost = sorted(_objectives(validation.rows) - _objectives(kept))
    if lost:
        left = f"no row is left for objective {', '.join(lost)}" if kept else "no row is left to judge by"
        raise UserError(f"{what}; {left}: give other prompts, or none (data.validation=null holds a share of data.train back)")
    return Split(kept, validation.fingerprints), f"{what}; they are left out"


def unseen_prompts(train: list[Prompt], judging: list[Prompt], key: str) -> tuple[list[Prompt], str | None]:
    """The prompts of `judging` that are not in training, and a sentence where some are; an empty prompt says nothing and stays.

    Raises UserError naming the config key where none is left.
    """
    seen = {normalized(prompt.text) for prompt in train} - {""}
    kept = [prompt for prompt in judging if normalized(prompt.text) not in seen]
    if len(kept) == len(judging):
        return judging, None
    what = (
        f"{key}: {len(judging) - len(kept)} of {len(judging)} prompts are among the policy's training prompts "
        "(case, spaces, punctuation aside)"
    )
    if not kept:
        raise UserError(f"{what}; none is left to judge by: give other prompts")
    return kept, f"{what}; they are left out"


def _key(row: Row) -> str:
    answer = row.response if isinstance(row, LabelledRow) else row.chosen
    return normalized(row.prompt.text) or "\n" + normalized(answer)


def _objectives(rows: list[Row]) -> set[str]:
    return {name for row in rows for name in (row.labels if isinstance(row, LabelledRow) else (row.objective,))}
