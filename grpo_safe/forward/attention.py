"""Attention over flat rows in which completions share their prompt's tokens; other calls go to sdpa as ever."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo_safe.forward.layout import Layout

NAME = "shared_prefix"


def shared_prefix_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, layout: Layout | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """query [1, H, T, D], key and value [1, H_kv, T, D] of a flat row -> [1, T, H, D].

    Prompts attend causally; a completion attends to its prompt and itself. attention_mask [n, 1, C, P + C]: which of those keys exist.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    assert attention_mask is not None
    repeats, split = query.shape[1] // key.shape[1], len(layout.prompt_slots)
    flat = [t[0].transpose(0, 1) for t in (query, key, value)]  # [T, H, D]
    q, k, v = (_rows(t[:split], layout.prompt_slots, layout.prompts) for t in flat)
    own_q, own_k, own_v = (_rows(t[split:], layout.completion_slots, layout.completions) for t in flat)
    k_both, v_both = (torch.cat([shared.index_select(0, layout.owner), own], dim=2) for shared, own in ((k, own_k), (v, own_v)))
    prompts = scaled_dot_product_attention(
        q, repeat_kv(k, repeats), repeat_kv(v, repeats), is_causal=True, dropout_p=dropout, scale=scaling
    )
    # the heads that share keys become queries of one head: keys and values, the prompt's among them, are not repeated
    folded = own_q.unflatten(1, (-1, repeats)).flatten(2, 3)  # [n, H_kv, H / H_kv * C, D]
    completions = scaled_dot_product_attention(
        folded, k_both, v_both, attn_mask=attention_mask.repeat(1, 1, repeats, 1), dropout_p=dropout, scale=scaling
    )
    completions = completions.unflatten(2, (repeats, -1)).flatten(1, 2)
    return torch.cat([_flat(prompts, layout.prompt_slots), _flat(completions, layout.completion_slots)])[None], None


def _rows(flat: torch.Tensor, slots: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """[tokens, H, D] -> [rows, H, width, D], zeros where `inside` [rows, width] is False."""
    padded = flat.new_zeros(inside.numel(), *flat.shape[1:]).index_copy(0, slots, flat)
    return padded.view(*inside.shape, *flat.shape[1:]).transpose(1, 2)


def _flat(rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[rows, H, width, D] -> [tokens, H, D]."""
    return rows.transpose(1, 2).flatten(0, 1).index_select(0, slots)


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
