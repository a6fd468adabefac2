"""What a resumed run puts back lies where the optimizer looks for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from grpo_safe.config import OptimConfig
from grpo_safe.runtime.plain import PlainTrainable
from grpo_safe.runtime.sharded import ShardedTrainable


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{kind}/{name}": torch.full(tuple(p.shape), 0.5)
        for name, p in model.named_parameters()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }


def test_every_restored_tensor_is_on_the_device_of_its_parameter() -> None:
    """The device "meta" stands for a GPU: fused AdamW there refuses a count of steps on the CPU."""
    model = nn.Linear(3, 2)
    tensors = state_of(model)
    model.to("meta")
    trainable = PlainTrainable(model, model, OptimConfig(), bfloat16=False)
    trainable.load_state(tensors, 7)
    assert len(trainable.optimizer.state) == 2
    for parameter, state in trainable.optimizer.state.items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        for name, tensor in state.items():
            assert tensor.device == parameter.device, name
        assert state["step"].dtype == torch.float32


@pytest.mark.parametrize("stage", [2, 3])
def test_under_zero_the_count_of_steps_is_on_the_device_of_the_partition(stage: int) -> None:
    flat = nn.Parameter(torch.zeros(6, device="meta"))
    zero = SimpleNamespace(
        single_partition_of_fp32_groups=[flat], fp32_partitioned_groups_flat=[flat], persistent_parameters=[],
        optimizer=SimpleNamespace(state={}), _lazy_init_hp_params_optimizer_state=lambda: None, update_lp_params=lambda: None,
        _reassign_or_swap_out_partitioned_parameters=lambda group: None,
    )  # fmt: skip
    trainable = object.__new__(ShardedTrainable)
    trainable.model, trainable.stage, trainable.named = SimpleNamespace(optimizer=zero), stage, []
    trainable.load_state({}, 7)
    assert {tensor.device for tensor in zero.optimizer.state[flat].values()} == {flat.device}


def test_a_resumed_count_of_steps_is_the_one_that_the_bias_correction_sees() -> None:
    torch.manual_seed(0)
    whole, again = nn.Linear(3, 2), nn.Linear(3, 2)
    first = PlainTrainable(whole, whole, OptimConfig(lr=0.1), bfloat16=False)
    second = PlainTrainable(again, again, OptimConfig(lr=0.1), bfloat16=False)
    x = torch.randn(4, 3)
    for _ in range(3):
        first.backward(whole(x).square().sum(), last=True)
        first.step(0.1)
    second.load_state({name: tensor.clone() for name, tensor in first.state()}, 3)
    for trainable, model in ((first, whole), (second, again)):
        trainable.backward(model(x).square().sum(), last=True)
        trainable.step(0.1)
    assert torch.equal(whole.weight, again.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_resumed_optimizer_steps_on_a_gpu() -> None:
    model = nn.Linear(3, 2)
    tensors = state_of(model)
    model.cuda()
    trainable = PlainTrainable(model, model, OptimConfig(), bfloat16=False)
    trainable.load_state(tensors, 7)
    trainable.backward(model(torch.ones(1, 3, device="cuda")).sum(), last=True)
    trainable.step(0.1)
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = nn.Linear(3, 2)
    trainable = PlainTrainable(model, model, OptimConfig(lr=0.1), bfloat16=False)
    before = model.weight.detach().clone()
    trainable.backward(model(torch.ones(1, 3)).sum() * bad, last=True)
    assert not torch.isfinite(torch.tensor(trainable.step(0.1)))
    assert torch.equal(model.weight, before) and model.weight.grad is None
    trainable.backward(model(torch.ones(1, 3)).sum(), last=True)
    assert trainable.step(0.1) > 0
    assert model.weight.isfinite().all() and not torch.equal(model.weight, before)
