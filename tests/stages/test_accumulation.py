"""In bfloat16 the gradients of many micro-batches are added in float32 under every ZeRO stage, or each addition would round."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from forked import CPU, preloaded
from torch import nn

from grpo_safe.config import LaunchConfig, OptimConfig

MICROS = 64


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).bfloat16()


def micro_loss(model: nn.Module, number: int) -> torch.Tensor:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(number)) + 1.0
    return (model(x.bfloat16()).float() - 3.0).square().mean() / MICROS


def norm_by_hand() -> float:
    """Each micro-batch's gradient in bfloat16, as the model gives it; their sum in float32."""
    model = model_of()
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    for number in range(MICROS):
        for total, grad in zip(sums, torch.autograd.grad(micro_loss(model, number), list(model.parameters())), strict=True):
            total += grad.float()
    return float(torch.stack([s.norm() for s in sums]).norm())


def step_of(strategy: str, out: str) -> None:
    """One step under ZeRO: its gradient norm, and the largest change of a weight."""
    os.environ.update(CPU)
    from grpo_safe import runtime

    rt = runtime.start(LaunchConfig(strategy=strategy, device="cpu"), 1e9, True)
    model = model_of()
    trainable = runtime.prepare(rt, model, OptimConfig(lr=1e-2), True)
    before = {name: tensor.clone() for name, tensor in trainable.state()}
    for number in range(MICROS):
        trainable.backward(micro_loss(trainable.model, number), last=number == MICROS - 1)
    norm = trainable.step(1e-2)
    after = dict(trainable.state())
    moved = max(float((after[name] - t).abs().max()) for name, t in before.items() if name.startswith("weight/"))
    moments = float(torch.stack([t.norm() for n, t in after.items() if n.startswith("exp_avg/")]).norm())
    Path(out).write_text(json.dumps([norm, moved, moments]))
    os._exit(0)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_the_sum_of_64_micro_batches_is_not_rounded(strategy: str, tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    one = preloaded().Process(target=step_of, args=(strategy, str(out)))
    one.start()
    one.join(120)
    assert one.exitcode == 0
    norm, moved, moments = json.loads(out.read_text())
    wanted = norm_by_hand()
    assert norm == pytest.approx(wanted, rel=1e-5)  # a sum in bfloat16 is off by 5e-4 here
    assert moments == pytest.approx(0.1 * wanted, rel=1e-5)  # what Adam was handed: (1 - beta1) times the gradient
    assert moved == pytest.approx(1e-2, rel=0.01)  # and it took one step of lr


def first_step_left_out(strategy: str, out: str) -> None:
    """A first gradient that is not finite, the state after it, and the same step from that state put back."""
    os.environ.update(CPU)
    from grpo_safe import runtime

    rt = runtime.start(LaunchConfig(strategy=strategy, device="cpu"), 1e9, True)
    trainable = runtime.prepare(rt, model_of(), OptimConfig(lr=1e-2), True)
    trainable.backward(micro_loss(trainable.model, 0) * float("nan"), last=True)
    left_out = trainable.step(1e-2)
    state = {name: tensor.clone() for name, tensor in trainable.state()}
    ends = []
    for again in (False, True):
        if again:
            trainable.load_state(state, 0)
        trainable.backward(micro_loss(trainable.model, 1), last=True)
        trainable.step(1e-2)
        ends.append({name: tensor.clone() for name, tensor in trainable.state()})
    same = all(torch.allclose(ends[0][name], ends[1][name], atol=1e-6) for name in state)
    zero = all(not t.any() for name, t in state.items() if name.startswith("exp_avg"))
    changed = any(not torch.equal(ends[0][name], state[name]) for name in state)
    Path(out).write_text(json.dumps([left_out, len(state), zero, changed, same]))
    os._exit(0)


@pytest.mark.parametrize("strategy", ["single", "zero2", "zero3"])
def test_a_state_may_be_kept_before_the_first_update(strategy: str, tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    one = preloaded().Process(target=first_step_left_out, args=(strategy, str(out)))
    one.start()
    one.join(120)
    assert one.exitcode == 0
    left_out, tensors, zero, changed, same = json.loads(out.read_text())
    assert not math.isfinite(left_out)
    assert (tensors, zero, changed, same) == (12, True, True, True)
