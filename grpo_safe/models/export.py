"""Is what was written the policy that was trained? Log-probs of both on a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grpo_safe.errors import UserError

EXPORT_GAP_SHARE = 0.02  # of what training changed: the most by which an export may differ from what was trained
EXPORT_GAP_FLOOR = 1e-4  # nats a token that float32 rounding explains, where training changed next to nothing


def log_probs(model: Any, rows: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """Log-probs [T] of all tokens that follow the first `known` of each row (token ids, known), in float32, rows one below the other."""
    found = []
    device = next(model.parameters()).device
    with torch.no_grad():
        for ids, known in rows:
            tokens = torch.tensor(ids, device=device)
            logits = model(input_ids=tokens[None]).logits[0, known - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(-1, tokens[known:, None])[:, 0].cpu())
    return torch.cat(found)


def checked_export(reread: torch.Tensor, trained: torch.Tensor, before: torch.Tensor, dtype: str) -> dict[str, float]:
    """The export's mean |log-prob - trained| against training's own |trained - start|, all [T]; UserError where the export lost too much."""
    gap, change = float((reread - trained).abs().mean()), float((trained - before).abs().mean())
    bound = max(EXPORT_GAP_FLOOR, EXPORT_GAP_SHARE * change)
    if not gap <= bound:  # nan too
        raise UserError(
            f"export.dtype={dtype}: what would be published differs from what was trained by {gap:.2e} nats a token, where training changed "
            f"{change:.2e}; at most {bound:.2e} is accepted. Nothing was published: set export.dtype=float32 and type resume=RUN_DIR"
        )
    return {"log_prob_gap": gap, "log_prob_change": change, "tokens": float(len(trained))}
