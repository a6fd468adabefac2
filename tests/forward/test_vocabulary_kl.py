"""What a forward gives beside log-probs: the KL over the vocabulary, the end token's log-probs, the LM head's input; against whole logits."""

from __future__ import annotations

import pytest
import torch
from operations import Largest
from test_forward import VOCAB, plain_logits
from test_packed_forward import grouped, small
from torch import nn

from grpo_safe import models
from grpo_safe.config import LoraConfig
from grpo_safe.forward import PackedForward, PlainForward, head, policy_outputs
from grpo_safe.records import Extras

TAU = 0.7


def log_softmaxes(model, batch) -> list[torch.Tensor]:
    """Per row [length, V], from a forward of each row alone."""
    rows = []
    for i in range(len(batch)):
        prompt = batch.prompt_ids[i][batch.prompt_mask[i] > 0].tolist()
        completion = batch.completion_ids[i][: int(batch.lengths[i])].tolist()
        rows.append((plain_logits(model, prompt, completion) / TAU).log_softmax(-1))
    return rows


def other(name: str):
    """The same architecture with other weights."""
    model = small(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.8)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])  # an own head, a tied one, one with a bias
@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 10**6])
def test_kl_equals_the_one_from_whole_logits(name, chunk, monkeypatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    policy, reference, batch = small(name), other(name), grouped()
    expected = [(q.exp() * (q - p)).sum(-1) for p, q in zip(*(log_softmaxes(m, batch) for m in (policy, reference)), strict=True)]
    anchor, path = PackedForward(reference).requires_grad_(False), PackedForward(policy)
    batch.ref_hidden = policy_outputs(anchor, batch, TAU, extras=Extras(hidden=True)).hidden
    found = policy_outputs(path, batch, TAU, extras=Extras(reference_head=(anchor.head.weight, anchor.head.bias))).ref_kl
    for i, row in enumerate(expected):
        assert (found[i, : len(row)] - row).abs().max() <= 1e-9 and found[i, len(row) :].abs().sum() == 0
    assert min(float(row.min()) for row in expected) > 1e-4


@pytest.mark.parametrize("name", ["gpt2", "starcoder2"])  # where the library keeps float64
@pytest.mark.parametrize("frozen_head", [False, True])
def test_gradient_of_the_kl_equals_that_of_whole_logits(name, frozen_head, monkeypatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 5 * VOCAB)
    policy, reference, batch = small(name), other(name), grouped()
    policy.get_output_embeddings().weight.requires_grad_(not frozen_head)
    anchor, path = PackedForward(reference).requires_grad_(False), PackedForward(policy)
    weights = torch.linspace(-1, 2, len(batch), dtype=torch.float64)

    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(batch)):
        prompt = batch.prompt_ids[i][batch.prompt_mask[i] > 0].tolist()
        completion = batch.completion_ids[i][: int(batch.lengths[i])].tolist()
        ids = torch.tensor([prompt + completion])
        p, q = ((m(ids).logits[0, len(prompt) - 1 : -1] / TAU).log_softmax(-1) for m in (policy, reference))
        total = total + weights[i] * (q.exp() * (q - p)).sum()
    total.backward()
    expected = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()

    batch.ref_hidden = policy_outputs(anchor, batch, TAU, extras=Extras(hidden=True)).hidden
    extras = Extras(reference_head=(anchor.head.weight, anchor.head.bias))
    (policy_outputs(path, batch, TAU, extras=extras).ref_kl * weights[:, None]).sum().backward()
    found = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for n, gradient in expected.items():
        assert (found[n] - gradient).norm() <= 1e-10 * gradient.norm() + 1e-13, n


def test_under_lora_the_policys_own_head_serves_the_reference() -> None:
    model = models.add_lora(small("llama"), LoraConfig(r=4), "CAUSAL_LM").to(torch.float64)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    batch, path = grouped(), PackedForward(model)
    with torch.no_grad(), models.adapter_off(model):
        batch.ref_hidden = policy_outputs(path, batch, TAU, extras=Extras(hidden=True)).hidden
        q = log_softmaxes(model, batch)
    with torch.no_grad():
        p = log_softmaxes(model, batch)
        found = policy_outputs(path, batch, TAU).ref_kl
    for i, (a, b) in enumerate(zip(p, q, strict=True)):
        assert (found[i, : len(a)] - (b.exp() * (b - a)).sum(-1)).abs().max() <= 1e-9


@pytest.mark.parametrize("path", [PlainForward, PackedForward])
@pytest.mark.parametrize("temperature", [None, 0.1])
def test_the_end_tokens_log_probs(path, temperature) -> None:
    model, batch = small("llama"), grouped()
    with torch.no_grad():
        found = policy_outputs(path(model), batch, TAU, extras=Extras(eos=7, eos_temperature=temperature)).eos_logps
    for i, row in enumerate(log_softmaxes(model, batch)):
        expected = (row * TAU / (temperature or TAU)).log_softmax(-1)[:, 7]
        assert (found[i, : len(row)] - expected).abs().max() <= 1e-9


def test_bfloat16_stays_near_float32() -> None:
    batch, kl = grouped((8, 8)), {}
    for dtype in (torch.float64, torch.bfloat16):
        policy, reference = small("llama", dtype), other("llama").to(dtype)
        anchor = PackedForward(reference)
        with torch.no_grad():
            batch.ref_hidden = policy_outputs(anchor, batch, 1.0, extras=Extras(hidden=True)).hidden
            extras = Extras(reference_head=(anchor.head.weight, anchor.head.bias))
            kl[dtype] = policy_outputs(PackedForward(policy), batch, 1.0, extras=extras).ref_kl
    exact = kl[torch.float64]
    assert kl[torch.bfloat16].dtype == torch.float32
    assert ((kl[torch.bfloat16] - exact) * batch.completion_mask).abs().mean() < 0.05 * exact.mean()


@pytest.mark.parametrize("learns", [True, False])
def test_its_memory_does_not_grow_with_the_vocabulary(learns, monkeypatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 2**16)
    largest = []
    for vocab in (1000, 4000):
        layer = nn.Linear(4, vocab, bias=False).requires_grad_(learns)
        hidden, targets = torch.randn(512, 4, requires_grad=True), torch.randint(vocab, (512,))
        with Largest() as seen:
            head.HeadLogps(layer)(hidden, targets, 0.7, "no", torch.randn(512, 4))[2].sum().backward()
        largest.append(seen.elements)
        assert seen.elements <= head.CHUNK_ELEMENTS < 512 * vocab / 4
    assert largest[1] <= 1.01 * largest[0]
