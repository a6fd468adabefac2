"""What a full fine-tuning in bfloat16 keeps: on one process float32 weights and their reference, under ZeRO bfloat16 ones and float32 masters."""

from __future__ import annotations

import pytest

from grpo_safe.models.memory import QWEN2_5, PolicyMemory, policy_memory

SMALL = QWEN2_5["0.5b"]


def of(strategy: str) -> PolicyMemory:
    return policy_memory(
        SMALL, lora_rank=None, strategy=strategy, processes=1, weight_bytes=2, gradient_checkpointing=False, micro_batch_tokens=1024,
        rows_at_once=8, prompt_tokens=64, new_tokens=64, kl=True, reward_model_gb=0.1,
    )  # fmt: skip


def test_the_weights_of_a_full_fine_tuning() -> None:
    one, sharded = of("single"), of("zero2")
    gb = SMALL.parameters / 1e9
    assert [one.weights, one.reference, one.gradients, one.optimizer] == pytest.approx([4 * gb, 4 * gb, 4 * gb, 8 * gb])
    assert [sharded.weights, sharded.reference, sharded.gradients, sharded.optimizer] == pytest.approx(
        [2 * gb, 2 * gb, 2 * gb, 12 * gb]
    )
