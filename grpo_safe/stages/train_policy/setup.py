"""Before the loop: what is cheap is checked first, then models are loaded."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo_safe import models, runtime
from grpo_safe.config import TrainPolicyConfig
from grpo_safe.errors import UserError
from grpo_safe.forward import PROVEN, PackedForward, policy_forward, why_not_packed
from grpo_safe.models import memory, reference
from grpo_safe.models.dropout import without_dropout
from grpo_safe.models.reward_model import RewardModel, open_reward_model
from grpo_safe.records import Extras
from grpo_safe.rewards import Objectives, choose_objectives
from grpo_safe.rewards.card import check_gate
from grpo_safe.rollout import answer_end, check_engine, open_engine
from grpo_safe.rollout.engine import Engine
from grpo_safe.runtime import Runtime, Trainable
from grpo_safe.stages.train_policy.method import Method, build_method
from grpo_safe.stages.train_policy.reading import Reading, read_prompts
from grpo_safe.tracking import Tracker
from grpo_safe.versions import checkpoint, resume


@dataclass(frozen=True)
class Setup:
    """What the loop works with, all chosen before it starts."""

    rt: Runtime
    tracker: Tracker
    start: models.Start
    tokenizer: Any
    trainable: Trainable
    forward: nn.Module  # log-probs of the policy, outside of any engine
    engine: Engine  # samples
    reference: Any  # a frozen model's log-probs; None: the policy with its adapter off or with earlier weights, or no reference
    moving: reference.Moving | None  # those earlier weights
    reward_version: checkpoint.Version
    reward_model: RewardModel
    objectives: Objectives
    method: Method
    policy_config: Any  # of transformers
    extras: Extras  # what the update's forward gives beside log-probs
    read: Reading  # prompts, and what is known of them


def set_up(cfg: TrainPolicyConfig, run_dir: Path) -> Setup:
    """Check everything that is cheap to check, then load models."""
    found = checkpoint.open_version(
        Path(cfg.store), "reward-model", cfg.reward_model, "quick", "reward_model", cfg.reward_model_sha256
    )
    heads = found.manifest["objectives"]
    objectives = choose_objectives(cfg.objectives, [o["name"] for o in heads], {o["name"]: o.get("weight", 1.0) for o in heads})
    weights = dict(zip(objectives.names, objectives.weights, strict=True))
    warnings = check_gate(found.manifest["metrics"], found.name, weights, cfg.reward_model_gate)
    scales = {o["name"]: o["scale"] for o in found.manifest["objectives"]}
    method = build_method(cfg.algo, objectives, scales, cfg.sampling.max_new_tokens)
    if objectives.limits and cfg.train.eval_every is None:
        raise UserError(
            "train.eval_every: a run with limits publishes the best step that holds them on data.validation; say how often to look, "
            f"such as train.eval_every={max(1, cfg.train.steps // 10)}"
        )
    start = models.resolve_start(cfg.policy.start, cfg.policy.revision, cfg.policy.trust_remote_code, "policy.start")
    tokenizer = models.load_tokenizer(start)
    config = models.load_config(start)
    start = models.pinned(start)
    check_engine(cfg.rollout, config, runtime.on_gpu(cfg.launch))
    read = read_prompts(cfg, method, objectives, start, tokenizer, config)
    files = {"train": read.fingerprints, "validation": read.validation_fingerprints}
    if cfg.resume:
        resume.refuse_changed_data(run_dir, files)
    checkpoint.require_room(Path(cfg.store), 2 * models.weight_bytes(start) + 10**7, "a policy")

    rt = runtime.start(cfg.launch, cfg.optim.max_grad_norm, cfg.policy.dtype == "bfloat16")
    if cfg.train.prompts_per_step % rt.world_size:
        raise UserError(
            f"train.prompts_per_step={cfg.train.prompts_per_step} does not divide by {rt.world_size} processes (launch.processes)"
        )
    tracker = Tracker(cfg.tracking, run_dir, asdict(cfg), rt.is_main)
    if rt.is_main and not cfg.resume:
        resume.note_data(run_dir, files)
    too_big = memory_warning(
        cfg, rt, config, models.weight_bytes_of(found.path) / 1e9, max(map(len, read.prompt_ids)), method.uses_reference
    )
    say_warnings(cfg, tracker, warnings, too_big, read)
    torch.manual_seed(cfg.seed)  # the adapter's first weights are the same on every rank
    reward_model = open_reward_model(found, rt.device, cfg.reward_model_dtype)
    frozen = frozen_reference(cfg, rt, method, start)
    with runtime.partitioned_loading(rt) if start.adapter is None else nullcontext():  # an adapter is merged into whole weights
        policy = models.load_policy(start, cfg.policy, master_weights=keeps_master_weights(cfg, rt))
    if cfg.train.packed and (obstacle := why_not_packed(policy)):
        tracker.say(f"train.packed: a row per completion in the update, as {obstacle}")
    if "ref_kl" in method.loss.needs and (obstacle := why_not_packed(policy)):
        raise UserError(f"algo={cfg.algo.name}: its KL over the vocabulary needs the packed update; {obstacle}")
    forward = policy_forward(policy, cfg.train.packed, critic="values" in method.loss.needs)
    trainable = runtime.prepare(rt, policy, cfg.optim, cfg.policy.dtype == "bfloat16", through=forward)
    extras = Extras(
        eos=answer_end(policy, tokenizer) if "eos" in method.loss.needs else None,
        reference_head=reference_head(frozen) if "ref_kl" in method.loss.needs else None,
    )
    moving = None
    if method.uses_reference and method.reference.every:
        moving = reference.Moving(reference.trainable_weights(trainable), method.reference)
    engine = open_engine(
        cfg.rollout, start, cfg.policy.dtype, cfg.sampling, read.prompt_ids + read.validation_ids, rt.device, tracker.say
    )
    tracker.say(
        f"train-policy: {start.name}, {len(read.prompts)} prompts of data {cfg.data.name}, reward model {found.name}, weights "
        f"{', '.join(f'{name} {weight:g}' for name, weight in weights.items())}, {cfg.sampling.max_new_tokens} new tokens, "
        f"launch {cfg.launch.strategy} x {rt.world_size}, system prompt {read.system_prompt!r}"
    )
    return Setup(
        rt, tracker, start, tokenizer, trainable, forward, engine, frozen, moving, found, reward_model, objectives, method, config, extras, read,
    )  # fmt: skip


def say_warnings(cfg: TrainPolicyConfig, tracker: Tracker, gate: list[str], too_big: str | None, read: Reading) -> None:
    """What was found before the loop and does not stop it."""
    for warning in gate:
        tracker.say(f"warning (reward_model_gate=warn): {warning}")
    for found in (read.leaked, too_big):
        if found:
            tracker.say(f"warning: {found}")
    for note in read.notes:
        tracker.say(note)
    if read.given is not None:
        tracker.say(f"rollout=dataset: {read.given.left_out} prompts with fewer than {cfg.algo.group_size} answers are left out")


def reference_head(frozen: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The LM head of a reference that is a model of its own; None: LoRA leaves the policy's head as it is."""
    if frozen is None:
        return None
    if not isinstance(frozen, PackedForward):
        raise UserError("algo.reference: a KL over the vocabulary needs a reference of the policy's architecture")
    return frozen.head.weight, frozen.head.bias


def keeps_master_weights(cfg: TrainPolicyConfig, rt: Runtime) -> bool:
    """Whether the policy's own weights are float32 whatever its dtype: all of them train, and no ZeRO keeps a float32 copy beside."""
    return not cfg.policy.lora.enabled and rt.strategy == "single"


def frozen_reference(cfg: TrainPolicyConfig, rt: Runtime, method: Method, start: models.Start) -> Any:
    """A second model for the KL term, where one is needed: a soup, or the start of a full fine-tuning. Its weights are of the policy's dtype."""
    if not method.uses_reference or method.reference.every or (cfg.policy.lora.enabled and not method.reference.soup):
        return None
    dtype = "float32" if keeps_master_weights(cfg, rt) else cfg.policy.dtype
    if method.reference.soup:
        whole = reference.averaged(method.reference, dtype, cfg.policy.attn_implementation, cfg.policy.trust_remote_code)
    else:
        whole = models.load_causal_lm(start, dtype, cfg.policy.attn_implementation)
    return runtime.freeze(rt, policy_forward(without_dropout(whole), cfg.train.packed), cfg.policy.dtype == "bfloat16")


def memory_warning(
    cfg: TrainPolicyConfig, rt: Runtime, config: Any, reward_model_gb: float, prompt_tokens: int, uses_reference: bool
) -> str | None:
    """Before any weight is loaded on a GPU: what the shapes say, if that will not fit."""
    device_gb = runtime.device_memory_gb(rt)
    if device_gb is None:
        return None
    if cfg.rollout.engine == "vllm" and not cfg.rollout.sleep:
        device_gb *= 1 - cfg.rollout.gpu_memory  # vLLM's share is gone from the start
    estimate = memory.policy_memory(
        memory.shape_of(config),
        lora_rank=cfg.policy.lora.r if cfg.policy.lora.enabled else None,
        strategy=rt.strategy,
        processes=rt.world_size,
        weight_bytes=2 if cfg.policy.dtype == "bfloat16" else 4,
        gradient_checkpointing=cfg.policy.gradient_checkpointing,
        micro_batch_tokens=cfg.train.micro_batch_tokens,
        rows_at_once=min(cfg.sampling.batch_size, cfg.train.prompts_per_step * cfg.algo.group_size // rt.world_size),
        prompt_tokens=prompt_tokens,
        new_tokens=cfg.sampling.max_new_tokens,
        kl=uses_reference,
        reward_model_gb=reward_model_gb,
        packed=cfg.train.packed and config.model_type in PROVEN,
        cache_stays=cfg.rollout.engine == "native" and cfg.rollout.cuda_graphs,
    )
    return memory.warning(estimate, device_gb)
