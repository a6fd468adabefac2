"""The LM head and what the loss needs of it, in chunks of positions: logits of all positions never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32, whatever the vocabulary and the number of positions


class HeadLogps(nn.Module):
    """Log-probs and entropies from the hidden states that predict them.

    It holds the LM head's own weight as a parameter: under ZeRO-3 one call gathers it once, and ranks with different numbers of chunks
    still gather equally often.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, entropy: str, ref_hidden: torch.Tensor | None = None,
        reference_head: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
        """hidden [m, h], targets [m] -> log-probs [m], entropies [m] (None for "no"), KL(reference || policy) [m] (None without ref_hidden [m, h]).

        "detached" entropies carry no gradient. reference_head: where it is not this one.
        """
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        ref_weight, ref_bias = (
            (weight.detach(), None if bias is None else bias.detach()) if reference_head is None else reference_head
        )
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type):
            low = torch.get_autocast_dtype(device_type)
            hidden, weight, bias = hidden.to(low), weight.to(low), None if bias is None else bias.to(low)
            ref_weight, ref_bias = ref_weight.to(low), None if ref_bias is None else ref_bias.to(low)
        with torch.autocast(device_type, enabled=False):  # the softmax stays in float32
            logps, entropies = _ChunkedLogps.apply(hidden, weight, bias, targets, temperature, entropy)
            kl = None
            if ref_hidden is not None:
                kl = _ChunkedKL.apply(hidden, weight, bias, ref_hidden.to(ref_weight.dtype), ref_weight, ref_bias, temperature)
        return logps, None if entropy == "no" else entropies, kl


class _Gradients:
    """Towards hidden states, head weight and bias, where they are wanted, filled chunk by chunk; sums over chunks are of `wide`."""

    def __init__(
        self, wanted: tuple[bool, ...], hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: torch.dtype
    ) -> None:
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if wanted[2] and bias is not None else None

    def add(self, rows: slice, grad_logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """What a chunk's d loss / d logits [m, V] sends back."""
        low = grad_logits.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = low @ weight
        if self.weight is not None:
            _add_product(self.weight, low.T, hidden[rows])
        if self.bias is not None:
            self.bias += grad_logits.sum(0)

    def of(self, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
        """(hidden, weight, bias), the last two in the head's dtype."""
        return self.hidden, *(None if g is None else g.to(dtype) for g in (self.weight, self.bias))


class _ChunkedLogps(torch.autograd.Function):
    """d logp_i / d logits_i = (onehot_i - p_i) / tau, so with a frozen head the gradient towards the hidden state is known up to the factor
    that the loss will send back: the forward pass keeps that vector [m, h], and nothing is computed twice. Where the head learns, or the
    entropy is in the loss, the backward pass computes the logits once more.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        temperature: float, wanted: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        learns = any(ctx.needs_input_grad[1:3])
        ctx.direct = ctx.needs_input_grad[0] and not learns and wanted != "kept"
        ctx.temperature = temperature
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps, entropies = (hidden.new_zeros(len(hidden), dtype=wide) for _ in range(2))
        direction = torch.empty_like(hidden) if ctx.direct else None
        for rows in _chunks(hidden, weight):
            log_probs = _log_softmax(hidden[rows], weight, bias, temperature)
            logps[rows] = log_probs.gather(1, targets[rows, None])[:, 0]
            if wanted == "no" and direction is None:
                continue
            probs = log_probs.exp()
            if wanted != "no":
                entropies[rows] = -torch.linalg.vecdot(probs, log_probs)
            if direction is not None:
                direction[rows] = (_towards(targets[rows], probs).to(weight.dtype) @ weight) / temperature
            del log_probs, probs  # or the next chunk would come beside this one
        ctx.save_for_backward(*((direction,) if ctx.direct else (hidden, weight, bias, targets, entropies)))
        if wanted != "kept":
            ctx.mark_non_differentiable(entropies)
        ctx.kept = wanted == "kept"
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, grad_logps: torch.Tensor, grad_entropies: torch.Tensor) -> Any:
        if ctx.direct:
            (direction,) = ctx.saved_tensors
            return (grad_logps[:, None] * direction).to(direction.dtype), None, None, None, None, None
        hidden, weight, bias, targets, entropies = ctx.saved_tensors
        gradients = _Gradients(ctx.needs_input_grad, hidden, weight, bias, grad_logps.dtype)
        for rows in _chunks(hidden, weight):
            log_probs = _log_softmax(hidden[rows], weight, bias, ctx.temperature)
            surprise = log_probs + entropies[rows, None] if ctx.kept else None
            probs = log_probs.exp_()
            spread = probs * surprise if surprise is not None else None  # -d H / d logits
            grad_logits = _towards(targets[rows], probs).mul_(grad_logps[rows, None] / ctx.temperature)
            if spread is not None:
                grad_logits -= spread.mul_(grad_entropies[rows, None] / ctx.temperature)
            gradients.add(rows, grad_logits, hidden, weight)
            del log_probs, surprise, probs, spread, grad_logits
        return *gradients.of(weight.dtype), None, None, None


class _ChunkedKL(torch.autograd.Function):
    """KL(q || p) of the reference's q and the policy's p over the vocabulary; d KL_i / d logits_i = (p_i - q_i) / tau, kept as above."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ref_hidden: torch.Tensor,
        ref_weight: torch.Tensor, ref_bias: torch.Tensor | None, temperature: float,
    ) -> torch.Tensor:  # fmt: skip
        ctx.direct = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        ctx.temperature = temperature
        kl = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        direction = torch.empty_like(hidden) if ctx.direct else None
        for rows in _chunks(hidden, weight):
            p = _log_softmax(hidden[rows], weight, bias, temperature)
            q = _log_softmax(ref_hidden[rows], ref_weight, ref_bias, temperature)
            kl[rows] = torch.linalg.vecdot(q.exp(), q - p)
            if direction is not None:
                direction[rows] = (p.exp_().sub_(q.exp_()).to(weight.dtype) @ weight) / temperature
        ctx.save_for_backward(*((direction,) if ctx.direct else (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)))
        return kl

    @staticmethod
    def backward(ctx: Any, grad_kl: torch.Tensor) -> Any:
        if ctx.direct:
            (direction,) = ctx.saved_tensors
            return (grad_kl[:, None] * direction).to(direction.dtype), None, None, None, None, None, None
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = ctx.saved_tensors
        gradients = _Gradients(ctx.needs_input_grad, hidden, weight, bias, grad_kl.dtype)
        for rows in _chunks(hidden, weight):
            p = _log_softmax(hidden[rows], weight, bias, ctx.temperature)
            q = _log_softmax(ref_hidden[rows], ref_weight, ref_bias, ctx.temperature)
            grad_logits = p.exp_().sub_(q.exp_()).mul_(grad_kl[rows, None] / ctx.temperature)
            gradients.add(rows, grad_logits, hidden, weight)
        return *gradients.of(weight.dtype), None, None, None, None


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _log_softmax(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """[m, h] -> [m, V] after temperature, in float32 or wider."""
    logits = nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits /= temperature
    return logits.log_softmax(1)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, without a second tensor of its size where all are of one dtype."""
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _towards(targets: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """onehot - p, written over p: the difference is taken before any rounding to a short dtype."""
    return probs.neg_().scatter_add_(1, targets[:, None], torch.ones_like(probs[:, :1]))
