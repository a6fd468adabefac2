"""Both paths of policy_outputs against the sampling engine, against a forward of each row alone, and whatever the padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Categorical
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpo_safe.algorithm.sampling import completion_noise
from grpo_safe.config import SamplingConfig
from grpo_safe.forward import PackedForward, PlainForward, policy_outputs
from grpo_safe.records import TrainBatch
from grpo_safe.rollout import native
from grpo_safe.rollout.engine import left_padded

VOCAB = 61


@pytest.fixture(params=[PlainForward, PackedForward])
def path(request):
    return request.param


def tiny(name: str, dtype=torch.float32):
    torch.manual_seed(1)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
        "initializer_range": 0.3,
    }  # fmt: skip
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=None,
            eos_token_id=None, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).to(dtype)
    model = LlamaForCausalLM(LlamaConfig(**shape)) if name == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    return model.to(dtype)


def batch_of(prompts: list[list[int]], completions: list[list[int]], logps: list[list[float]] | None = None) -> TrainBatch:
    prompt_ids, prompt_mask = left_padded(prompts, 0)
    width = max(map(len, completions))
    ids, mask = torch.zeros(len(completions), width, dtype=torch.long), torch.zeros(len(completions), width)
    sampler = torch.zeros(len(completions), width)
    for i, row in enumerate(completions):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        if logps is not None:
            sampler[i, : len(row)] = torch.tensor(logps[i])
    lengths = mask.sum(1).long()
    return TrainBatch(prompt_ids, prompt_mask, ids, mask.long(), lengths, sampler, torch.zeros(len(completions)))


def ragged(seed: int = 0, n: int = 6) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(seed)
    return tuple([rng.integers(0, VOCAB, rng.integers(1, 9)).tolist() for _ in range(n)] for _ in range(2))


def plain_logits(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """[len(completion), V]: the row alone, without padding, mask, positions or logits_to_keep."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_those_of_the_sampler_before_any_update(path, name, temperature):
    model = tiny(name).eval()
    prompts = [[5, 9, 17, 33, 2, 8, 41], [7], [12, 3, 3, 50]]
    noise = np.stack([completion_noise(0, 1, str(p), g, 12) for p in prompts for g in range(3)])
    sampling = SamplingConfig(max_new_tokens=12, temperature=temperature, top_p=0.95)
    with torch.no_grad():
        decoded = native.decode(model, prompts, noise, 3, sampling, {7, 11, 23}, 0)
    batch = batch_of([p for p in prompts for _ in range(3)], decoded.ids, decoded.logps)
    assert len(set(batch.lengths.tolist())) > 1
    model.train()  # as in the update; there is no dropout
    with torch.no_grad():
        logps = policy_outputs(path(model), batch, temperature).logps
    gap = ((logps - batch.sampler_logps) * batch.completion_mask).abs()
    assert float(gap.max()) < 1e-4
    ratio = ((logps - batch.sampler_logps) * batch.completion_mask).exp()
    assert float((ratio - 1).abs().max()) < 1e-4
    assert float(logps[batch.completion_mask.bool()].std()) > 0.3


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_equals_a_plain_forward_of_each_row(path, name):
    model = tiny(name, torch.float64).eval()
    prompts, completions = ragged()
    with torch.no_grad():
        found = policy_outputs(path(model), batch_of(prompts, completions), 0.7, "detached")
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        logits = plain_logits(model, prompt, completion) / 0.7
        expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        assert torch.allclose(found.logps[i, : len(completion)].double(), expected, atol=5e-6, rtol=0)
        entropy = Categorical(logits=logits).entropy()
        assert torch.allclose(found.entropy[i, : len(completion)].double(), entropy, atol=5e-6, rtol=0)


def test_a_float64_model_keeps_its_precision(path):
    model = tiny("llama", torch.float64).eval()
    prompts, completions = ragged()
    with torch.no_grad():
        found = policy_outputs(path(model), batch_of(prompts, completions), 0.7).logps
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        expected = torch.log_softmax(plain_logits(model, prompt, completion) / 0.7, -1)
        expected = expected.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        assert torch.allclose(found[i, : len(completion)].double(), expected, atol=1e-9, rtol=0)


def test_bfloat16_logits_are_taken_to_float32(path):
    model = tiny("llama", torch.bfloat16).eval()
    outputs = policy_outputs(path(model), batch_of(*ragged()), 1.0, "detached")
    assert outputs.logps.dtype == outputs.entropy.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_cut_padding_and_change_no_log_prob(path, name):
    model = tiny(name, torch.float64).eval()
    prompts, completions = ragged(3, 8)
    batch = batch_of(prompts, completions)
    batch.old_logps = torch.randn(batch.completion_ids.shape)
    batch.ref_logps = torch.randn(batch.completion_ids.shape)
    with torch.no_grad():
        whole = policy_outputs(path(model), batch, 1.0, "detached")
    for index in ([0], [5, 2], [7, 1, 3], list(range(8))):
        part = batch.rows(torch.tensor(index))
        assert part.prompt_ids.shape[1] == max(len(prompts[i]) for i in index)
        assert part.completion_ids.shape[1] == max(len(completions[i]) for i in index)
        with torch.no_grad():
            found = policy_outputs(path(model), part, 1.0, "detached")
        for row, i in enumerate(index):
            c = len(completions[i])
            assert part.prompt_ids[row][part.prompt_mask[row].bool()].tolist() == prompts[i]
            assert part.completion_ids[row, :c].tolist() == completions[i]
            assert torch.equal(part.old_logps[row, :c], batch.old_logps[i, :c])
            assert torch.equal(part.ref_logps[row, :c], batch.ref_logps[i, :c])
            assert torch.allclose(found.logps[row, :c], whole.logps[i, :c], atol=1e-6, rtol=0)
            assert torch.allclose(found.entropy[row, :c], whole.entropy[i, :c], atol=1e-6, rtol=0)


def test_more_padding_changes_nothing(path):
    model = tiny("gpt2", torch.float64).eval()
    batch = batch_of(*ragged(5))
    wide = batch_of(*ragged(5))
    wide.prompt_ids = torch.nn.functional.pad(wide.prompt_ids, (4, 0), value=33)
    wide.prompt_mask = torch.nn.functional.pad(wide.prompt_mask, (4, 0))
    for name in ("completion_ids", "completion_mask", "sampler_logps"):
        setattr(wide, name, torch.nn.functional.pad(getattr(wide, name), (0, 3), value=0))
    with torch.no_grad():
        narrow, padded = policy_outputs(path(model), batch, 1.0).logps, policy_outputs(path(model), wide, 1.0).logps
    mask = batch.completion_mask.bool()
    assert torch.allclose(padded[:, : mask.shape[1]][mask], narrow[mask], atol=1e-6, rtol=0)


def test_a_row_left_out_of_the_loss_keeps_its_log_probs(path):
    """The loss mask is no attention mask: sampled tokens stay visible."""
    model = tiny("llama").eval()
    batch, masked = batch_of(*ragged(2)), batch_of(*ragged(2))
    masked.completion_mask = torch.zeros_like(masked.completion_mask)
    with torch.no_grad():
        assert torch.equal(policy_outputs(path(model), batch, 1.0).logps, policy_outputs(path(model), masked, 1.0).logps)


@pytest.mark.parametrize("wanted", ["no", "detached", "kept"])
def test_entropy_has_a_gradient_only_where_the_loss_needs_it(path, wanted):
    model = tiny("llama")
    outputs = policy_outputs(path(model), batch_of(*ragged(1)), 1.0, wanted)
    assert outputs.logps.requires_grad
    assert (outputs.entropy is None) == (wanted == "no")
    if outputs.entropy is not None:
        assert outputs.entropy.requires_grad == (wanted == "kept")
        entropy = outputs.entropy.detach()
        assert float(entropy.min()) >= 0.0 and float(entropy.max()) <= np.log(VOCAB) + 1e-5


def test_gradient_of_log_probs_and_entropy_equals_the_plain_one(path):
    prompts, completions = ragged(4, 3)
    ours, plain = tiny("llama", torch.float64), tiny("llama", torch.float64)
    batch = batch_of(prompts, completions)
    outputs = policy_outputs(path(ours), batch, 0.7, "kept")
    mask = batch.completion_mask
    ((outputs.logps + 0.3 * outputs.entropy) * mask).sum().backward()
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = plain(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        logps = torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])
        (logps.sum() + 0.3 * Categorical(logits=logits).entropy().sum()).backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm()
