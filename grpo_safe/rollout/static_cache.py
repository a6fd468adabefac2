"""Keys and values at fixed addresses, and attention over them that asks the host for nothing: what a recorded step reads."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from grpo_safe.rollout.attention import prompt_attention, softmax32


@dataclass(frozen=True)
class Shape:
    """What the tensors of a step are sized by; a graph is captured for each.

    Example: Shape(groups=4, members=8, width=64, seen=256)
    """

    groups: int  # b
    members: int  # G, of each group
    width: int  # P, of the prompts, padding counted
    seen: int  # of T, completion tokens that attention reads

    @property
    def places(self) -> int:
        return self.groups * self.members


class StaticCache:
    """Keys and values at fixed addresses: a smaller shape uses the beginning of what the largest one needs.

    Prompts [b, H_kv, P, D], zero at their right padding, and completions [b, H_kv, G, T, D], finite everywhere.
    """

    def __init__(self, places: int, prompt_places: int, new: int, device: torch.device) -> None:
        self.places, self.prompt_places, self.new = places, prompt_places, new
        self.lengths = torch.zeros(places, dtype=torch.long, device=device)  # of the prompts, [b]
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # the newest token's place in its completion
        self.layers: set[int] = set()  # those whose prompts are read
        self.bounds: list[int] = []
        self.shape = Shape(1, 1, 1, 1)
        self._kept: dict[int, dict[str, Tensor]] = {}  # per layer, flat
        self._sizes: dict[int, tuple[int, int, int]] = {}  # H_kv, D of keys, D of values
        self._bias: dict[int | None, Tensor] = {}

    def begin(self, lengths: list[int], shape: Shape) -> None:
        """New prompts. What the last ones left is cleared: a value that is masked is still multiplied, by 0."""
        self.layers, self.shape = set(), shape
        self.bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
        self.lengths[: len(lengths)] = torch.tensor(lengths)
        for kept in self._kept.values():
            for flat in kept.values():
                flat.zero_()

    def clear_bias(self) -> None:
        """Before and after each step: its masks are its own."""
        self._bias.clear()

    def views(self, layer: int, shape: Shape) -> dict[str, Tensor]:
        """The layer's prompt_keys and prompt_values [b, H_kv, P, D], keys and values [b, H_kv, G, T, D] of a shape."""
        heads, of_keys, of_values = self._sizes[layer]
        found = {}
        for name, flat in self._kept[layer].items():
            dim = of_values if name.endswith("values") else of_keys
            inner = (shape.width, dim) if name.startswith("prompt") else (shape.members, self.new, dim)
            size = (shape.groups, heads, *inner)
            found[name] = flat[: prod(size)].view(size)
        return found

    def _make(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Under autocast keys may be float32 and values bfloat16: products are made in the values' type, so that is kept."""
        heads, of_keys, of_values = key.shape[1], key.shape[-1], value.shape[-1]
        self._sizes[layer] = heads, of_keys, of_values
        prompts, completions = self.prompt_places * heads, self.places * heads * self.new
        sizes = {"prompt_keys": prompts * of_keys, "prompt_values": prompts * of_values}
        sizes |= {"keys": completions * of_keys, "values": completions * of_values}
        self._kept[layer] = {name: value.new_zeros(size) for name, size in sizes.items()}

    # --- attention ----------------------------------------------------------------------------------------------------

    def prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """All prompts one after the other in a single row: [1, H, S, D] -> [1, S, H, D]. Fills the layer's prompts."""
        if layer not in self._kept:
            self._make(layer, key, value)
        self.layers.add(layer)
        kept = self.views(layer, self.shape)
        return prompt_attention(self.bounds, query, key, value, scaling, window, kept["prompt_keys"], kept["prompt_values"])

    def tokens(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """One token of each place, [b * G, H, 1, D] -> [b * G, 1, H, D]. Writes the token's key and value."""
        shape, kept = self.shape, self.views(layer, self.shape)
        heads = key.shape[1]
        placed = (shape.groups, shape.members, heads)
        for name, new in (("keys", key), ("values", value)):
            new = new[:, :, 0].to(kept[name].dtype).view(*placed, 1, -1).transpose(1, 2)  # [b, H_kv, G, 1, D]
            kept[name].index_copy_(3, self.column, new)
        keys, values = (kept[name][:, :, :, : shape.seen] for name in ("keys", "values"))

        q = (query[:, :, 0] * scaling).to(keys.dtype).view(*placed, -1, query.shape[-1]).transpose(1, 2)
        joint = q.reshape(shape.groups, heads, -1, q.shape[-1])  # [b, H_kv, G * H / H_kv, D]
        of_prompt = (joint @ kept["prompt_keys"].transpose(-1, -2)).view(*q.shape[:-1], -1)
        scores = torch.cat([of_prompt, q @ keys.transpose(-1, -2)], dim=-1)
        probs = softmax32(scores.add_(self._masked(window)))
        width = shape.width
        out = probs[..., :width].reshape(shape.groups, heads, -1, width) @ kept["prompt_values"]
        out = out.view(*q.shape[:-1], -1) + probs[..., width:] @ values  # [b, H_kv, G, H / H_kv, D]
        return out.transpose(1, 2).reshape(shape.places, 1, -1, out.shape[-1])

    def _masked(self, window: int | None) -> Tensor:
        """0 where the current token sees a token, -inf elsewhere: [b, 1, 1, 1, P + seen]. Made once per step."""
        if window not in self._bias:
            shape, device = self.shape, self.column.device
            prompt, own = torch.arange(shape.width, device=device), torch.arange(shape.seen, device=device)
            lengths = self.lengths[: shape.groups, None]
            no_prompt, not_own = prompt >= lengths, own > self.column
            if window is not None:
                no_prompt = no_prompt | (lengths + self.column - prompt >= window)
                not_own = not_own | (self.column - own >= window)
            unseen = torch.cat([no_prompt, not_own.expand(shape.groups, -1)], dim=1)
            self._bias[window] = torch.zeros(unseen.shape, device=device).masked_fill(unseen, -torch.inf)[:, None, None, None]
        return self._bias[window]

    # --- rows that end ------------------------------------------------------------------------------------------------

    def keep(self, groups: Tensor, members: Tensor, shape: Shape, length: int) -> None:
        """groups [b'], members [b', G']: which stay, in a new shape; length: tokens of each completion so far."""
        for layer in self.layers:
            old, new = self.views(layer, self.shape), self.views(layer, shape)
            for name in old:
                if name.startswith("prompt"):
                    new[name].copy_(old[name][groups])  # indexing made a copy, so both may overlap
                else:
                    new[name][..., :length, :] = old[name][..., :length, :][groups[:, None], :, members].transpose(1, 2)
        self.lengths[: shape.groups] = self.lengths[groups]
        self.shape = shape


def halved(full: int, needed: int) -> int:
    """The smallest of full, full / 2, full / 4, ... (rounded up) that is at least `needed`: few sizes, so few graphs."""
    size = full
    while size > 1 and (size + 1) // 2 >= needed:
        size = (size + 1) // 2
    return size
