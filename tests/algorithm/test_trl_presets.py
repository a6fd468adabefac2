"""Presets of conf/algo, built as a run builds them, against TRL 1.16's trainers: loss, gradient and advantages."""

from __future__ import annotations

import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_trl_parity import GROUP, TEMPERATURE, Trl

from grpo_safe.algorithm.comparison import StepScores, compare
from grpo_safe.algorithm.losses import Denominators
from grpo_safe.algorithm.penalties import kl_penalty
from grpo_safe.cli import conf_dir
from grpo_safe.config import AlgoConfig
from grpo_safe.forward import PlainForward, policy_outputs
from grpo_safe.records import TrainBatch
from grpo_safe.rewards import Objectives
from grpo_safe.stages.train_policy.method import Method, build_method

MAX_TOKENS = 16
WEIGHTS = [0.6, -0.4]  # linear divides by the sum of their sizes, TRL does not
DELTA = {"loss": {"name": "clip", "delta": 1.3}}

# preset -> (changes of it, what it is in TRL)
SAME = {
    "grpo": ({}, {"loss_type": "grpo", "beta": 0.04}),
    "grpo with delta": (DELTA, {"loss_type": "grpo", "beta": 0.04, "delta": 1.3}),
    "bnpo": ({}, {"loss_type": "bnpo", "beta": 0.04}),
    "bnpo with entropy": ({"entropy_coef": 0.1}, {"loss_type": "bnpo", "beta": 0.04, "entropy_coef": 0.1}),
    "dr_grpo": ({}, {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "max_completion_length": MAX_TOKENS}),
    "dapo": ({}, {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.0}),
    "lite_ppo": ({}, {"loss_type": "dapo", "scale_rewards": "batch", "beta": 0.0}),
    "cispo": ({}, {"loss_type": "cispo", "epsilon_high": 5.0, "scale_rewards": "batch", "beta": 0.0}),
    "cispo with 1.1": ({"loss": {"name": "cispo", "eps_max": 1.1}}, {"loss_type": "cispo", "epsilon_high": 1.1, "scale_rewards": "batch", "beta": 0.0}),
    "gspo": ({}, {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.0}),
    "gdpo": ({}, {"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum", "beta": 0.04}),
}  # fmt: skip


def ours(preset: str, changes: dict, max_tokens: int = MAX_TOKENS) -> tuple[Method, AlgoConfig]:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose(config_name="train_policy", overrides=[f"algo={preset.split()[0]}"])
    numbers = OmegaConf.to_container(composed.algo, resolve=True)
    algo = AlgoConfig(**{**numbers, "group_size": GROUP, **changes})
    objectives = Objectives(["safety", "length"], WEIGHTS, [0, 1], [None, None])
    return build_method(algo, objectives, {"safety": "absolute", "length": "absolute"}, max_tokens), algo


@pytest.fixture(scope="module", params=SAME)
def both(request, tmp_path_factory):
    changes, theirs = SAME[request.param]
    folder = tmp_path_factory.mktemp("trl")
    return request.param, Trl(folder, reward_weights=WEIGHTS, **theirs), *ours(request.param, changes)


def drawn_batch(seed: int) -> TrainBatch:
    g = torch.Generator().manual_seed(seed)
    n, p, c = 8, 5, 6
    prompt_mask = (torch.arange(p) >= torch.randint(0, p, (n, 1), generator=g)).long()
    mask = (torch.arange(c) < torch.tensor([6, 1, 0, 3, 2, 5, 4, 6])[:, None]).long()
    ids = torch.randint(3, 61, (n, c), generator=g) * mask
    prompts = torch.randint(3, 61, (n, p), generator=g) * prompt_mask
    return TrainBatch(prompts, prompt_mask, ids, mask, mask.sum(1), torch.zeros(n, c), torch.randn(n, generator=g))


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_of_the_preset(both, seed, with_old) -> None:
    name, trl, method, algo = both
    trl.model.zero_grad()
    trl.ours.zero_grad()
    batch = drawn_batch(seed)
    mask = batch.completion_mask
    inputs = {n: getattr(batch, n) for n in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")}
    inputs["num_items_in_batch"] = mask.sum()
    outputs = policy_outputs(PlainForward(trl.ours), batch, TEMPERATURE, method.loss.entropy)
    near, g = outputs.logps.detach(), torch.Generator().manual_seed(100 + seed)
    if with_old:
        inputs["old_per_token_logps"] = batch.old_logps = near + (2e-3 if name == "gspo" else 0.3) * torch.randn(
            mask.shape, generator=g
        )
    if algo.kl_coef:
        inputs["ref_per_token_logps"] = batch.ref_logps = near + 0.5 * torch.randn(mask.shape, generator=g)
    theirs = trl.trainer._compute_loss(trl.model, inputs)
    theirs.backward()
    value, sums = method.loss.function(outputs, batch, Denominators(float(len(batch)), float(mask.sum())))
    value.backward()
    assert float(value.detach()) == pytest.approx(float(theirs.detach()), rel=1e-4, abs=1e-5)
    if name not in ("cispo", "grpo with delta"):
        assert (float(sums["clipped"]) > 0) == with_old
    expected = dict(trl.model.named_parameters())
    for parameter_name, parameter in trl.ours.named_parameters():
        wanted = expected[parameter_name].grad
        assert wanted.norm() > 0
        assert (parameter.grad - wanted).norm() <= 2e-4 * wanted.norm(), parameter_name


def completions_of(trl: Trl, values: torch.Tensor, mask: torch.Tensor) -> tuple[list, list]:
    trl.rewards = [[float(v) if m else None for v, m in zip(values[:, k], mask[:, k], strict=True)] for k in range(2)]
    return [[5, 6, 7]] * GROUP + [[8]] * GROUP, [[3, 4, 2], [5], [6, 7], [8, 9, 10, 11]] * 2


def drawn_scores(seed: int, whole_rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of two groups, the second with other level and spread; some completions without a score."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(8, 2, generator=g) * torch.tensor([[1.0]] * 4 + [[3.0]] * 4) + 2
    mask = torch.ones(8, 2, dtype=torch.bool)
    if seed:
        mask[[1, 6]] = False
    if seed == 2:
        mask[[4, 5]] = False  # one left in the second group
    if not whole_rows and seed:
        mask[2, 1] = mask[7, 0] = False
    return values, mask


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_advantages_of_the_preset(both, seed) -> None:
    """TRL adds the scores that are there; with aggregate_first a completion that lacks one is left out, so only whole rows compare."""
    name, trl, method, _ = both
    values, mask = drawn_scores(seed, whole_rows=name != "gdpo")
    prompts, ids = completions_of(trl, values, mask)
    trl.trainer.rollout_func = lambda prompts_, trainer: {"prompt_ids": prompts, "completion_ids": ids, "logprobs": None}
    out = trl.trainer._generate_and_score_completions([{"prompt": "a"}] * GROUP + [{"prompt": "b"}] * GROUP)
    assert float(out["num_items_in_batch"]) == 20
    scores = StepScores(values, mask, torch.zeros(8), torch.zeros(8))
    found = compare(method.order, method.slots, scores, torch.tensor(WEIGHTS), {}).groups.advantages
    assert float(found.abs().max()) > 0.1
    assert torch.allclose(found, out["advantages"], atol=2e-5)
    assert bool((found[~mask.any(1)] == 0).all())


@pytest.fixture(scope="module")
def rloo(tmp_path_factory):
    trl = Trl(tmp_path_factory.mktemp("rloo"), "RLOO", reward_weights=WEIGHTS, beta=0.03)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trl.trainer.ref_model.parameters():  # else the KL is 0
            parameter.add_(0.05 * torch.randn_like(parameter))
    return trl


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rloo_advantages_with_the_kl_in_the_reward_and_the_gradient(rloo, seed) -> None:
    values, mask = drawn_scores(seed, whole_rows=True)
    prompts, ids = completions_of(rloo, values, mask)
    rloo.trainer._generate = lambda prompts_: (prompts, ids, ["x"] * 8)
    out = rloo.trainer._generate_and_score_completions([{"prompt": "a"}] * GROUP + [{"prompt": "b"}] * GROUP)
    rows = {n: out[n] for n in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    method, algo = ours("rloo", {}, max_tokens=1)  # the sum over tokens, as TRL: the preset divides it by max_new_tokens
    batch = TrainBatch(**rows, lengths=rows["completion_mask"].sum(1), sampler_logps=torch.zeros(8, 4), advantages=torch.zeros(8))
    outputs = policy_outputs(PlainForward(rloo.ours), batch, TEMPERATURE, method.loss.entropy)
    with torch.no_grad():
        ref_logps = policy_outputs(PlainForward(rloo.trainer.ref_model), batch, TEMPERATURE).logps
    assert method.reward_kl is not None and algo.kl_coef == 0.03
    kl = kl_penalty(outputs.logps.detach(), ref_logps, batch.completion_mask, method.reward_kl)
    assert float(kl.abs().max()) > 0.05
    scores = StepScores(values, mask, -algo.kl_coef * kl, torch.zeros(8))
    found = compare(method.order, method.slots, scores, torch.tensor(WEIGHTS), {}).groups.advantages
    assert torch.allclose(found, out["advantages"], atol=2e-5)

    rloo.model.zero_grad()
    rloo.ours.zero_grad()
    rloo.trainer._compute_loss(rloo.model, out).backward()
    batch.advantages = found
    value, _ = method.loss.function(outputs, batch, Denominators(8.0, math.nan))
    value.backward()
    for name, parameter in rloo.ours.named_parameters():
        wanted = dict(rloo.model.named_parameters())[name].grad
        assert wanted.norm() > 0
        assert (parameter.grad - wanted).norm() <= 2e-4 * wanted.norm(), name
