"""What a run reads before any model is loaded: prompts, their tokens, and whether the method can use them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from grpo_safe import models
from grpo_safe.config import TrainPolicyConfig
from grpo_safe.data.leakage import unseen_prompts
from grpo_safe.data.rows import load_answers, load_prompts
from grpo_safe.data.text import encode_prompts
from grpo_safe.errors import UserError
from grpo_safe.records import Prompt
from grpo_safe.rewards import Objectives
from grpo_safe.rewards.confidence import asking
from grpo_safe.rollout.dataset import Given, form_groups
from grpo_safe.stages.train_policy.method import COMPARING_LOSSES, Method


@dataclass(frozen=True)
class Reading:
    """Prompts of training and validation, as messages and as tokens."""

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    validation: list[Prompt]
    validation_ids: list[list[int]]
    given: Given | None  # the answers of the prompts, under rollout=dataset
    fingerprints: list[dict[str, Any]]
    kinds: dict[str, float]  # kind of prompt -> its share of the training prompts
    system_prompt: str | None  # the configured one, and what the method asks beside it
    notes: list[str]  # what was done to prompts that do not fit as they are
    validation_fingerprints: list[dict[str, Any]]
    leaked: str | None  # a sentence, where prompts of validation were left out as training has them too


def read_prompts(
    cfg: TrainPolicyConfig, method: Method, objectives: Objectives, start: models.Start, tokenizer: Any, config: Any
) -> Reading:
    """Raises UserError for a prompt that does not fit, and for prompts or a tokenizer that the method cannot use."""
    check_vocabulary_kl(cfg, method)
    from_data = cfg.rollout.engine == "dataset"
    models.check_tokens(tokenizer, config, start)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{start.called}: it must be known how a completion ends, and its tokenizer has no end token; expected eos_token in its tokenizer_config.json"
        )
    answers = None
    if from_data:
        answers, fingerprints = read_answers(cfg, method, objectives)
        prompts = answers.prompts
    else:
        prompts, fingerprints = load_prompts(cfg.data, "train", cfg.seed)
    validation: list[Prompt] = []
    judging_files: list[dict[str, Any]] = []
    leaked = None
    if cfg.train.eval_every:
        validation, judging_files = load_prompts(cfg.data, "validation", cfg.seed)
        validation, leaked = unseen_prompts(prompts, validation, "data.validation")
        validation = validation[: cfg.train.eval_prompts]
    system_prompt = cfg.policy.system_prompt
    if method.asks_confidence:
        system_prompt = asking(system_prompt, prompts + validation)
    room = models.prompt_room(config, start, cfg.sampling)
    bound = models.prompt_bound(config, cfg.sampling)
    train, held = (encode_prompts(tokenizer, p, system_prompt, room, cfg.data.overlong, bound) for p in (prompts, validation))
    if answers is not None:
        rows = [[replace(row, prompt=p) for row in answers.answers[i]] for p, i in zip(train.prompts, train.kept, strict=True)]
        answers = Given(train.prompts, rows, answers.left_out)
    kinds = kind_shares(cfg, method, train.prompts)
    notes = [f"data.{name}: {note}" for name, part in (("train", train), ("validation", held)) for note in part.notes]
    return Reading(
        train.prompts, train.ids, held.prompts, held.ids, answers, fingerprints, kinds, system_prompt, notes, judging_files, leaked
    )  # fmt: skip


def read_answers(cfg: TrainPolicyConfig, method: Method, objectives: Objectives) -> tuple[Given, list[dict[str, Any]]]:
    """Groups of given answers. Raises UserError for a loss that needs the policy's own, and for an objective that nobody labelled."""
    if not method.compares:
        raise UserError(
            f"rollout=dataset with algo={cfg.algo.name}: its loss weighs completions against the policy that sampled them, and nobody knows "
            f"who wrote a data set's answers; choose a loss that compares answers ({', '.join(sorted(COMPARING_LOSSES))}), such as algo=dpo"
        )
    labelled = cfg.train.scores == "labels"
    rows, fingerprints = load_answers(cfg.data, labelled, cfg.seed)
    known = {name for row in rows for name in row.labels}
    for name, weight, head in zip(objectives.names, objectives.weights, objectives.heads, strict=True):
        if labelled and head is not None and name not in known and (weight or objectives.moving.get(name)):
            raise UserError(
                f"train.scores=labels: no answer of data.train has a label for objective {name}; set objectives.{name}.weight=0, or "
                "train.scores=model"
            )
    return form_groups(rows, cfg.algo.group_size), fingerprints


def check_vocabulary_kl(cfg: TrainPolicyConfig, method: Method) -> None:
    """A KL over the vocabulary reads the LM heads of policy and reference, which must lie there whole."""
    if "ref_kl" not in method.loss.needs:
        return
    if not cfg.train.packed:
        raise UserError(f"algo={cfg.algo.name} with train.packed=false: its KL over the vocabulary needs the packed update")
    apart = method.reference.soup or not cfg.policy.lora.enabled  # LoRA leaves the LM head as it is: one for both
    if apart and (method.reference.every or cfg.launch.strategy.startswith("zero3")):
        raise UserError(
            f"algo={cfg.algo.name}: its KL over the vocabulary needs the reference's LM head, whole on each device; with LoRA "
            "(policy.lora.enabled=true, no soup) that is the policy's own, else choose algo.reference=start or a soup, and launch=single, zero1 or zero2"
        )


def kind_shares(cfg: TrainPolicyConfig, method: Method, prompts: list[Prompt]) -> dict[str, float]:
    """Kind of prompt -> its share. Raises UserError where a loss weighs kinds and there is but one."""
    counts = Counter(p.kind for p in prompts)
    if method.loss.kinds_rate is not None and len(counts) < 2:
        raise UserError(
            f"algo={cfg.algo.name}: it weighs kinds of prompts against each other, and all of data.train are of kind {next(iter(counts))!r}; "
            f"name a column that tells them apart with data.columns.kind (now {cfg.data.columns.kind!r}), or choose algo=dpo"
        )
    return {kind: counts[kind] / len(prompts) for kind in sorted(counts)}
