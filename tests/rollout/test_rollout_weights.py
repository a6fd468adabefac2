"""Linear layers packed for a rollout: the same products, taken off again."""

from __future__ import annotations

import pytest
import torch
from operations import Counting
from test_rollout import tiny

from grpo_safe import models
from grpo_safe.config import LoraConfig
from grpo_safe.rollout.weights import packed_linears


def test_packed_linears_pack_what_they_can_and_come_off_after_an_error():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 9, bias=False), torch.nn.Linear(9, 3).double())
    x = torch.randn(4, 14)[:, ::2]  # not contiguous
    with torch.no_grad():
        expected = [model[0](x), model[1](model[0](x))]
        with pytest.raises(RuntimeError, match="stop"), packed_linears(model):
            assert ["forward" in vars(layer) for layer in model] == [True, True, False]
            assert torch.allclose(model[0](x), expected[0], atol=1e-6)
            assert torch.allclose(model[1](model[0](x[None]))[0], expected[1], atol=1e-6)
            raise RuntimeError("stop")
    assert not any("forward" in vars(layer) for layer in model)


@pytest.mark.parametrize("lora", [True, False])
def test_layers_of_one_input_are_multiplied_once_and_keep_nothing(lora):
    model = tiny("qwen2")  # biases on q, k and v alone
    if lora:
        model = models.add_lora(model, LoraConfig(r=2), "CAUSAL_LM")
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    layers = {name.rsplit(".", 1)[1]: m for name, m in model.named_modules() if ".layers.0." in name and name.endswith("_proj")}
    assert set(layers) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    a, b = torch.randn(2, 3, 5, layers["q_proj"].in_features)
    with torch.no_grad():
        expected = {name: [layers[name](x) for x in (a, b)] for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
        with packed_linears(model), Counting() as seen:
            for order in (("q_proj", "k_proj", "v_proj"), ("v_proj", "q_proj", "k_proj"), ("up_proj", "gate_proj")):
                for number, x in enumerate(
                    (a, b, a)
                ):  # a tensor that comes again is multiplied again: it may have been written to
                    for name in order:
                        assert torch.allclose(layers[name](x), expected[name][number % 2], atol=1e-5)
            assert seen.of(torch.ops.mkldnn._linear_pointwise.default) == 9
            for name, x, number in (("q_proj", a, 0), ("q_proj", b, 1), ("k_proj", a, 0), ("k_proj", b, 1), ("v_proj", b, 1)):
                assert torch.allclose(layers[name](x), expected[name][number], atol=1e-5)  # not all read one tensor
