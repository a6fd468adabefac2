"""The memory arithmetic of train-policy, its overlays and the page that shows it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from grpo_safe.models.memory import (
    QWEN2_5,
    ModelShape,
    PolicyMemory,
    fits,
    lora_parameters,
    policy_memory,
    shape_of,
    table,
    warning,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = ModelShape(24, 896, 4864, 14, 2, 64, 151_936, tied=True)
SEVEN = ModelShape(28, 3584, 18_944, 28, 4, 128, 152_064, tied=False)
FOURTEEN = ModelShape(48, 5120, 13_824, 40, 8, 128, 152_064, tied=False)


def memory_of(shape: ModelShape = SEVEN, **changes: Any) -> PolicyMemory:
    settings: dict[str, Any] = {
        "lora_rank": 16, "strategy": "zero2", "processes": 4, "weight_bytes": 2, "gradient_checkpointing": True,
        "micro_batch_tokens": 8192, "rows_at_once": 128, "prompt_tokens": 1024, "new_tokens": 512, "kl": True,
        "reward_model_gb": 2.0,
    }  # fmt: skip
    return policy_memory(shape, **settings | changes)


def test_parameter_counts_are_those_of_the_published_models() -> None:
    assert SMALL.parameters == 494_032_768
    assert SEVEN.parameters == 7_615_616_512
    assert FOURTEEN.parameters == 14_770_033_664
    assert {"0.5b": SMALL, "7b": SEVEN, "14b": FOURTEEN} == QWEN2_5


def test_adapter_counts_by_hand() -> None:
    # one layer of 7B: q and o 2 x (3584 + 3584), k and v 2 x (3584 + 512), the MLP 3 x (3584 + 18944)
    assert lora_parameters(SEVEN, 16) == 28 * 16 * (14_336 + 8_192 + 67_584) == 40_370_176
    assert lora_parameters(SMALL, 16) == 8_798_208


def test_shapes_are_read_from_configs() -> None:
    qwen = SimpleNamespace(
        model_type="qwen2", num_hidden_layers=24, hidden_size=896, intermediate_size=4864, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True,
    )  # fmt: skip
    assert shape_of(qwen) == SMALL
    smollm = SimpleNamespace(
        model_type="llama", num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, vocab_size=49_152, tie_word_embeddings=True,
    )  # fmt: skip
    assert shape_of(smollm).parameters == 134_515_008
    gpt2 = SimpleNamespace(
        model_type="gpt2", n_layer=12, n_embd=768, n_inner=None, n_head=12, n_positions=1024, vocab_size=50_257
    )
    assert shape_of(gpt2).parameters == 124_439_808
    with pytest.raises(ValueError, match="hidden_size or n_embd"):
        shape_of(SimpleNamespace(model_type="mamba", vocab_size=10))


def test_zero_divides_what_it_says() -> None:
    full = {name: memory_of(lora_rank=None, strategy=name, processes=8) for name in ("zero1", "zero2", "zero3")}
    one = memory_of(lora_rank=None, strategy="zero2", processes=1)
    assert full["zero1"].optimizer == pytest.approx(one.optimizer / 8)
    assert full["zero1"].gradients == pytest.approx(one.gradients)
    assert full["zero2"].gradients == pytest.approx(one.gradients / 8)
    assert full["zero2"].weights == one.weights and full["zero2"].reference == one.reference
    assert full["zero3"].weights == pytest.approx(one.weights / 8)
    assert full["zero3"].reference == pytest.approx(one.reference / 8)
    assert one.optimizer == pytest.approx(12 * SEVEN.parameters / 1e9)  # fp32 masters and two moments


def test_zero3_gathers_the_whole_weights_to_sample() -> None:
    zero3 = memory_of(lora_rank=None, strategy="zero3", processes=8)
    assert zero3.gathered == pytest.approx(2 * SEVEN.parameters / 1e9)
    assert memory_of(lora_rank=None, strategy="zero2").gathered == 0
    offload = memory_of(lora_rank=None, strategy="zero3_offload", processes=1)
    assert offload.weights == offload.optimizer == offload.gradients == offload.reference == 0
    assert offload.gathered == zero3.gathered


def test_the_reference_is_a_second_copy_only_where_one_is_run() -> None:
    assert memory_of().reference == 0  # LoRA: the adapter is switched off
    assert memory_of(lora_rank=None, kl=False).reference == 0
    assert memory_of(lora_rank=None).reference == pytest.approx(15.231, abs=1e-3)


def test_sampling_and_update_by_hand() -> None:
    memory = memory_of()
    assert memory.kv_cache == pytest.approx(128 * 1536 * 28 * 2 * 4 * 128 * 2 / 1e9)
    assert memory.logits == pytest.approx(8192 * 152_064 * 4 * 5 / 1e9)
    assert memory_of(packed=True).logits == pytest.approx(3 * 2**24 * 4 / 1e9)  # whatever the batch and the vocabulary
    assert memory_of(packed=True, lora_rank=None).logits == pytest.approx((3 * 2**24 + 152_064 * 3584) * 4 / 1e9)
    always = memory.weights + memory.reference + memory.optimizer + memory.reward_model + memory.overhead
    assert memory.sampling == pytest.approx(always + memory.kv_cache + memory.decoding + memory.gathered)
    own = memory.gradients + memory.activations + memory.logits + memory.buffers
    assert memory.update == pytest.approx(always + own)
    assert memory.peak == max(memory.sampling, memory.update) < memory.total
    assert memory_of(micro_batch_tokens=256).activations == memory_of(micro_batch_tokens=1536).activations  # a long row
    assert memory_of(gradient_checkpointing=False).activations > 10 * memory.activations


def test_selective_checkpointing_by_hand() -> None:
    # a layer keeps its input (3584), the results of q, k, v, o, gate, up and down, and of attention; one layer and a quarter are whole
    kept = 3584 + (3584 + 512 + 512 + 3584 + 18_944 + 18_944 + 3584) + 3584
    whole = 2 * 3584 * (4 + 2 * 2) + 5 * 3584 * 2 + 4 * 18_944 * 2
    found = memory_of(gradient_checkpointing="selective")
    assert found.activations == pytest.approx(8192 * (28 * kept * 2 + 1.25 * whole) / 1e9)
    everything = memory_of(gradient_checkpointing=False).activations
    assert 0.4 < found.activations / everything < 0.6
    single = {"strategy": "single", "processes": 1}
    adapted = memory_of(gradient_checkpointing="selective", **single), memory_of(gradient_checkpointing=False, **single)
    assert found.activations < adapted[0].activations < adapted[1].activations


def test_a_cache_that_graphs_read_stays_during_the_update() -> None:
    freed, stays = memory_of(), memory_of(cache_stays=True)
    assert stays.update == pytest.approx(freed.update + freed.kv_cache) and stays.sampling == freed.sampling
    assert "kv_cache        11.27 GB  always" in table(stays) and "kv_cache        11.27 GB  sampling" in table(freed)
    crowded = warning(memory_of(rows_at_once=1024, micro_batch_tokens=32768, cache_stays=True), 80)
    assert crowded is not None and "(update)" in crowded and "sampling.batch_size" in crowded


def test_adapters_are_float32_without_deepspeed() -> None:
    single, sharded = memory_of(strategy="single", processes=1), memory_of(processes=1)
    assert single.weights - sharded.weights == pytest.approx(2 * lora_parameters(SEVEN, 16) / 1e9)
    assert single.optimizer == pytest.approx(8 * lora_parameters(SEVEN, 16) / 1e9)
    assert single.activations > sharded.activations  # each adapter casts its input
    assert single.buffers == 0 < sharded.buffers
    with pytest.raises(ValueError, match="zero4"):
        memory_of(strategy="zero4")


@pytest.mark.parametrize(("name", "processes", "strategy"), [("0.5b", 1, "single"), ("7b", 4, "zero2"), ("14b", 8, "zero2")])
def test_overlays_fit_80_gb(name: str, processes: int, strategy: str) -> None:
    overlay = overlay_of(name)
    assert overlay["defaults"] == [{"override /launch": strategy}]
    assert overlay["policy"]["dtype"] == "bfloat16"
    assert overlay["train"]["prompts_per_step"] % processes == overlay["train"]["prompts_per_step"] % 2 == 0
    assert fits(overlay_memory(name, processes, strategy, 16), 80)


def test_full_fine_tuning_of_7b_fits_eight_devices_under_zero3_only() -> None:
    assert fits(overlay_memory("7b", 8, "zero3", None), 80)
    assert not fits(overlay_memory("7b", 8, "zero1", None), 80)


def test_a_run_that_fits_warns_of_nothing() -> None:
    assert warning(memory_of(), 80) is None


@pytest.mark.parametrize(
    ("changes", "device_gb", "part", "key"),
    [
        ({"micro_batch_tokens": 32_768}, 80, "logits", "train.micro_batch_tokens"),
        ({"gradient_checkpointing": False}, 80, "activations", "policy.gradient_checkpointing=selective"),
        (
            {"gradient_checkpointing": "selective", "micro_batch_tokens": 32_768, "packed": True},
            80,
            "activations",
            "policy.gradient_checkpointing=true",
        ),
        ({"rows_at_once": 1024}, 80, "kv_cache", "sampling.batch_size"),
        ({"lora_rank": None, "processes": 2}, 80, "optimizer", "launch=zero3, or policy.lora.enabled=true"),
        ({"lora_rank": None, "strategy": "single", "processes": 1}, 80, "optimizer", "launch=zero3_offload"),
        ({"micro_batch_tokens": 512, "rows_at_once": 8}, 16, "weights", "policy.start"),
        ({"reward_model_gb": 60.0, "rows_at_once": 8, "micro_batch_tokens": 512}, 80, "reward_model", "reward_model"),
    ],
)
def test_a_run_that_does_not_fit_names_the_part_and_the_key(
    changes: dict[str, Any], device_gb: float, part: str, key: str
) -> None:
    memory = memory_of(**changes)
    said = warning(memory, device_gb)
    assert said is not None
    sentence, _, rest = said.partition("\n")
    first = sentence.partition("Largest: ")[2].partition("; then")[0]
    assert first.startswith(f"{part} (") and key in first
    assert rest == table(memory)


def test_the_page_shows_what_the_function_gives(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    found: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, found)
    printed = capsys.readouterr().out
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    rows = [[cell.strip(" *") for cell in line] for line in lines if len(line) == 7]
    assert rows[0] == ["part", "GB x 1e9", *found["runs"]]
    for column, memory in enumerate(found["runs"].values(), start=2):
        values = memory.parts | {"sampling": memory.sampling, "update": memory.update, "peak": memory.peak}
        assert {row[0]: row[column] for row in rows[2:]} == {part: f"{value:.1f}" for part, value in values.items()}
        assert table(memory) in printed


def overlay_of(name: str) -> dict[str, Any]:
    text = (ROOT / "conf" / "model" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    return yaml.safe_load(text)


def overlay_memory(name: str, processes: int, strategy: str, lora_rank: int | None) -> PolicyMemory:
    overlay = overlay_of(name)
    return memory_of(
        QWEN2_5[name], lora_rank=lora_rank, strategy=strategy, processes=processes,
        gradient_checkpointing=overlay["policy"]["gradient_checkpointing"],
        micro_batch_tokens=overlay["train"]["micro_batch_tokens"], rows_at_once=overlay["sampling"]["batch_size"],
        prompt_tokens=overlay["sampling"]["max_prompt_tokens"], new_tokens=overlay["sampling"]["max_new_tokens"],
    )  # fmt: skip
