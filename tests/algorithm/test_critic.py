"""PPO's token rewards, GAE and loss against loops over floats; the value head on both forward paths."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_safe.algorithm.critic import gae, ppo, token_rewards
from grpo_safe.algorithm.losses import Denominators
from grpo_safe.forward import policy_forward, policy_outputs
from grpo_safe.records import PolicyOutputs, TrainBatch


def ragged(seed: int, n: int = 5, width: int = 6) -> tuple[torch.Generator, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (n,), generator=g)
    lengths[0] = 0  # left out altogether
    return g, (torch.arange(width) < lengths[:, None]).long()


def random(g: torch.Generator, mask: torch.Tensor) -> torch.Tensor:
    return torch.randn(mask.shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_token_rewards_and_gae_equal_the_loop(seed: int) -> None:
    g, mask = ragged(seed)
    logps, ref, values, rewards = (
        random(g, mask),
        random(g, mask),
        random(g, mask),
        torch.rand(5, generator=g, dtype=torch.float64),
    )
    shaped = token_rewards(rewards, logps, ref, mask, 0.3)
    found = gae(shaped, values, mask, 0.9, 0.8)
    for i in range(5):
        length = int(mask[i].sum())
        r = [-0.3 * float(logps[i, t] - ref[i, t]) + (float(rewards[i]) if t == length - 1 else 0.0) for t in range(length)]
        assert shaped[i].tolist() == pytest.approx(r + [0.0] * (6 - length), abs=1e-12)
        v = [*values[i, :length].tolist(), 0.0]
        delta = [r[t] + 0.9 * v[t + 1] - v[t] for t in range(length)]
        expected = [sum((0.9 * 0.8) ** (u - t) * delta[u] for u in range(t, length)) for t in range(length)]
        assert found[i].tolist() == pytest.approx(expected + [0.0] * (6 - length), abs=1e-12)


def test_with_lambda_1_the_return_is_the_sum_of_what_comes() -> None:
    g, mask = ragged(7)
    rewards, values = random(g, mask) * mask, random(g, mask) * mask
    returns = gae(rewards, values, mask, 1.0, 1.0) + values
    expected = rewards.flip(-1).cumsum(-1).flip(-1) * mask
    assert torch.allclose(returns, expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_the_loop(seed: int) -> None:
    g, mask = ragged(seed)
    logps, old, advantages, values, before, returns, entropy = (random(g, mask) for _ in range(7))
    ids = torch.ones_like(mask)
    batch = TrainBatch(ids, ids, ids, mask, mask.sum(1), old, advantages, old, None, None, before, returns)
    logps, values = logps.requires_grad_(), values.requires_grad_()
    loss, sums = ppo(0.2, 0.3, 0.4, 0.5, entropy_coef=0.1).function(
        PolicyOutputs(logps, entropy, values), batch, Denominators(5.0, 11.0)
    )
    expected = value_sum = 0.0
    for i in range(5):
        for t in range(int(mask[i].sum())):
            ratio = float((logps[i, t].detach() - old[i, t]).exp())
            a = float(advantages[i, t])
            v, v0, ret = float(values[i, t].detach()), float(before[i, t]), float(returns[i, t])
            held = v0 + min(0.4, max(-0.4, v - v0))
            value_loss = max((v - ret) ** 2, (held - ret) ** 2) / 2
            expected += (-min(ratio * a, min(1.3, max(0.8, ratio)) * a) + 0.5 * value_loss - 0.1 * float(entropy[i, t])) / 11
            value_sum += value_loss
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    assert float(sums["value_loss"]) == pytest.approx(value_sum, rel=1e-12)
    loss.backward()
    assert logps.grad[0].abs().sum() == 0 and values.grad[0].abs().sum() == 0 and values.grad.abs().sum() > 0


def test_values_of_the_packed_path_equal_the_plain_ones() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    paths = [policy_forward(copy.deepcopy(model), packed, critic=True).double() for packed in (True, False)]
    torch.nn.init.normal_(paths[0].value.weight)
    paths[1].value.load_state_dict(paths[0].value.state_dict())
    lengths = torch.tensor([3, 1, 4, 2])
    prompts = torch.tensor([[0, 5, 6], [0, 5, 6], [7, 8, 9], [7, 8, 9]])
    inside = (torch.arange(4) < lengths[:, None]).long()
    batch = TrainBatch(
        prompts, (prompts > 0).long(), torch.randint(1, 50, (4, 4)) * inside, inside, lengths, inside.double(), torch.ones(4)
    )
    found = [policy_outputs(path, batch, 0.7) for path in paths]
    assert found[0].values.shape == (4, 4) and (found[0].values * inside).abs().sum() > 0.1
    assert torch.allclose(found[0].values * inside, found[1].values * inside, atol=1e-9)
    assert torch.allclose(found[0].logps * inside, found[1].logps * inside, atol=1e-9)
