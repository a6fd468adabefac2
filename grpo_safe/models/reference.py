"""What the KL term is measured against: the start, weights that follow the policy, or an average of several policies.

A moving reference is the policy with earlier trainable weights (under LoRA the adapter's) put in for one forward: no second model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grpo_safe import models
from grpo_safe.errors import UserError
from grpo_safe.runtime import Trainable

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Choice:
    """algo.reference, read."""

    every: int = 0  # steps between moves; 0: it stands still
    share: float = 0.0  # how far it goes towards the policy
    soup: tuple[str, ...] = ()  # policies that are averaged
    soup_weights: tuple[float, ...] = ()


def ema(decay: float = 0.99) -> Choice:
    """w <- decay w + (1 - decay) policy after each step."""
    return Choice(every=1, share=1.0 - decay)


def refresh(every: int = 50, share: float = 1.0) -> Choice:
    """Every `every` steps w <- (1 - share) w + share policy (TR-DPO, arXiv 2404.09656)."""
    return Choice(every=every, share=share)


def soup(policies: Sequence[str] = (), weights: list[float] | None = None) -> Choice:
    """The average of several policies' weights (SALSA, arXiv 2411.01798); equal shares unless `weights` says otherwise."""
    if len(policies) < 2:
        raise UserError(f"algo.reference.policies={list(policies)}: a soup is made of two or more policies")
    shares = weights or [1.0 / len(policies)] * len(policies)
    if len(shares) != len(policies) or abs(sum(shares) - 1.0) > 1e-6:
        raise UserError(f"algo.reference.weights={list(shares)}: expected {len(policies)} numbers that sum to 1")
    return Choice(soup=tuple(policies), soup_weights=tuple(shares))


REFERENCES: dict[str, Callable[..., Choice]] = {"start": Choice, "ema": ema, "refresh": refresh, "soup": soup}


@dataclass
class Moving:
    """Earlier trainable weights, float32 on CPU."""

    weights: Weights
    choice: Choice

    def follow(self, trainable: Trainable, step: int) -> None:
        """Move towards the policy where the step says so; every rank calls."""
        if step % self.choice.every == 0:
            for name, now in trainable_weights(trainable).items():
                self.weights[name].lerp_(now, self.choice.share)


def trainable_weights(trainable: Trainable) -> Weights:
    """A copy of what trains; every rank calls."""
    with trainable.gathered() as module:
        return {n: p.detach().float().cpu().clone() for n, p in module.named_parameters() if p.requires_grad}


@contextmanager
def put_in(trainable: Trainable, weights: Weights) -> Iterator[None]:
    """The policy with other trainable weights while inside; its own come back bit for bit."""
    with trainable.gathered() as module, torch.no_grad():
        own = {n: p.detach().clone() for n, p in module.named_parameters() if n in weights}
        _copy(module, weights)
        try:
            yield
        finally:
            _copy(module, own)


def averaged(choice: Choice, dtype: str, attn_implementation: str, trust_remote_code: bool) -> Any:
    """A soup's model: the weights of its policies averaged in float32. Raises UserError where their shapes differ."""
    first, *others = choice.soup
    model = _opened(first, attn_implementation, trust_remote_code)
    mixed = {name: tensor * choice.soup_weights[0] for name, tensor in model.state_dict().items()}
    for start, share in zip(others, choice.soup_weights[1:], strict=True):
        for name, tensor in _opened(start, attn_implementation, trust_remote_code).state_dict().items():
            if name not in mixed or mixed[name].shape != tensor.shape:
                raise UserError(
                    f"algo.reference.policies: {start} and {first} differ in {name}; a soup needs models of one shape"
                )
            mixed[name] += share * tensor
    model.load_state_dict(mixed)
    return models.cast_weights(model, dtype)


def _opened(start: str, attn_implementation: str, trust_remote_code: bool) -> Any:
    found = models.resolve_start(start, None, trust_remote_code, "algo.reference.policies")
    return models.load_causal_lm(found, "float32", attn_implementation)


def _copy(module: nn.Module, weights: Weights) -> None:
    for name, parameter in module.named_parameters():
        if name in weights:
            parameter.data.copy_(weights[name])
