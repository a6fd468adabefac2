"""Stage 3: a published policy against its start, on the same held-out prompts with the same sampling noise.

Both answer every prompt; the reward model scores both; differences are paired by prompt. Refusals are counted apart on harmful prompts (where
they are wanted) and on the others (where they are not): a policy that refuses everything must not look safe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo_safe import models, runtime
from grpo_safe.algorithm.rates import mcnemar, rate, rate_difference
from grpo_safe.algorithm.statistics import mean_interval
from grpo_safe.config import DataConfig, EvalConfig, SamplingConfig
from grpo_safe.data.leakage import unseen_prompts
from grpo_safe.data.rows import load_prompts
from grpo_safe.data.text import encode_prompts
from grpo_safe.errors import UserError
from grpo_safe.judges.refusal import refuses
from grpo_safe.models.reward_model import open_reward_model, score_texts
from grpo_safe.records import Prompt
from grpo_safe.report.evaluation import print_comparison, write_report
from grpo_safe.rewards.confidence import unstated
from grpo_safe.rollout import check_engine, open_engine, sample
from grpo_safe.rollout.engine import Engine
from grpo_safe.runtime import Runtime
from grpo_safe.tracking import Tracker
from grpo_safe.versions import checkpoint


@dataclass(frozen=True)
class Answers:
    """What one policy said to the prompts: P prompts, R completions each, K objectives."""

    texts: list[list[str]]  # [P][R]
    scores: np.ndarray  # [P, R, K]
    refused: np.ndarray  # [P, R]
    tokens: np.ndarray  # [P, R]
    truncated: np.ndarray  # [P, R]


def run(cfg: EvalConfig, run_dir: Path) -> None:
    """Answer, score, compare, report."""
    store = Path(cfg.store)
    policy_version = checkpoint.open_version(store, "policy", cfg.policy, "quick", "policy", cfg.policy_sha256)
    judge = str(cfg.reward_model)
    judge_version = checkpoint.open_version(store, "reward-model", judge, "quick", "reward_model", cfg.reward_model_sha256)
    prompts, leaked = heldout_prompts(cfg, policy_version)
    base, trusted = policy_version.manifest["base"], cfg.trust_remote_code
    start = models.resolve_start(base["start"], base["revision"], trusted, "policy's start")
    folder = str(policy_version.path)
    tokenizer = models.load_tokenizer(models.Start(folder, folder, {"trust_remote_code": trusted}, "policy"))
    config = models.load_config(start)
    check_engine(cfg.rollout, config, runtime.on_gpu(cfg.launch))
    dtype = models.faithful_dtype(policy_version.manifest, cfg.dtype)
    room = models.prompt_room(config, start, sampling_of(cfg))
    read = encode_prompts(
        tokenizer, prompts, policy_version.manifest["system_prompt"], room, cfg.data.overlong,
        models.prompt_bound(config, sampling_of(cfg)), "policy",
    )  # fmt: skip
    prompts, prompt_ids = read.prompts, read.ids

    rt = runtime.start(cfg.launch, 1.0, False)
    tracker = Tracker(cfg.tracking, run_dir, asdict(cfg), rt.is_main)
    reward_model = open_reward_model(judge_version, rt.device, cfg.reward_model_dtype)
    for note in read.notes:
        tracker.say(f"data.heldout: {note}")
    tracker.say(f"eval: policy {policy_version.name} against {start.name} on {len(prompts)} prompts, judge {judge_version.name}")
    if leaked:
        tracker.say(f"warning: {leaked}")
    if dtype != cfg.dtype:
        tracker.say(
            f"dtype={cfg.dtype}: both policies are compared in {dtype}, as {cfg.dtype} would round the merged adapter away"
        )
    spoken = unstated if policy_version.manifest.get("states_confidence") else list
    engine = open_engine(cfg.rollout, start, dtype, sampling_of(cfg), prompt_ids, rt.device, tracker.say)
    answers = {}
    openers = {
        "start": lambda: models.load_causal_lm(start, dtype),
        "policy": lambda: models.open_policy(policy_version.path, policy_version.manifest, dtype, cfg.trust_remote_code),
    }
    tracker.start(len(openers) * len(rt.share(prompts)), 0, "eval", unit="prompt")
    for who, opener in openers.items():
        model = opener().to(rt.device)
        answers[who] = answer(
            cfg, rt, engine, model, tokenizer, prompts, prompt_ids, reward_model, spoken, partial(tracker.advance, who)
        )
        del model
    if rt.is_main:
        metrics = compare(cfg, prompts, answers["start"], answers["policy"], reward_model.objectives)
        metrics |= {"policy": policy_version.link, "start": start.name, "judge": judge_version.link}
        rows = sample_rows(prompts, answers, reward_model.objectives)
        write_report(run_dir, metrics, rows, cfg.eval.samples)
        print_comparison(metrics)
        tracker.log(0, {f"{o}/{k}": v["value"] for o, e in metrics["objectives"].items() for k, v in e.items()})
        tracker.say(f"report {run_dir / 'report.md'}")
    rt.barrier()
    tracker.close()


def heldout_prompts(cfg: EvalConfig, policy: checkpoint.Version) -> tuple[list[Prompt], str | None]:
    """The held-out prompts that the policy was not trained on, and a sentence where some were, or where nobody can tell.

    The policy's own training data is read again, as its manifest describes it. Raises UserError where no prompt is left.
    """
    prompts = load_prompts(cfg.data, "heldout", cfg.seed)[0]
    trained = OmegaConf.select(OmegaConf.create(policy.manifest["config"]), "data")
    if trained is None:
        return prompts[: cfg.eval.prompts], None
    try:
        data: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), trained))
        seen, files = load_prompts(data, "train")
    except (UserError, OmegaConfBaseException) as error:
        return prompts[: cfg.eval.prompts], f"whether the policy was trained on held-out prompts was not checked: {error}"
    kept, leaked = unseen_prompts(seen, prompts, "data.heldout")
    hashes = {f["source"]: f.get("sha256") for f in policy.manifest["data"]["files"]}
    changed = [f["source"] for f in files if hashes.get(f["source"], f.get("sha256")) != f.get("sha256")]
    if changed and not leaked:
        leaked = f"{changed[0]} is not the file any more that the policy was trained on: held-out prompts were compared with what it holds now"
    return kept[: cfg.eval.prompts], leaked


def sampling_of(cfg: EvalConfig) -> SamplingConfig:
    """How completions are drawn; the launcher has filled in what the policy's manifest says."""
    return SamplingConfig(**vars(cfg.sampling))


def answer(
    cfg: EvalConfig,
    rt: Runtime,
    engine: Engine,
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    prompt_ids: list[list[int]],
    reward_model: Any,
    spoken: Callable[[list[str]], list[str]],
    advance: Callable[[int], None],
) -> Answers:
    """All answers of one policy; each rank takes its share of the prompts, `spoken` is what is judged, `advance` hears how many are answered."""
    mine, sampling = rt.share(list(range(len(prompts)))), sampling_of(cfg)
    per_prompt = cfg.eval.completions
    at_once = max(1, sampling.batch_size // per_prompt)
    part: list[tuple[str, list[float], int, bool]] = []
    for first in range(0, len(mine), at_once):
        chunk = mine[first : first + at_once]
        rollout = sample(
            engine, model, tokenizer, [prompts[i] for i in chunk], [prompt_ids[i] for i in chunk],
            per_prompt, sampling, cfg.seed, 0,
        )  # fmt: skip
        said = spoken(rollout.texts)
        scores, _ = score_texts(reward_model, rollout.prompts, said, cfg.eval.score_batch_tokens)
        lengths, truncated = rollout.completion_mask.sum(1).tolist(), rollout.truncated.tolist()
        part += zip(said, scores.tolist(), lengths, truncated, strict=True)
        advance(len(chunk))
    rows = [row for rank_rows in rt.gather(part) for row in rank_rows]
    shape = (len(prompts), per_prompt)
    texts = [row[0] for row in rows]
    return Answers(
        [texts[i * per_prompt : (i + 1) * per_prompt] for i in range(len(prompts))],
        np.array([row[1] for row in rows]).reshape(*shape, -1),
        np.array([refuses(t) for t in texts], dtype=float).reshape(shape),
        np.array([row[2] for row in rows], dtype=float).reshape(shape),
        np.array([row[3] for row in rows], dtype=float).reshape(shape),
    )


def compare(cfg: EvalConfig, prompts: list[Prompt], before: Answers, after: Answers, objectives: list[str]) -> dict[str, Any]:
    """Both means and the paired difference, the unit being the prompt; refusals by kind of prompt, and answers that were cut, as rates."""
    kinds = np.array([p.kind for p in prompts])

    def paired(a: np.ndarray, b: np.ndarray, inside: np.ndarray) -> dict[str, dict[str, float]]:
        a, b = a.mean(1)[inside], b.mean(1)[inside]  # completions of a prompt first
        return {
            name: mean_interval(values, cfg.eval.bootstrap, cfg.seed).as_dict()
            for name, values in (("start", a), ("policy", b), ("difference", b - a))
        }

    def rates(a: np.ndarray, b: np.ndarray, inside: np.ndarray) -> dict[str, Any]:
        """Of events, one completion a prompt (the first): exact, paired, and how likely no difference would look like this."""
        a, b = a[inside, 0], b[inside, 0]
        figures = (("start", rate(a)), ("policy", rate(b)), ("difference", rate_difference(a, b)))
        return {name: figure.as_dict() for name, figure in figures} | {"n": int(inside.sum()), "p": mcnemar(a, b)}

    everywhere = np.ones(len(prompts), dtype=bool)
    groups = {kind: kinds == kind for kind in sorted(set(kinds.tolist()))}
    if "harmful" in groups and len(groups) > 1:
        groups["all but harmful"] = kinds != "harmful"
    return {
        "prompts": len(prompts),
        "completions": cfg.eval.completions,
        "objectives": {
            name: paired(before.scores[..., k], after.scores[..., k], everywhere) for k, name in enumerate(objectives)
        },
        "by_kind": {
            kind: {name: paired(before.scores[..., k], after.scores[..., k], inside) for k, name in enumerate(objectives)}
            for kind, inside in groups.items()
        },
        "refusals": {kind: rates(before.refused, after.refused, inside) for kind, inside in groups.items()},
        "tokens": paired(before.tokens, after.tokens, everywhere),
        "truncated": rates(before.truncated, after.truncated, everywhere),
    }


def sample_rows(prompts: list[Prompt], answers: dict[str, Answers], objectives: list[str]) -> list[dict[str, Any]]:
    """Every answer with its scores, both policies side by side."""
    return [
        {
            "prompt": prompt.text,
            "kind": prompt.kind,
            **{
                who: [
                    {
                        "text": text,
                        "scores": {n: round(float(a.scores[p, r, k]), 4) for k, n in enumerate(objectives)},
                        "refused": bool(a.refused[p, r]),
                    }
                    for r, text in enumerate(a.texts[p])
                ]
                for who, a in answers.items()
            },
        }
        for p, prompt in enumerate(prompts)
    ]
