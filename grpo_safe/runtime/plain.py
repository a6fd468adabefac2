"""One process: the model whole, torch's AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from grpo_safe.config import OptimConfig
from grpo_safe.runtime.process import adamw, named_trainable, restored_step


class PlainTrainable:
    """A whole model and its optimizer."""

    def __init__(self, module: nn.Module, through: nn.Module, optim: OptimConfig, bfloat16: bool) -> None:
        self.model, self.module = through, module
        if bfloat16:  # float32 weights (all, or LoRA's) compute in bfloat16
            device_type = next(module.parameters()).device.type
            for called in {module, through}:
                called.forward = torch.autocast(device_type, torch.bfloat16)(called.forward)
        self.max_grad_norm = optim.max_grad_norm
        self.optimizer = adamw(module, through, optim)
        self.named = named_trainable(module, through)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in self.named], self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        was_training = self.module.training
        self.module.eval()
        try:
            yield self.module
        finally:
            self.module.train(was_training)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.named:
            yield f"weight/{name}", parameter.detach().float().cpu()
            made = self.optimizer.state.get(
                parameter, {}
            )  # empty until the first update, which a gradient that is not finite puts off
            for moment in ("exp_avg", "exp_avg_sq"):
                yield f"{moment}/{name}", made.get(moment, torch.zeros_like(parameter)).detach().float().cpu()

    def load_state(self, tensors: Mapping[str, torch.Tensor], steps_done: int) -> None:
        for name, parameter in self.named:
            parameter.data.copy_(tensors[f"weight/{name}"])
            moments = {m: tensors[f"{m}/{name}"].to(parameter) for m in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": restored_step(parameter, steps_done), **moments}
