"""How much of an adapter a rollout in bfloat16 does not see; without vLLM."""

from __future__ import annotations

import pytest
import torch

from grpo_safe import models
from grpo_safe.config import LoraConfig
from grpo_safe.rollout import vllm


def test_the_share_of_adapted_weights_that_round_away_is_said_once() -> None:
    start = models.resolve_start("embedded:tiny-llama", None, False, "x")
    policy = models.add_lora(models.load_causal_lm(start, "bfloat16"), LoraConfig(r=4), "CAUSAL_LM")
    lm = policy.get_base_model()
    assert vllm.rounded_away(lm, torch.bfloat16) == 0.0  # B is 0: nothing is changed yet
    said: list[str] = []
    engine = vllm.Colocated(None, 0.2, False, said.append, torch.bfloat16)
    engine.tell_rounding(policy)
    assert said == []
    shares = []
    for size in (1e-5, 1e-3, 1.0):
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(size)
        shares.append(vllm.rounded_away(lm, torch.bfloat16))
        engine.tell_rounding(policy)
    assert shares[0] > 0.8 > shares[1] > shares[2] >= 0 and shares[2] < 0.05
    assert vllm.rounded_away(lm, torch.float32) == pytest.approx(0.0)
    assert len(said) == 1 and f"in bfloat16, {shares[0]:.0%} of the weights" in said[0]
