"""Attention of a rollout: a group's prompt is kept once, and all of its completions read it together.

b prompts, G completions each, T new tokens; H query heads share H_kv key heads; D per head. A group's queries that read the same key head stand
in one matrix [G * H / H_kv, D], so neither the prompt nor a head is ever repeated, and a token is written in its place, not concatenated.

transformers hands attention over through its attention interface: `attend` is registered there as NAME and finds the cache among the arguments
of the model's forward, so the model's own code runs unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "grpo_safe_group"


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    group_cache: Any, scaling: float, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [n, H, S, D], key and value [n, H_kv, S, D] of new tokens -> [n, S, H, D]. First the prompts (n = 1), then one token a row (S = 1)."""
    step = group_cache.prompts if module.layer_idx not in group_cache.layers else group_cache.tokens
    return step(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register(NAME, attend)


@contextmanager
def group_attention(model: Any) -> Iterator[None]:
    """Inside, the model's attention is `attend`."""
    own = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = own


class Layer:
    """Keys and values of one layer: prompts [b, H_kv, P, D], zero at their right padding, and completions [b, H_kv, G, T, D]."""

    def __init__(self, b: int, width: int, group_size: int, new: int, key: Tensor, value: Tensor) -> None:
        heads = key.shape[1]
        self.prompt_keys = key.new_zeros(b, heads, width, key.shape[-1])
        self.prompt_values = value.new_zeros(b, heads, width, value.shape[-1])
        self.keys = key.new_empty(b, heads, group_size, new, key.shape[-1])
        self.values = value.new_empty(b, heads, group_size, new, value.shape[-1])

    def keep(self, groups: Tensor, members: Tensor) -> None:
        """groups [b'], members [b', G']: which stay."""
        self.prompt_keys, self.prompt_values = self.prompt_keys[groups], self.prompt_values[groups]
        self.keys, self.values = (t[groups[:, None], :, members].transpose(1, 2).contiguous() for t in (self.keys, self.values))


class GroupCache:
    """What b prompts and the tokens sampled after them left behind, and the attention over it.

    A row of the batch is one running completion; `slots` says which of the b * G places of the cache is its own (None: row i has place i). A
    completion that has ended leaves the batch at once, and the cache when that makes it smaller by a quarter.
    """

    def __init__(self, lengths: list[int], group_size: int, max_new_tokens: int, device: torch.device) -> None:
        self.bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()  # where each prompt starts in the row of all prompts
        self.lengths = torch.tensor(lengths, device=device)
        self.width, self.group_size, self.max_new_tokens = max(lengths), group_size, max_new_tokens
        self.padded = min(lengths) < self.width
        self.layers: dict[int, Layer] = {}
        self.slots: Tensor | None = None
        self.length = 0  # tokens of each completion in the cache, the current one included
        self._bias: dict[int | None, Tensor | None] = {}

    def advance(self) -> None:
        """Before the forward of each new token."""
        self.length += 1
        self._bias.clear()

    # --- attention ----------------------------------------------------------------------------------------------------

    def prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """All prompts one after the other in a single row, no padding: [1, H, S, D] -> [1, S, H, D]. Fills the layer's prompts."""
        kept = Layer(len(self.bounds) - 1, self.width, self.group_size, self.max_new_tokens, key, value)
        self.layers[layer] = kept
        return prompt_attention(self.bounds, query, key, value, scaling, window, kept.prompt_keys, kept.prompt_values)

    def tokens(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """One token of each row, [n, H, 1, D] -> [n, 1, H, D]. Writes the token's key and value."""
        kept, now = self.layers[layer], self.length
        b, heads, group, _, _ = kept.keys.shape
        kept.keys[:, :, :, now - 1] = self._placed(key[:, :, 0]).view(b, group, heads, -1).transpose(1, 2)
        kept.values[:, :, :, now - 1] = self._placed(value[:, :, 0]).view(b, group, heads, -1).transpose(1, 2)
        first = 0 if window is None else max(0, now - window)  # of the completion's own tokens, the first that is seen
        keys, values = kept.keys[:, :, :, first:now], kept.values[:, :, :, first:now]

        q = self._placed(query[:, :, 0] * scaling).view(b, group, heads, -1, query.shape[-1]).transpose(1, 2)
        joint = q.reshape(b, heads, -1, q.shape[-1])  # [b, H_kv, G * H / H_kv, D]
        of_prompt = (joint @ kept.prompt_keys.transpose(-1, -2)).view(*q.shape[:-1], -1)
        bias = self._prompt_bias(window)
        scores = torch.cat([of_prompt, q @ keys.transpose(-1, -2)], dim=-1)
        if bias is not None:
            scores[..., : self.width] += bias
        probs = softmax32(scores)
        out = (probs[..., : self.width].reshape(b, heads, -1, self.width) @ kept.prompt_values).view(*q.shape[:-1], -1)
        out = out + probs[..., self.width :] @ values  # [b, H_kv, G, H / H_kv, D]
        out = out.transpose(1, 2).reshape(b * group, 1, -1, out.shape[-1])
        return out if self.slots is None else out[self.slots]

    def _placed(self, rows: Tensor) -> Tensor:
        """[n, ...] -> [b * G, ...]: each row in its place, zeros where none runs."""
        if self.slots is None:
            return rows
        b, group = len(self.lengths), self.group_size
        return rows.new_zeros(b * group, *rows.shape[1:]).index_copy_(0, self.slots, rows)

    def _prompt_bias(self, window: int | None) -> Tensor | None:
        """0 where the current token sees a prompt's token, -inf elsewhere: [b, 1, 1, 1, P]; None where it sees them all. Made once per token."""
        if window not in self._bias:
            self._bias[window] = None
            if self.padded or (window is not None and self.width + self.length > window):
                place = torch.arange(self.width, device=self.lengths.device)
                unseen = place >= self.lengths[:, None]
                if window is not None:
                    unseen = unseen | (self.lengths[:, None] + self.length - 1 - place >= window)
                self._bias[window] = torch.zeros(unseen.shape, device=unseen.device).masked_fill(unseen, -torch.inf)[
                    :, None, None, None
                ]
        return self._bias[window]

    # --- rows that end ------------------------------------------------------------------------------------------------

    def keep(self, stay: Tensor) -> None:
        """stay: ascending indices of the rows that go on."""
        places = len(self.lengths) * self.group_size
        slots = stay if self.slots is None else self.slots[stay]
        alive, group, counts = torch.unique(slots // self.group_size, return_inverse=True, return_counts=True)
        largest = int(counts.max())
        if len(alive) * largest <= 0.75 * places:
            member = torch.arange(len(slots), device=slots.device) - (counts.cumsum(0) - counts)[group]
            source = slots.new_zeros(len(alive), largest)  # a place without a row repeats the group's first completion
            source[group, member] = slots % self.group_size
            for layer in self.layers.values():
                layer.keep(alive, source)
            self.lengths, self.group_size = self.lengths[alive], largest
            slots, places = group * largest + member, len(alive) * largest
        self.slots = None if len(slots) == places else slots


def prefill(lm: Any, prompt_ids: list[list[int]], group_cache: Any) -> Tensor:
    """All prompts in one row -> the logits after each, [b, V]. Under `group_attention`; fills the cache's prompts."""
    ids = torch.tensor([[token for row in prompt_ids for token in row]], device=lm.device)
    positions = torch.cat([torch.arange(len(row), device=lm.device) for row in prompt_ids])[None]
    last = torch.tensor(group_cache.bounds[1:], device=lm.device) - 1
    out = lm(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=last, group_cache=group_cache)
    return out.logits[0]


def prompt_attention(
    bounds: list[int], query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None,
    prompt_keys: Tensor, prompt_values: Tensor,
) -> Tensor:  # fmt: skip
    """Each prompt of the row [1, H, S, D] -> [1, S, H, D] attends to itself; its keys and values are written to [b, H_kv, P, D]."""
    out = []
    for i, (first, last) in enumerate(pairwise(bounds)):
        q, k, v = (t[:, :, first:last] for t in (query, key, value))
        prompt_keys[i, :, : last - first] = k[0]
        prompt_values[i, :, : last - first] = v[0]
        out.append(_causal(q, k, v, scaling, window))
    return torch.cat(out, dim=2).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
    """Causal attention within one prompt, [1, H, S, D] -> [1, H, S, D]."""
    length = q.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    place = torch.arange(length, device=q.device)
    back = place[:, None] - place
    unseen = (back < 0) | (back >= window)
    q = q.unflatten(1, (k.shape[1], -1)) * scaling  # [1, H_kv, H / H_kv, S, D]
    scores = (q @ k[:, :, None].transpose(-1, -2)).masked_fill(unseen, -torch.inf)
    return (softmax32(scores) @ v[:, :, None]).flatten(1, 2)


def softmax32(scores: Tensor) -> Tensor:
    """In float32 at least."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
