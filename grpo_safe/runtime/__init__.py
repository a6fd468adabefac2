"""Processes and devices: who am I, sums over ranks, and the thing that turns a loss into a step.

Only this folder knows accelerate and DeepSpeed. `plain` is one process; `sharded` is DeepSpeed ZeRO through accelerate. Both give a
`Trainable`; which one is chosen once, by launch.strategy.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from grpo_safe.config import LaunchConfig, OptimConfig
from grpo_safe.errors import UserError
from grpo_safe.runtime.plain import PlainTrainable
from grpo_safe.runtime.process import Runtime, Trainable
from grpo_safe.runtime.sharded import ShardedTrainable, inference_engine, loading_partitioned, start_sharded


def start(launch: LaunchConfig, max_grad_norm: float, bfloat16: bool) -> Runtime:
    """Join the process group, pick the device. Raises UserError where the devices do not fit the launch."""
    device = _device(launch)
    if device.type == "cpu":  # else DeepSpeed, which saving a model imports, guesses aloud
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:  # the cores that this process may use, shared among the ranks of the machine
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if launch.strategy == "single":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("launch=single under several processes; choose launch=zero1, zero2 or zero3")
        return Runtime(0, 1, device, "single")
    return start_sharded(launch, device, max_grad_norm, bfloat16)


def prepare(
    runtime: Runtime, module: nn.Module, optim: OptimConfig, bfloat16: bool, through: nn.Module | None = None
) -> Trainable:
    """The model and a fresh AdamW over its trainable parameters, placed as the launch says; bfloat16: of its forward pass.

    through: a module around the model that training forwards go through, if not the model itself.
    """
    through = module if through is None else through
    if runtime.strategy == "single":
        return PlainTrainable(module.to(runtime.device), through, optim, bfloat16)
    return ShardedTrainable(runtime, module, through, optim)


def freeze(rt: Runtime, model: nn.Module, bfloat16: bool = False) -> nn.Module:
    """A frozen model beside the policy: whole on each device, or under ZeRO-3 partitioned by an inference engine of its own.

    bfloat16: of the policy's forward; on one process that computes under autocast, and so does this one.
    """
    model.requires_grad_(False)
    if bfloat16 and rt.strategy == "single":
        model.forward = torch.autocast(rt.device.type, torch.bfloat16)(model.forward)
    if rt.strategy.startswith("zero3"):
        return inference_engine(rt, model)
    return model.to(rt.device).eval()


def device_memory_gb(rt: Runtime) -> float | None:
    """Memory of this rank's GPU in GB (1e9 bytes); None on a CPU."""
    return torch.cuda.get_device_properties(rt.device).total_memory / 1e9 if rt.device.type == "cuda" else None


def partitioned_loading(rt: Runtime) -> AbstractContextManager[Any]:
    """Inside, from_pretrained gives a ZeRO-3 model its partitions at once; elsewhere models load whole."""
    if rt.strategy.startswith("zero3"):
        return loading_partitioned(rt)
    return nullcontext()


def on_gpu(launch: LaunchConfig) -> bool:
    """Whether a run of this launch computes on a GPU."""
    return launch.device != "cpu" and torch.cuda.is_available()


def _device(launch: LaunchConfig) -> torch.device:
    if launch.device == "cpu" or (launch.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("launch.device=cuda: no CUDA device is visible; expected one, or launch.device=cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"{local_rank + 1} processes on this machine, {torch.cuda.device_count()} devices; start one a device")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
