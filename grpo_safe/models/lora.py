"""LoRA around a model: what it adapts, with and without it, and merged."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from grpo_safe.config import LoraConfig
from grpo_safe.errors import UserError

HEADS = r"(.*\.)?[^.]*(classifier|score)(\..*)?"  # peft trains what is named so whole, and cannot where an adapter is in it


def add_lora(model: nn.Module, cfg: LoraConfig, task: str) -> nn.Module:
    """LoRA adapters around a model; the rest is frozen. Adapter weights are float32."""
    from peft import LoraConfig as PeftConfig
    from peft import TaskType, get_peft_model

    peft_config = PeftConfig(
        r=cfg.r, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=lora_targets(cfg), task_type=TaskType[task],
        exclude_modules=HEADS if task == "SEQ_CLS" else None,
    )  # fmt: skip
    return get_peft_model(model, peft_config)


def lora_targets(cfg: LoraConfig) -> str | list[str]:
    """target_modules as peft takes it: all-linear, a regular expression of whole names, or a list of last parts of names (a single one too)."""
    chosen = cfg.target_modules
    return [chosen] if isinstance(chosen, str) and chosen != "all-linear" and chosen.replace("_", "").isalnum() else chosen


def check_targets(model: nn.Module, cfg: LoraConfig, key: str) -> None:
    """UserError where `key`.target_modules names what the model lacks, or what LoRA cannot stand around."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)
    targets = lora_targets(cfg)
    if targets == "all-linear":
        return
    modules = dict(model.named_modules())
    fault = None
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            found = [name for name in modules if _is_target(name, target, whole=isinstance(targets, str))]
        except re.error as error:
            fault = f"{target!r} is no regular expression ({error})"
            break
        other = [name for name in found if not isinstance(modules[name], kinds)]
        if not found:
            fault = f"the model has no {target!r}"
        elif other:
            fault = f"{other[0]} is a {type(modules[other[0]]).__name__}, which LoRA cannot adapt"
    if fault:
        linear = sorted({name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, (nn.Linear, Conv1D))})
        raise UserError(
            f"{key}.target_modules={cfg.target_modules}: {fault}; its linear layers are {', '.join(linear)}; expected all-linear, names of "
            "layers such as [q_proj,v_proj], or a regular expression of whole names"
        )


def _is_target(name: str, target: str, whole: bool) -> bool:
    return re.fullmatch(target, name) is not None if whole else name == target or name.endswith(f".{target}")


def adapter_off(policy: Any) -> AbstractContextManager[Any]:
    """Under LoRA the reference is the policy with its adapter off: no second copy."""
    return policy.disable_adapter() if is_lora(policy) else nullcontext()


def is_lora(model: Any) -> bool:
    """Whether add_lora was here. (An attribute peft_config proves nothing: merging leaves it behind.)"""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def merged(adapted: Any) -> Any:
    """A model with its adapter merged, and no trace of peft left on it."""
    whole = adapted.merge_and_unload()
    if hasattr(whole, "peft_config"):
        del whole.peft_config
    return whole.requires_grad_(True).eval()  # peft had frozen it
