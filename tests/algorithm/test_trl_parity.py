"""The same tensors through TRL 1.16's GRPOTrainer and through ours: advantages, log-probs, loss and gradient."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from grpo import grpo_loss

from grpo_safe.algorithm.advantages import group_advantages
from grpo_safe.algorithm.aggregation import known_scores, total
from grpo_safe.algorithm.losses import Denominators
from grpo_safe.forward import PackedForward, policy_outputs
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.records import TrainBatch

TEMPERATURE, BETA, GROUP = 0.7, 0.05, 4
WEIGHTS = [1.0, -0.5]


class Trl:
    """A GRPOTrainer (or RLOOTrainer) around a tiny model, fed by hand."""

    def __init__(self, folder, kind: str = "GRPO", **changes) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import trl as library
        from datasets import Dataset
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            initializer_range=0.4,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        self.model = LlamaForCausalLM.from_pretrained(folder / "model")
        self.ours = copy.deepcopy(self.model).eval()  # before TRL puts its own LM head on the model
        self.rewards: list[list[float | None]] = []

        def first(completions, **_):
            return self.rewards[0]

        def second(completions, **_):
            return self.rewards[1]

        chosen = {
            "report_to": "none", "use_cpu": True, "bf16": False, "beta": BETA, "epsilon": 0.2, "num_generations": GROUP,
            "per_device_train_batch_size": 8, "temperature": TEMPERATURE, "gradient_checkpointing": False, "reward_weights": WEIGHTS,
        }  # fmt: skip
        if kind == "GRPO":
            chosen |= {"loss_type": "grpo", "use_bias_correction_kl": False}
        args = getattr(library, f"{kind}Config")(str(folder / "out"), **{**chosen, **changes})
        tokenizer = AutoTokenizer.from_pretrained(embedded_folder("embedded:tiny-llama"))
        data = Dataset.from_dict({"prompt": ["p"] * 8})
        trainer_class = getattr(library, f"{kind}Trainer")
        self.trainer = trainer_class(self.model, [first, second], args, data, processing_class=tokenizer)
        self.trainer.current_gradient_accumulation_steps = 1
        self.model.train()


@pytest.fixture(scope="module")
def trl(tmp_path_factory) -> Trl:
    return Trl(tmp_path_factory.mktemp("trl"))


def inputs_of(seed: int, with_old: bool) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    n, p, c = 8, 5, 6
    prompt_mask = (torch.arange(p) >= torch.randint(0, p, (n, 1), generator=g)).long()
    completion_mask = (torch.arange(c) < torch.tensor([6, 1, 0, 3, 2, 5, 4, 6])[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(3, 61, (n, p), generator=g) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, 61, (n, c), generator=g) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.randn(n, generator=g),
        "ref_per_token_logps": -4 + 0.5 * torch.randn(n, c, generator=g),
    }
    if with_old:
        inputs["old_per_token_logps"] = -4 + 1.5 * torch.randn(n, c, generator=g)
    return inputs


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_equal_trl(trl, seed, with_old):
    inputs = inputs_of(seed, with_old)
    trl.model.zero_grad()
    trl.ours.zero_grad()
    theirs = trl.trainer._compute_loss(trl.model, inputs)
    theirs.backward()

    mask = inputs["completion_mask"]
    batch = TrainBatch(
        inputs["prompt_ids"], inputs["prompt_mask"], inputs["completion_ids"], mask, mask.sum(1), torch.zeros(mask.shape),
        inputs["advantages"], inputs.get("old_per_token_logps"), inputs["ref_per_token_logps"],
    )  # fmt: skip
    outputs = policy_outputs(PackedForward(trl.ours), batch, TEMPERATURE, "detached")
    ours, sums = grpo_loss(0.2, BETA, 0.0)(outputs, batch, Denominators(float(len(batch)), float(mask.sum())))
    ours.backward()

    assert abs(float(ours.detach())) > 1e-3
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    assert (float(sums["clipped"]) > 0) == with_old
    theirs_grads = dict(trl.model.named_parameters())
    for name, parameter in trl.ours.named_parameters():
        expected = theirs_grads[name].grad
        assert expected.norm() > 0
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name
    metrics = trl.trainer._metrics["train"]
    assert float(sums["kl"] / mask.sum()) == pytest.approx(metrics["kl"][-1], rel=1e-4)
    assert float(sums["entropy"] / mask.sum()) == pytest.approx(metrics["entropy"][-1], rel=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_advantages_equal_trl(trl, seed):
    """TRL's own step from completions and rewards on: missing scores, two weighted rewards, a group with one score left."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(8, 2, generator=g)
    masked = [2, 5] if seed else [4, 5, 7]  # the whole completion has no score
    trl.rewards = [[None if i in masked else float(scores[i, k]) for i in range(8)] for k in range(2)]
    ids = [[3, 4, 2], [5], [6, 7], [8, 9, 10, 11]] * 2
    prompts = [[5, 6, 7]] * GROUP + [[8]] * GROUP
    trl.trainer.rollout_func = lambda prompts_, trainer: {"prompt_ids": prompts, "completion_ids": ids, "logprobs": None}
    out = trl.trainer._generate_and_score_completions([{"prompt": "a"}] * GROUP + [{"prompt": "b"}] * GROUP)

    mask = torch.ones(8, 2, dtype=torch.bool)
    mask[masked] = False
    values, valid = known_scores(scores, mask, torch.tensor(WEIGHTS))
    rewards = total(values, valid, torch.tensor(WEIGHTS), {}).rewards
    found = group_advantages(rewards, valid, GROUP, tau=0.0, tie_spread=0.0).advantages
    assert float(out["advantages"].abs().max()) > 0.5
    assert torch.allclose(found, out["advantages"], atol=1e-5)
    assert found[masked].tolist() == [0.0] * len(masked)
    # and the reference's log-probs of the same rows, which a KL term sees
    rows = {name: out[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    batch = TrainBatch(**rows, lengths=rows["completion_mask"].sum(1), sampler_logps=out["ref_per_token_logps"], advantages=found)
    with torch.no_grad():
        logps = policy_outputs(PackedForward(trl.ours), batch, TEMPERATURE).logps
    assert torch.allclose(logps * batch.completion_mask, out["ref_per_token_logps"], atol=1e-4)
