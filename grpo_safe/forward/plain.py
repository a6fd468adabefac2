"""The plain path: a row per completion, its prompt in front. Any causal LM."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grpo_safe.records import Extras, TrainBatch

NOTHING = Extras()


class PlainForward(nn.Module):
    """A causal LM as a map from rows to log-probs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.value: nn.Linear | None = None

    def forward(
        self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, completion_ids: torch.Tensor, lengths: torch.Tensor,
        temperature: float = 1.0, entropy: str = "no", extras: Extras = NOTHING,
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        """prompt_ids, prompt_mask [n, P] left-padded; completion_ids [n, C] right-padded; lengths [n] -> the fields of PolicyOutputs, up to eos_logps.

        Only the completion positions reach the LM head. Padding is masked and positions count tokens. What the LM head reads is not handed out:
        between it and the log-probs an unknown architecture may do more.
        """
        width = completion_ids.shape[1]
        inside = torch.arange(width, device=lengths.device) < lengths[:, None]  # [n, C]
        mask = torch.cat([prompt_mask, inside.to(prompt_mask.dtype)], dim=1)
        output = self.model(
            input_ids=torch.cat([prompt_ids, completion_ids], dim=1), attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False, logits_to_keep=width + 1,
            output_hidden_states=self.value is not None,
        )  # fmt: skip
        wide = torch.promote_types(output.logits.dtype, torch.float32)
        logits = output.logits[:, :-1].to(wide) / temperature  # [n, C, V]: position t predicts token t
        log_z = logits.logsumexp(-1)
        logps = logits.gather(-1, completion_ids[..., None])[..., 0] - log_z
        return logps, _entropy(logits, log_z, entropy), self._values(output, width), _eos_logps(logits, temperature, extras)

    def _values(self, output: Any, width: int) -> torch.Tensor | None:
        if self.value is None:
            return None
        predicting = output.hidden_states[-1][:, -width - 1 : -1]
        return self.value(predicting.to(self.value.weight.dtype))[..., 0]

    @staticmethod
    def micro_batches(batch: TrainBatch, rows: Any, budget: int) -> list[torch.Tensor]:
        """Row indices of like length together, at most `budget` tokens each, the padding of prompts and completions counted."""
        prompts, completions = batch.prompt_mask.sum(1).tolist(), batch.lengths.tolist()

        def widths(rows: list[int]) -> tuple[int, int]:
            return max(prompts[i] for i in rows), max(completions[i] for i in rows)

        batches: list[list[int]] = []
        widest = (0, 0)
        for unit in sorted(units(batch, rows), key=lambda u: (sum(widths(u)), u)):
            own = widths(unit)
            both = (max(widest[0], own[0]), max(widest[1], own[1]))
            if batches and (len(batches[-1]) + len(unit)) * sum(both) <= budget:
                batches[-1] += unit
                widest = both
            else:
                batches.append(list(unit))
                widest = own
        return [torch.tensor(index, device=batch.lengths.device) for index in batches]


def units(batch: TrainBatch, rows: Any) -> list[list[int]]:
    """The rows in lists of neighbours that no micro-batch may part."""
    rows = list(rows)
    return [rows[i : i + batch.unit] for i in range(0, len(rows), batch.unit)]


def _eos_logps(logits: torch.Tensor, temperature: float, extras: Extras) -> torch.Tensor | None:
    if extras.eos is None:
        return None
    tempered = logits if extras.eos_temperature is None else logits * (temperature / extras.eos_temperature)
    return tempered[..., extras.eos] - tempered.logsumexp(-1)


def _entropy(logits: torch.Tensor, log_z: torch.Tensor, wanted: str) -> torch.Tensor | None:
    """H = log Z - E[logit], [n, C]."""
    if wanted == "no":
        return None
    with torch.set_grad_enabled(wanted == "kept"):
        probs = (logits - log_z[..., None]).exp()
        return log_z - (probs * logits).sum(-1)
