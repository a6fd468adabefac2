"""A composed config is checked against its schema before anything is loaded: closed choices, signs, what goes together. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from grpo_safe.config import AS_TRAINED, SCHEMAS
from grpo_safe.errors import UserError

# A word per closed choice: (key, allowed values). Checked when a config is composed, before anything is loaded.
CHOICES: list[tuple[str, tuple[bool | str, ...]]] = [
    ("launch.strategy", ("single", "zero1", "zero2", "zero3", "zero3_offload")),
    ("launch.device", ("auto", "cpu", "cuda")),
    ("tracking.kind", ("local", "wandb")),
    ("tracking.mode", ("online", "offline")),
    ("optim.schedule", ("constant", "linear", "cosine")),
    ("backbone.dtype", ("float32", "bfloat16")),
    ("backbone.gradient_checkpointing", (False, "selective", True)),
    ("policy.gradient_checkpointing", (False, "selective", True)),
    ("policy.dtype", ("float32", "bfloat16")),
    ("export.dtype", ("float32", "bfloat16")),
    ("dtype", ("float32", "bfloat16")),
    ("algo.order", ("aggregate_first", "normalize_first")),
    ("algo.reduction", ("sequence_mean", "token_mean", "constant")),
    ("algo.kl_estimator", ("k1", "k2", "k3")),
    ("algo.kl_in", ("loss", "reward")),
    ("algo.truncated", ("keep", "mask", "penalize", "soft_overlong")),
    ("rollout.engine", ("native", "generate", "vllm", "dataset")),
    ("rollout.dtype", ("float32", "bfloat16")),
    ("train.scores", ("model", "labels")),
    ("reward_model_gate", ("error", "warn")),
    ("reward_model_dtype", ("float32", "bfloat16")),
    ("verify", ("full", "quick")),
    ("data.overlong", ("error", "skip", "cut")),
]

# Numbers that must be positive, and numbers that must not be negative.
POSITIVE = (
    "algo.group_size", "algo.updates_per_rollout", "algo.minibatches", "sampling.max_new_tokens", "sampling.temperature",
    "sampling.top_p", "sampling.batch_size", "train.steps", "train.prompts_per_step", "train.micro_batch_tokens",
    "train.score_batch_tokens", "train.rows_per_step", "train.epochs", "backbone.max_length", "optim.lr", "optim.max_grad_norm", "optim.critic_lr_scale",
    "train.save_every", "train.eval_every", "train.keep_states", "launch.processes", "eval.completions", "eval.prompts",
    "data.limit", "train.log_every", "train.bootstrap", "train.eval_prompts", "eval.bootstrap", "eval.score_batch_tokens",
    "rollout.sampler_cap", "rollout.gpu_memory", "rollout.kv_cache_gb", "algo.sampler_cap", "algo.overlong_share",
    "train.max_skipped", "sampling.max_prompt_tokens", "policy.lora.r", "backbone.lora.r", "launch.bucket_elements", "launch.timeout_minutes",
)  # fmt: skip
NOT_NEGATIVE = (
    "algo.clip_eps", "algo.clip_eps_high", "algo.resample_ties", "algo.kl_coef", "algo.tau", "algo.tie_spread", "algo.entropy_coef", "algo.truncation_penalty",
    "optim.weight_decay", "optim.warmup", "optim.min_lr", "tracking.sample_count", "eval.samples",
    "launch.param_persistence_threshold",
)  # fmt: skip


def validated(command: str, composed: DictConfig) -> DictConfig:
    """Merge a composed config into its schema and check every value that can be checked without data or models.

    Raises UserError that names each key, what it holds and what was expected.
    """
    composed = OmegaConf.masked_copy(composed, [str(k) for k in composed if k != "hydra"])
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(SCHEMAS[command]), composed)
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise UserError(_config_sentence(error)) from error
    assert isinstance(cfg, DictConfig)
    missing = sorted(OmegaConf.missing_keys(cfg) | OmegaConf.missing_keys(composed))  # a ??? in a file hides the schema's default
    if missing:
        raise UserError(f"{command}: no value for {', '.join(missing)}; give each as KEY=VALUE")
    for key, number in _floats(OmegaConf.to_container(cfg), ""):
        if not math.isfinite(number):
            raise UserError(f"{key}={number}: expected a finite number")
    for key, allowed in CHOICES:
        value = OmegaConf.select(cfg, key)
        if value is not None and value not in allowed:
            raise UserError(f"{key}={value}: expected one of {', '.join(str(word).lower() for word in allowed)}")
    for key in POSITIVE:
        value = OmegaConf.select(cfg, key)
        if value is not None and not value > 0:
            raise UserError(f"{key}={value}: expected a number above 0")
    for key in NOT_NEGATIVE:
        value = OmegaConf.select(cfg, key)
        if value is not None and not value >= 0:
            raise UserError(f"{key}={value}: expected 0 or more")
    _check_names(cfg)
    _check_together(cfg)
    return cfg


def typed(cfg: DictConfig) -> Any:
    """The dataclass object that a stage receives."""
    return OmegaConf.to_object(cfg)


def load_frozen(command: str, path: Path) -> DictConfig:
    """Read a run's frozen config.yaml back through the schema."""
    try:
        loaded = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{path} cannot be read as a run's config: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} holds no config; expected what a run has frozen there")
    return validated(command, loaded)


def _floats(node: Any, key: str) -> Iterator[tuple[str, float]]:
    """Every float below a node, the numbers of slots included, with its dotted key; an item of a list by its number from 0."""
    if isinstance(node, float):
        yield key, node
    elif isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _floats(value, f"{key}.{name}" if key else str(name))


def _check_names(cfg: DictConfig) -> None:
    """An objective's name is part of config keys, metric names and table rows."""
    for key in ("objectives", "data.objectives"):
        for name in OmegaConf.select(cfg, key) or {}:
            if not re.fullmatch(r"\w[\w-]*", str(name)):
                raise UserError(f"{key}: {str(name)!r} is no name for an objective; expected letters, digits, _ and -")


def _check_together(cfg: DictConfig) -> None:
    launch = cfg.launch
    if launch.strategy == "single" and (launch.processes or 1) > 1:
        raise UserError(
            f"launch=single with launch.processes={launch.processes}: one process cannot be several; "
            "choose launch=zero1, zero2 or zero3, or leave launch.processes out"
        )
    for name, objective in cfg.data.objectives.items():
        if len(objective.range) != 2 or objective.range[0] == objective.range[1]:
            raise UserError(f"data.objectives.{name}.range={list(objective.range)}: expected two different numbers [lo, hi]")
    if cfg.command != "eval" and cfg.data.name == AS_TRAINED:
        raise UserError(f"data={AS_TRAINED}: only an evaluation has a policy whose data it can take; choose another data set")
    if OmegaConf.select(cfg, "sampling.top_p") is not None and not 0 < cfg.sampling.top_p <= 1:
        raise UserError(f"sampling.top_p={cfg.sampling.top_p}: expected a share above 0, at most 1")
    _check_lora(cfg)
    if "rollout" in cfg:
        _check_rollout(cfg)
    if "algo" not in cfg:
        return
    if cfg.algo.group_size < 2:
        raise UserError(f"algo.group_size={cfg.algo.group_size}: GRPO compares completions within a group; expected 2 or more")
    if cfg.algo.minibatches > cfg.train.prompts_per_step:
        raise UserError(
            f"algo.minibatches={cfg.algo.minibatches} with train.prompts_per_step={cfg.train.prompts_per_step}: a minibatch holds whole groups; "
            "choose at most as many minibatches as prompts"
        )


def _check_lora(cfg: DictConfig) -> None:
    for section in ("policy", "backbone"):
        targets = OmegaConf.select(cfg, f"{section}.lora.target_modules", default="all-linear")
        listed = [targets] if isinstance(targets, str) else targets
        if not isinstance(listed, (list, ListConfig)) or not listed or not all(isinstance(name, str) and name for name in listed):
            raise UserError(
                f"{section}.lora.target_modules={targets}: expected all-linear, a layer's name or a list of names such as [q_proj,v_proj]"
            )
    if OmegaConf.select(cfg, "policy.lora.dropout"):
        raise UserError(
            f"policy.lora.dropout={cfg.policy.lora.dropout}: the log-probs of sampling, update and reference must be those of one policy; expected 0"
        )


def _check_rollout(cfg: DictConfig) -> None:
    if cfg.rollout.gpu_memory >= 1:
        raise UserError(f"rollout.gpu_memory={cfg.rollout.gpu_memory}: expected a share of the GPU's memory, below 1")
    from_data = cfg.rollout.engine == "dataset"
    if "algo" not in cfg:
        if from_data:
            raise UserError("rollout=dataset: an evaluation samples from the policy; choose rollout=native or generate")
        return
    if cfg.train.scores == "labels" and not from_data:
        raise UserError(
            "train.scores=labels: only the answers of a data set have labels; choose rollout=dataset, or train.scores=model"
        )
    if from_data and (cfg.algo.resample_ties or cfg.algo.calibration != "none" or cfg.train.profile):
        raise UserError(
            "rollout=dataset: nothing is sampled, so nothing can be sampled again, asked for a confidence, or timed; set algo.resample_ties=0 "
            "algo.calibration=none train.profile=false"
        )
    if cfg.rollout.engine == "vllm" and cfg.sampling.top_p < 1 and cfg.algo.sampler_cap is not None:
        raise UserError(
            f"rollout=vllm with sampling.top_p={cfg.sampling.top_p}: its log-probs are those of the cut distribution, so they cannot weigh the loss; "
            "set sampling.top_p=1, or algo.sampler_cap=null for no correction"
        )


def _config_sentence(error: OmegaConfBaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = getattr(error, "full_key", None)
    text = lines[0] if lines else type(error).__name__
    if "not in" in text and key:
        return f"unknown key {key}: {text}; the keys and what they mean stand in grpo_safe/config.py"
    return f"{key}: {text}" if key and key not in text else text
