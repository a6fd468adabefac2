"""One forward of a causal LM on a batch of prompts with completions -> log-probs of the completions.

Two paths, one a file, chosen once for a model: `packed` reads the prompt of a group once; `plain` reads a row per completion, and works with
any causal LM. Each is a module around the model (under ZeRO-3 and autocast a forward is a module's call), and cuts a batch into its own
micro-batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grpo_safe.forward.packed import PROVEN, PackedForward, why_not_packed
from grpo_safe.forward.plain import NOTHING, PlainForward
from grpo_safe.records import Extras, PolicyOutputs, TrainBatch

__all__ = ["PROVEN", "PackedForward", "PlainForward", "micro_batches", "policy_forward", "policy_outputs", "why_not_packed"]


def policy_forward(model: nn.Module, packed: bool, critic: bool = False) -> PackedForward | PlainForward:
    """The path that `model` takes: packed if that is wanted and known to be right for its architecture.

    critic: a value head on the last hidden state, 0 at first; it belongs to the path and is not saved with the model.
    """
    path = PackedForward(model) if packed and why_not_packed(model) is None else PlainForward(model)
    if critic:
        path.value = value_head(model)
    return path


def value_head(model: nn.Module) -> nn.Linear:
    """Hidden state -> one number, in float32."""
    head = nn.Linear(model.get_input_embeddings().embedding_dim, 1)  # type: ignore[operator]
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def policy_outputs(
    forward: Any, batch: TrainBatch, temperature: float, entropy: str = "no", extras: Extras = NOTHING
) -> PolicyOutputs:
    """Log-probs [n, C] of the completion tokens after temperature; entropy: no | detached (to log) | kept (in the loss).

    forward: a policy_forward, or the engine around one. A row does not see how it was padded, nor with whom it was batched. A batch with ref_hidden
    gets the KL over the vocabulary, which only the packed path knows.
    """
    tensors = (batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.lengths)
    against = {} if batch.ref_hidden is None else {"ref_hidden": batch.ref_hidden}
    return PolicyOutputs(*forward(*tensors, temperature=temperature, entropy=entropy, extras=extras, **against))


def micro_batches(forward: Any, batch: TrainBatch, rows: Any, budget: int) -> list[torch.Tensor]:
    """The rows cut into index tensors of at most `budget` tokens each (a longer row stands alone), as the path counts them.

    Neighbours that a loss compares (batch.unit) stay together.
    """
    if batch.unit > 1:
        return _whole_units(batch, list(rows), budget)
    return forward.micro_batches(batch, rows, budget)


def _whole_units(batch: TrainBatch, rows: list[int], budget: int) -> list[torch.Tensor]:
    """Row indices in units of batch.unit neighbours, as many units as `budget` padded tokens hold, at least one."""
    widths = (batch.prompt_mask.sum(1) + batch.lengths).tolist()
    units = [rows[i : i + batch.unit] for i in range(0, len(rows), batch.unit)]
    batches: list[list[int]] = []
    for unit in sorted(units, key=lambda u: (max(widths[i] for i in u), u)):
        widest = max(widths[i] for i in unit)
        if batches and (len(batches[-1]) + batch.unit) * widest <= budget:
            batches[-1] += unit
        else:
            batches.append(list(unit))
    return [torch.tensor(index, device=batch.lengths.device) for index in batches]
