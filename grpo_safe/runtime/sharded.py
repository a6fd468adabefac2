"""Several processes: DeepSpeed ZeRO through accelerate.

DeepSpeed divides by its own static accumulation count and averages over ranks; our losses are already divided by counts over all ranks
and micro-batches. So its accumulation stands at 1, we set the boundary, and the loss is multiplied by the number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from grpo_safe.config import LaunchConfig, OptimConfig
from grpo_safe.runtime.process import Runtime, adamw, named_trainable, restored_step

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def deepspeed_config(launch: LaunchConfig, max_grad_norm: float, bfloat16: bool) -> dict[str, Any]:
    """The DeepSpeed config of a launch strategy."""
    # in bfloat16 zero1 runs DeepSpeed's stage 2: its stage 1 would add gradients up in bfloat16, or in float32 through an optimizer of its
    # own that stops at a gradient of zero, takes one that is not finite, and keeps its state elsewhere
    stage = max(2, STAGES[launch.strategy]) if bfloat16 else STAGES[launch.strategy]
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": launch.bucket_elements,
        "allgather_bucket_size": launch.bucket_elements,
        "overlap_comm": False,
        "contiguous_gradients": True,
    }
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": launch.param_persistence_threshold,
            "stage3_prefetch_bucket_size": launch.bucket_elements,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        del zero["allgather_bucket_size"]
    if launch.strategy == "zero3_offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # gradients of many micro-batches are added in float32, or each addition rounds; a step of non-finite gradients is left out (in
    # float32 DeepSpeed does so by itself)
    precise = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"} if bfloat16 else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": bfloat16, "check_grad_overflow": bfloat16},
        **precise,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def start_sharded(launch: LaunchConfig, device: torch.device, max_grad_norm: float, bfloat16: bool) -> Runtime:
    """Join the process group through accelerate with a DeepSpeed plugin."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs
    from transformers.integrations import unset_hf_deepspeed_config

    plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(launch, max_grad_norm, bfloat16), zero3_init_flag=False)
    backend = "gloo" if device.type == "cpu" else "nccl"
    handler = InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=launch.timeout_minutes))
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[handler])
    unset_hf_deepspeed_config()  # else from_pretrained would give every model beside the policy empty partitions
    return Runtime(accelerator.process_index, accelerator.num_processes, accelerator.device, launch.strategy, accelerator)


class ShardedTrainable:
    """A DeepSpeed engine over a model."""

    def __init__(self, rt: Runtime, module: nn.Module, through: nn.Module, optim: OptimConfig) -> None:
        self.world_size = rt.world_size
        self.stage = STAGES[rt.strategy]
        self.model, self.optimizer = rt.accelerator.prepare(through, adamw(module, through, optim))
        self.module = module
        self.named = named_trainable(module, through)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        self.model.backward(loss * self.world_size)
        if not last:
            self.model.step()  # counts the micro-batch; updates only at the boundary

    def step(self, lr: float) -> float:
        for group in self.model.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.model.step()
        if self.stage < 3 and len(self.model.optimizer.optimizer.param_groups) > 1:
            # DeepSpeed links moments to parameters after the first group's first update, when the other groups have none yet
            self.model.optimizer._hp_optimizer_states_linked = False
            self.model.optimizer._lazy_init_hp_params_optimizer_state()
        return float(self.model.get_global_grad_norm())

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        was_training = self.module.training
        self.module.eval()
        try:
            with self._whole():
                yield self.module
        finally:
            self.module.train(was_training)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            self._remove_hooks()  # else a forward fetches and frees layer by layer, and ranks of different lengths deadlock
            try:
                yield
            finally:
                self._restore_hooks()

    def _remove_hooks(self) -> None:
        offload = self.model.optimizer.parameter_offload
        for parameter in self.module.parameters():
            getattr(parameter, "ds_active_sub_modules").clear()  # noqa: B009 - DeepSpeed's attribute
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []

    def _restore_hooks(self) -> None:
        offload = self.model.optimizer.parameter_offload
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        offload._register_deepspeed_module(offload.module)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        made = any("exp_avg" in state for state in self.model.optimizer.optimizer.state.values())
        for name, parameter in self.named:
            weight = safe_get_full_fp32_param(parameter).float().cpu()
            yield f"weight/{name}", weight
            for moment in ("exp_avg", "exp_avg_sq"):
                if made:
                    yield f"{moment}/{name}", safe_get_full_optimizer_state(parameter, moment).float().cpu()
                else:  # until the first update, which a gradient that is not finite puts off
                    yield f"{moment}/{name}", torch.zeros_like(weight)

    def load_state(self, tensors: Mapping[str, torch.Tensor], steps_done: int) -> None:
        zero = self.model.optimizer
        flats = zero.single_partition_of_fp32_groups if self.stage < 3 else zero.fp32_partitioned_groups_flat
        for flat in flats:  # DeepSpeed makes the moments at the first step; a resumed run needs them before
            fresh = {moment: torch.zeros_like(flat.data) for moment in ("exp_avg", "exp_avg_sq")}
            zero.optimizer.state[flat] = {"step": restored_step(flat, steps_done), **fresh}
        if self.stage < 3:
            zero._hp_optimizer_states_linked = False  # after a step the earlier moments are linked
            zero._lazy_init_hp_params_optimizer_state()
        put = _put_flat if self.stage < 3 else _put_partition
        for name, parameter in self.named:
            for key in ("weight", "exp_avg", "exp_avg_sq"):
                put(parameter, tensors[f"{key}/{name}"].to(flats[0].device), key)
        self._refresh_model_weights()

    def _refresh_model_weights(self) -> None:
        """What the forward pass reads follows the float32 weights that were just put."""
        zero = self.model.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        for sub_group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:  # small tensors that ZeRO-3 keeps whole on every rank
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _put_flat(parameter: nn.Parameter, value: torch.Tensor, key: str) -> None:
    """ZeRO-1, 2: this rank's fragment of a whole tensor."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if key == "weight":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _put_partition(parameter: Any, value: torch.Tensor, key: str) -> None:
    """ZeRO-3: this rank's partition of a whole tensor, which DeepSpeed pads to a multiple of the ranks."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank()
    padded = torch.zeros(size * torch.distributed.get_world_size(), dtype=value.dtype, device=value.device)
    padded[: value.numel()] = value.flatten()
    mine = padded[rank * size : (rank + 1) * size]
    if key == "weight":
        safe_set_local_fp32_param(parameter, mine)
    else:
        safe_set_local_optimizer_state(parameter, mine, key)


@contextmanager
def loading_partitioned(rt: Runtime) -> Iterator[None]:
    """Inside, from_pretrained partitions each tensor as it is read: no rank ever holds the whole model."""
    from transformers.integrations import unset_hf_deepspeed_config

    plugin = rt.accelerator.state.deepspeed_plugin
    plugin.set_deepspeed_weakref()
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        plugin.dschf = None


def inference_engine(rt: Runtime, model: nn.Module) -> nn.Module:
    """A frozen model under ZeRO-3 of its own: each rank holds a part, forwards gather layer by layer."""
    import deepspeed

    config = dict(rt.accelerator.state.deepspeed_plugin.deepspeed_config)
    config.pop("optimizer", None)
    config["zero_optimization"] = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine
