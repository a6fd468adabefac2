"""The packed path: neighbouring rows with one prompt share its tokens, and nothing is computed on padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grpo_safe.forward import attention
from grpo_safe.forward.head import HeadLogps
from grpo_safe.forward.layout import flat_row, right_padded, starts_group
from grpo_safe.forward.plain import NOTHING, units
from grpo_safe.models import is_lora
from grpo_safe.records import Extras, TrainBatch

# Their attention goes through transformers' AttentionInterface, positions are explicit, the logits are the LM head's output as it is.
# Each is held to the plain path by tests/forward/test_packed_forward.py.
PROVEN = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3", "olmo", "olmo2", "smollm3", "starcoder2", "glm", "glm4", "gpt2", "gpt_neox",
)  # fmt: skip


def why_not_packed(model: Any) -> str | None:
    """What keeps a causal LM (or LoRA around one) from the packed path; None: nothing."""
    whole = _causal_lm(model)
    config = whole.config
    if config.model_type not in PROVEN:
        return f"{config.model_type} is not among the architectures that it is proven for ({', '.join(PROVEN)})"
    if config._attn_implementation not in ("sdpa", attention.NAME):
        return f"attn_implementation is {config._attn_implementation}, and it works with sdpa"
    if getattr(config, "sliding_window", None) is not None:
        return f"attention slides over {config.sliding_window} tokens"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
        return "its rotary embedding depends on the longest row of a batch"
    if type(whole.get_output_embeddings()) is not nn.Linear:
        return "its LM head is adapted"
    return None


class PackedForward(nn.Module):
    """A causal LM as a map from rows to log-probs: decoder on a flat row of tokens, LM head on the positions that predict one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        whole = _causal_lm(model)
        whole.set_attn_implementation(attention.NAME)  # plain sdpa for every call that brings no layout, as in sampling
        self.head = HeadLogps(whole.get_output_embeddings())
        self.value: nn.Linear | None = None

    def forward(
        self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, completion_ids: torch.Tensor, lengths: torch.Tensor,
        temperature: float = 1.0, entropy: str = "no", extras: Extras = NOTHING, ref_hidden: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        """prompt_ids, prompt_mask [n, P] left-padded; completion_ids [n, C] right-padded; lengths [n] -> the fields of PolicyOutputs.

        Zeros beyond a completion's length. ref_hidden [n, C, h]: the reference's, for the KL over the vocabulary.
        """
        row = flat_row(prompt_ids, prompt_mask, completion_ids, lengths)
        decoder = _causal_lm(self.model).base_model
        hidden = decoder(
            input_ids=row.ids[None], position_ids=row.positions[None], attention_mask=row.keys, layout=row, use_cache=False
        ).last_hidden_state[0]  # [T, h]
        predicting = hidden.index_select(0, row.predictors)
        ref_flat = None if ref_hidden is None else ref_hidden[row.predicted]
        logps, entropies, kl = self.head(predicting, row.targets, temperature, entropy, ref_flat, extras.reference_head)
        values = None if self.value is None else self.value(predicting.to(self.value.weight.dtype))[:, 0]
        eos = None
        if extras.eos is not None:
            tempered = temperature if extras.eos_temperature is None else extras.eos_temperature
            eos = self.head(predicting, torch.full_like(row.targets, extras.eos), tempered, "no")[0]
        found = (logps, entropies, values, eos, kl, predicting if extras.hidden else None)
        return tuple(None if x is None else right_padded(x, row.predicted) for x in found)

    @staticmethod
    def micro_batches(batch: TrainBatch, rows: Any, budget: int) -> list[torch.Tensor]:
        """Row indices, at most `budget` tokens each, a prompt counted once for the part of its group that is in the micro-batch.

        Groups stay whole unless one alone is too long; those of like length come together, as attention works on padded rows.
        """
        owner = (starts_group(batch.prompt_ids, batch.prompt_mask).cumsum(0) - 1).tolist()
        prompts, completions = batch.prompt_mask.sum(1).tolist(), batch.lengths.tolist()
        parts: list[list[int]] = []
        costs: list[int] = []
        for unit in units(batch, rows):
            tokens = sum(completions[i] for i in unit)
            if parts and owner[parts[-1][-1]] == owner[unit[0]] and costs[-1] + tokens <= budget:
                parts[-1] += unit
                costs[-1] += tokens
            else:
                parts.append(list(unit))
                costs.append(prompts[unit[0]] + tokens)

        batches: list[list[int]] = []
        filled = 0
        by_length = sorted(range(len(parts)), key=lambda k: (prompts[parts[k][0]] + max(completions[i] for i in parts[k]), k))
        for k in by_length:
            if not batches or filled + costs[k] > budget:
                batches.append([])
                filled = 0
            batches[-1] += parts[k]
            filled += costs[k]
        return [torch.tensor(index, device=batch.lengths.device) for index in batches]


def _causal_lm(model: Any) -> Any:
    """The causal LM itself: peft's layers sit inside it."""
    return model.get_base_model() if is_lora(model) else model
