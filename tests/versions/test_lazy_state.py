"""A resume state is read tensor by tensor: at 7B a rank that held all of it would need 91 GB."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from grpo_safe.config import OptimConfig
from grpo_safe.errors import UserError
from grpo_safe.runtime.plain import PlainTrainable
from grpo_safe.runtime.process import Runtime
from grpo_safe.versions import resume

RT = Runtime(0, 1, torch.device("cpu"), "single")


class Kept:
    """A trainable of twelve tensors that notes what load_state is given."""

    def __init__(self) -> None:
        self.alive: list[int] = []
        self.read: dict[str, float] = {}

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for n in range(12):
            yield f"weight/{n}", torch.full((100,), float(n))

    def load_state(self, tensors: Mapping[str, torch.Tensor], steps_done: int) -> None:
        living: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        for n in range(12):
            tensor = tensors[f"weight/{n}"]
            living.add(tensor)
            self.read[f"weight/{n}"] = float(tensor.mean())
            del tensor
            self.alive.append(len(living))


def test_no_tensor_of_a_state_lives_on_after_it_was_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SHARD_BYTES", 1000)  # several shards
    kept = Kept()
    resume.save(tmp_path, 3, kept, RT, {"a": 1}, keep=1, beside={"b": torch.ones(2)})  # type: ignore[arg-type]
    assert len(list(tmp_path.rglob("shard-*"))) > 3
    found = resume.load(tmp_path, kept)  # type: ignore[arg-type]
    assert (found.step, found.record, found.beside["b"].tolist()) == (3, {"a": 1}, [1.0, 1.0])
    assert kept.read == {f"weight/{n}": float(n) for n in range(12)}
    assert kept.alive == [0] * 12


def test_what_was_put_back_does_not_hang_on_the_files(tmp_path: Path) -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    trained, again = (PlainTrainable(m, m, OptimConfig(), bfloat16=False) for m in (first, second))
    trained.backward(first(torch.ones(1, 3)).sum(), last=True)
    trained.step(0.1)
    resume.save(tmp_path, 1, trained, RT, {}, keep=1)
    resume.load(tmp_path, again)
    before = {name: tensor.clone() for name, tensor in again.state()}
    for shard in tmp_path.rglob("shard-*"):  # overwritten in place: a view of the file would show it
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state())
    assert torch.equal(second.weight, first.weight)


def test_a_state_of_other_weights_is_named(tmp_path: Path) -> None:
    small = nn.Linear(3, 2, bias=False)
    trained = PlainTrainable(small, small, OptimConfig(), bfloat16=False)
    trained.backward(small(torch.ones(1, 3)).sum(), last=True)
    trained.step(0.1)
    resume.save(tmp_path, 1, trained, RT, {}, keep=1)
    large = nn.Linear(3, 2)
    with pytest.raises(UserError, match="no weight/bias in this resume state"):
        resume.load(tmp_path, PlainTrainable(large, large, OptimConfig(), bfloat16=False))
