"""This process among the others, and what the loop asks of a model that trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from grpo_safe.config import OptimConfig


@dataclass(frozen=True)
class Runtime:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    strategy: str
    accelerator: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over all ranks."""
        if self.world_size == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def maximum(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, value: Any) -> list[Any]:
        """One picklable object from each rank, in rank order."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[n_r, ...] of each rank -> [sum n_r, ...], in rank order."""
        return torch.cat([part.to(rows.device) for part in self.gather(rows.cpu())])

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def share(self, items: list[Any]) -> list[Any]:
        """This rank's contiguous part of a list whose length need not divide by the ranks."""
        bounds = [len(items) * r // self.world_size for r in range(self.world_size + 1)]
        return items[bounds[self.rank] : bounds[self.rank + 1]]


class Trainable(Protocol):
    """A model with its optimizer, whole or sharded. Forward goes through `model`."""

    model: nn.Module  # what training calls: under ZeRO the engine
    module: nn.Module  # the user's model inside it: what samples and is saved

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate gradients of a loss whose denominators already count all ranks; `last` marks the step's last one."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update, clear; returns the gradient norm before clipping. Where it is not finite nothing is updated."""
        ...

    def gathered(self) -> AbstractContextManager[nn.Module]:
        """The whole model for free use (sampling, scoring, saving); every rank must enter."""
        ...

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Trainable weights and Adam moments, fp32 on CPU, as (kind/name, whole tensor); every rank must iterate."""
        ...

    def load_state(self, tensors: Mapping[str, torch.Tensor], steps_done: int) -> None:
        """Put `state()` back, at any world size; a tensor may be read only when it is asked for, and is let go at once."""
        ...


def named_trainable(module: nn.Module, through: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What trains: the model's own under its own names, then what the module around it adds (a value head)."""
    own = {id(p) for p in module.parameters()}
    added = [(f"added.{n}", p) for n, p in through.named_parameters() if id(p) not in own]
    return [(n, p) for n, p in [*module.named_parameters(), *added] if p.requires_grad]


def restored_step(parameter: torch.Tensor, steps_done: int) -> torch.Tensor:
    """Adam's count of steps for a restored parameter: fused AdamW reads it on the parameter's device, as torch's own load_state_dict puts it."""
    return torch.tensor(float(steps_done), dtype=torch.float32, device=parameter.device)


def adamw(module: nn.Module, through: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable; no weight decay on vectors (norms, biases), a rate of its own for what `through` adds."""
    named = named_trainable(module, through)
    parameters = [p for n, p in named if not n.startswith("added.")]
    added = [p for n, p in named if n.startswith("added.")]

    def rank_of(p: nn.Parameter) -> int:  # under ZeRO-3 a partitioned parameter shows an empty shape
        return len(getattr(p, "ds_shape", p.shape))

    groups = [
        {"params": [p for p in parameters if rank_of(p) > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if rank_of(p) <= 1], "weight_decay": 0.0},
    ]
    if optim.weight_decay == 0:
        groups = [{"params": parameters, "weight_decay": 0.0}]
    groups.append({"params": added, "weight_decay": 0.0, "lr_scale": optim.critic_lr_scale})
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
