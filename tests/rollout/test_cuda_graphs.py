"""CUDA graphs on a real device: what is replayed is what runs eagerly. Skipped without a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_rollout import PROMPTS, noise_of, run, same, tiny
from test_static_decoding import gap_to_own_logps

from grpo_safe.rollout import graphs, native
from grpo_safe.rollout.static import Eager, StaticDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible"),
]


def by_steps(runner):
    decoder = StaticDecoder(runner, check_every=4, least_seen=8)
    return partial(native.decode, static=decoder), decoder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(native.KNOWN))
def test_replay_equals_eager(name, dtype):
    """The same kernels in the same order, over two rollouts, with rows that end and places that are given up."""
    model = tiny(name).to("cuda", dtype)
    noise = noise_of(PROMPTS, 40)
    ends = set(run(by_steps(Eager())[0], model, PROMPTS, noise, set()).ids[0][9:12])
    for top_p in (1.0, 0.9):
        expected = run(by_steps(Eager())[0], model, PROMPTS, noise, ends, top_p=top_p)
        decode, decoder = by_steps(graphs.Graphs(graphs.Cuda()))
        for _ in range(2):
            same(run(decode, model, PROMPTS, noise, ends, top_p=top_p), expected)
        assert decoder.run.failure is None and decoder.run._recorded
        if dtype == torch.float64:
            same(run(native.decode, model, PROMPTS, noise, ends, top_p=top_p), expected)


def test_replay_sees_weights_that_were_updated_in_place():
    model, noise = tiny("llama").to("cuda", torch.float64), noise_of(PROMPTS, 40)
    decode, decoder = by_steps(graphs.Graphs(graphs.Cuda()))
    before = run(decode, model, PROMPTS, noise, set())
    recorded = dict(decoder.run._recorded)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = run(decode, model, PROMPTS, noise, set())
    assert decoder.run._recorded == recorded and after.ids != before.ids
    same(after, run(native.decode, model, PROMPTS, noise, set()))


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_replay_in_bfloat16(how):
    """Log-probs as of one forward over the whole row, within bfloat16."""
    model = tiny("llama").to("cuda", torch.float32 if how == "autocast" else torch.bfloat16)
    if how == "autocast":
        model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
    decode, decoder = by_steps(graphs.Graphs(graphs.Cuda()))
    for _ in range(2):
        found = run(decode, model, PROMPTS, noise_of(PROMPTS, 40), {11}, temperature=1.0, top_p=1.0)
        assert gap_to_own_logps(model, found) < 0.08
    assert decoder.run.failure is None and decoder.run._recorded


def test_a_step_never_waits_for_the_device():
    model, noise = tiny("llama").to("cuda", torch.float64), noise_of(PROMPTS, 12)

    class Strict(Eager):
        def __call__(self, shape, step):
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    for top_p in (1.0, 0.9):
        found = run(by_steps(Strict())[0], model, PROMPTS, noise, {11}, top_p=top_p)
        same(found, run(native.decode, model, PROMPTS, noise, {11}, top_p=top_p))


def test_a_step_that_waits_for_the_device_is_given_up_with_one_line(caplog):
    """The capture breaks; the rollout goes on, and the device with it."""
    model, noise = tiny("llama").to("cuda", torch.float64), noise_of(PROMPTS, 40)
    expected = run(native.decode, model, PROMPTS, noise, {11})
    model.register_forward_pre_hook(lambda *_: torch.zeros(1, device="cuda").item() and None)
    decode, decoder = by_steps(graphs.Graphs(graphs.Cuda()))
    stream = torch.cuda.current_stream()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            same(run(decode, model, PROMPTS, noise, {11}), expected)
    assert decoder.run.failure is not None and len(caplog.messages) == 1
    assert torch.cuda.current_stream() == stream
