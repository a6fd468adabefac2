"""The packed path against the plain one: every architecture that it is proven for, every shape of batch, LoRA, checkpointing, dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operations import Counting, Largest
from test_forward import VOCAB, batch_of, tiny
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_safe import models
from grpo_safe.config import LoraConfig
from grpo_safe.forward import PackedForward, PlainForward, head, packed, policy_forward, policy_outputs, why_not_packed

SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip
NO_DROPOUT = (
    "attention_dropout",
    "residual_dropout",
    "embedding_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)
OWN = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
}


def small(name: str, dtype=torch.float64, **more):
    if name == "gpt2":
        return tiny("gpt2", dtype)
    torch.manual_seed(1)
    config = AutoConfig.for_model(name, **SHAPE, **OWN.get(name, {}), **dict.fromkeys(NO_DROPOUT, 0.0), **more)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def grouped(sizes: tuple[int, ...] = (3, 1, 2, 4), longest: int = 6, seed: int = 0):
    """Groups of these sizes: ragged prompts, ragged completions, one of them a single token."""
    rng = np.random.default_rng(seed)
    prompts, completions = [], []
    for size in sizes:
        prompt = rng.integers(0, VOCAB, rng.integers(1, 9)).tolist()
        for _ in range(size):
            prompts.append(prompt)
            completions.append(rng.integers(0, VOCAB, rng.integers(1, longest + 1)).tolist())
    completions[1 % len(completions)] = [7]
    return batch_of(prompts, completions)


def passed(path, batch, entropy: str = "kept"):
    """Log-probs, entropies (inside the completions), and gradients of a loss that weighs every row differently."""
    outputs = policy_outputs(path, batch, 0.7, entropy)
    mask = batch.completion_mask
    loss = outputs.logps * torch.linspace(-1, 1, len(batch))[:, None]
    loss = loss + 0.3 * outputs.entropy if entropy == "kept" else loss
    (loss * mask).sum().backward()
    gradients = {name: p.grad.clone() for name, p in path.model.named_parameters() if p.requires_grad}
    path.zero_grad()
    return outputs.logps.detach() * mask, outputs.entropy.detach() * mask, gradients


def assert_equal(model, batch, entropy: str = "kept", logps: float = 1e-9, gradient: float = 1e-6):
    """1e-6: transformers' RMSNorm computes in float32 whatever the model's dtype (traps: 15)."""
    (a, a_entropy, a_grad), (b, b_entropy, b_grad) = (
        passed(path(model), batch, entropy) for path in (PlainForward, PackedForward)
    )
    assert (a - b).abs().max() <= logps
    assert (a_entropy - b_entropy).abs().max() <= logps
    assert a_grad.keys() == b_grad.keys()
    for name in a_grad:
        assert (a_grad[name] - b_grad[name]).norm() <= gradient * a_grad[name].norm() + 1e-12, name


@pytest.mark.parametrize("name", packed.PROVEN)
def test_equals_the_plain_path(name):
    model = small(name)
    assert why_not_packed(model) is None
    assert_equal(model, grouped())


@pytest.mark.parametrize("name", ["gpt2", "starcoder2"])
def test_gradients_are_exact_where_the_library_keeps_float64(name):
    assert_equal(small(name), grouped(), gradient=1e-12)


@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (8,), (2, 5)])
@pytest.mark.parametrize("longest", [1, 2, 9])
def test_any_shape_of_groups(sizes, longest):
    assert_equal(small("llama"), grouped(sizes, longest))


def test_two_groups_with_the_same_prompt_may_share_it():
    batch = batch_of([[3, 4, 5]] * 4 + [[9]] + [[3, 4, 5]], [[1, 2], [3], [4, 5, 6], [7], [8, 9], [10]])
    assert_equal(small("llama"), batch)


def test_rows_out_of_the_loss_and_empty_completions():
    batch = grouped()
    batch.lengths[2] = batch.completion_mask[2] = 0  # nothing was sampled
    batch.completion_mask[5] = 0  # left out of the loss, yet its tokens are there
    assert_equal(small("qwen2"), batch)
    outputs = policy_outputs(PackedForward(small("qwen2")), batch, 1.0)
    assert outputs.logps[2].abs().max() == 0
    assert outputs.logps[5, 0] != 0


@pytest.mark.parametrize("entropy", ["kept", "detached"])
@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 10**6])
def test_chunks_of_positions_change_nothing(entropy, chunk, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    assert_equal(small("llama"), grouped(), entropy)


@pytest.mark.parametrize("entropy", ["kept", "detached"])
def test_lora_with_and_without_its_adapter(entropy):
    model = models.add_lora(small("llama"), LoraConfig(r=4), "CAUSAL_LM").to(torch.float64)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    assert_equal(model, grouped(), entropy)
    batch, forward = grouped(), policy_forward(model, True)
    with torch.no_grad():
        adapted = policy_outputs(forward, batch, 1.0).logps
        with models.adapter_off(model):
            found, expected = (policy_outputs(path, batch, 1.0).logps for path in (forward, PlainForward(model)))
    mask = batch.completion_mask
    assert ((found - expected) * mask).abs().max() <= 1e-9
    assert ((found - adapted) * mask).abs().max() > 1e-3


CHEAP = (
    torch.ops.aten.rsqrt.default,
    torch.ops.aten.silu.default,
    torch.ops.aten.tanh.default,
)  # of norms and activation functions


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("how", ["selective", True])
@pytest.mark.parametrize("lora", [True, False])
def test_gradient_checkpointing(name, how, lora):
    results, ran = [], []
    for way in (False, how):
        model = small(name).train()
        if lora:
            torch.manual_seed(2)
            model = models.add_lora(model, LoraConfig(r=4), "CAUSAL_LM").to(torch.float64)
        models.checkpoint_activations(model, way)
        assert_equal(model, grouped())
        with Counting() as seen:
            results.append(passed(PackedForward(model), grouped(), "detached"))
        ran.append(seen)
    (logps, _, gradients), (again, _, gradients_again) = results
    assert torch.equal(logps, again)
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.equal(g, gradients_again[n]) for n, g in gradients.items())
    products, others = ([seen.of(*functions) for seen in ran] for functions in (models.KEPT, CHEAP))
    assert (products[1] > products[0]) == (how is True)  # selective computes no product twice,
    assert others[1] > others[0]  # but it computes something twice


def test_bfloat16_is_as_close_to_float64_as_the_plain_path():
    batch = grouped((8, 8))
    exact, *_ = passed(PlainForward(small("llama")), batch)
    gaps = [
        (passed(path(small("llama", torch.bfloat16)), batch)[0] - exact).abs().mean() for path in (PlainForward, PackedForward)
    ]
    assert gaps[1] <= 1.2 * gaps[0]


@pytest.mark.parametrize("entropy", ["kept", "detached"])
def test_autocast_keeps_the_softmax_in_float32(entropy):
    batch = grouped((8, 8))
    results = []
    for path in (PlainForward, PackedForward):
        forward = path(small("llama", torch.float32))
        forward.forward = torch.autocast("cpu", torch.bfloat16)(forward.forward)
        results.append(passed(forward, batch, entropy))
    (a, _, a_grad), (b, _, b_grad) = results
    assert b.dtype == torch.float32
    assert ((a - b).norm() / a.norm()) < 0.02
    for name in a_grad:
        assert b_grad[name].dtype == torch.float32
        assert (a_grad[name] - b_grad[name]).norm() <= 0.1 * a_grad[name].norm(), name


def test_sampling_and_generate_see_plain_sdpa():
    model, other = small("llama", torch.float32).eval(), small("llama", torch.float32).eval()
    PackedForward(model)
    ids, mask = torch.randint(0, VOCAB, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, other(ids, attention_mask=mask).logits)
        found, expected = (m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for m in (model, other))
    assert torch.equal(found, expected)


def test_what_is_not_proven_takes_the_plain_path():
    eager, longrope = small("llama"), small("llama")
    eager.set_attn_implementation("eager")
    longrope.config.rope_parameters["rope_type"] = "longrope"
    windowed = small("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    adapted = models.add_lora(small("llama"), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), "CAUSAL_LM")
    for model, says in (
        (small("cohere"), "cohere is not among"), (windowed, "slides over 4 tokens"), (eager, "attn_implementation is eager"),
        (longrope, "rotary embedding"), (adapted, "LM head is adapted"),
    ):  # fmt: skip
        assert says in (why_not_packed(model) or "")
        assert isinstance(policy_forward(model, True), PlainForward)
    assert isinstance(policy_forward(small("llama"), True), PackedForward)
    assert isinstance(policy_forward(small("llama"), False), PlainForward)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("entropy", ["kept", "detached"])
def test_memory_of_the_head_does_not_grow_with_the_vocabulary(learns, entropy, monkeypatch):
    """The largest tensor that the head makes, at two vocabularies; the logits [m, V] of all positions would be larger."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 2**16)
    largest = []
    for vocab in (1000, 4000):
        layer = nn.Linear(4, vocab, bias=False).requires_grad_(learns)
        hidden, targets = torch.randn(512, 4, requires_grad=True), torch.randint(vocab, (512,))
        with Largest() as seen:
            logps, entropies, _ = head.HeadLogps(layer)(hidden, targets, 0.7, entropy)
            (logps.sum() + (entropies.sum() if entropy == "kept" else 0.0)).backward()
        largest.append(seen.elements)
        assert seen.elements <= head.CHUNK_ELEMENTS < 512 * vocab / 4
    assert largest[1] <= 1.01 * largest[0]


@pytest.mark.parametrize("learns", ["lora", "all"])
def test_memory_of_the_whole_path_does_not_grow_with_the_vocabulary_times_the_completions(learns, monkeypatch):
    """Forward and backward of a model at two vocabularies and two lengths: what is kept for the backward pass, beside the weights, grows with
    the tokens only; no tensor but the weights' own and attention's mask is larger than a chunk. The plain path, measured the same way, does hold [N, C, V].
    """
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 2**13)
    kept, plain_kept = {}, {}
    for vocab, tokens in ((1000, 24), (4000, 24), (1000, 48), (4000, 48)):
        for path, into in ((PackedForward, kept), (PlainForward, plain_kept)):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**SHAPE, "vocab_size": vocab}))
            model = models.add_lora(model, LoraConfig(r=4), "CAUSAL_LM") if learns == "lora" else model
            forward, weights = path(model.train()), {p.data_ptr() for p in model.parameters()}
            bytes_of = {}

            def keep(tensor, weights=weights, bytes_of=bytes_of):
                if tensor.data_ptr() not in weights:
                    bytes_of[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
                return tensor

            batch = batch_of([[1, 2, 3, 4]] * 8, [[5] * tokens] * 8)
            with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                policy_outputs(forward, batch, 1.0, "detached").logps.sum().backward()
            into[vocab, tokens] = sum(bytes_of.values())
            if path is PackedForward:
                mask = 2 * 8 * tokens * (4 + tokens)  # of attention, the heads that share a key head folded
                assert seen.elements <= max(head.CHUNK_ELEMENTS, vocab * SHAPE["hidden_size"], mask) < 8 * tokens * vocab / 4
            else:
                assert seen.elements >= 8 * tokens * vocab
    for tokens in (24, 48):
        assert kept[4000, tokens] == kept[1000, tokens]
        assert plain_kept[4000, tokens] - plain_kept[1000, tokens] >= 4 * 8 * tokens * 3000
    assert kept[1000, 24] < kept[1000, 48] < 4.5 * kept[1000, 24]  # attention's masks grow with the square
