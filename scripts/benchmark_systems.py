"""The two systems that scripts/benchmark.py compares, each a function that trains and stops between steps: ours and TRL's."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

LEARNING_RATE = {"lora": 1e-4, "full": 1e-5}
KL_COEF, SYSTEM_PROMPT = 0.04, "You are a helpful, honest and harmless assistant."
WORDS = "tell me how people keep safe and calm when things at home or at work go wrong and nobody is there to help"


@dataclass(frozen=True)
class Job:
    """The work: `prompts` prompts a step, each of exactly prompt_tokens tokens with its template, group_size completions of new_tokens each."""

    folder: Path
    store: Path  # holds the reward model
    policy: str
    tuning: str  # lora | full
    prompt_tokens: int
    new_tokens: int
    group_size: int
    prompts: int
    objectives: int  # K
    steps: int
    trl_rewards: str  # callable: our K-head model, run once | models: K models of one head
    trl_rows: int | None = None  # completions in one of TRL's micro-batches; None: all of the step's
    replay: bool = False  # TRL only: take the completions that ours stored in the folder
    dtype: str = "float32"  # of the policy
    ours: tuple[str, ...] = ()  # overrides beside those that the comparison fixes
    trl: dict[str, Any] = field(default_factory=dict)  # fields of GRPOConfig, over the fastest known for a CPU
    no_end_token: bool = False  # TRL: the end token is one that cannot be drawn, instead of a logits processor at every token

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group_size


class Gate:
    """Stops between steps until the other process says go; measures what lies between."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.pipe.recv()
        self.began = time.perf_counter(), time.process_time()

    def report(self, last: bool, **figures: Any) -> None:
        """The end of a step; returns when the next may begin."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            figures["gpu_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
            figures["gpu_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        seconds, cpu_seconds = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
        self.pipe.send({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak_gb, **figures})
        if not last:
            self.pipe.recv()
        self.began = time.perf_counter(), time.process_time()


def names_of(objectives: int) -> list[str]:
    """K heads."""
    return [f"objective_{k}" for k in range(1, objectives + 1)]


def publish_reward_model(store: Path, backbone: str, objectives: int) -> None:
    """A K-head model as train-rm would publish it, its heads random but far enough apart that no group ties."""
    from grpo_safe import models
    from grpo_safe.config import BackboneConfig
    from grpo_safe.data.text import formatter_of
    from grpo_safe.versions import checkpoint

    torch.manual_seed(0)
    names = names_of(objectives)
    start = models.resolve_start(backbone, None, False, "--backbone")
    tokenizer = models.load_tokenizer(start)
    tokenizer.truncation_side = "left"
    model: Any = models.load_backbone(start, BackboneConfig(), names, tokenizer.pad_token_id)
    models.fold_affine(model, torch.full((objectives,), 50.0), torch.zeros(objectives))

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    manifest = {
        "command": "benchmark", "config": {}, "metrics": {"objectives": {}}, "base": {"start": backbone, "revision": None},
        "objectives": [{"name": n, "range": [0, 1], "scale": "relative", "slope": 1.0, "offset": 0.0} for n in names],
        "scoring": {"formatter": formatter_of(tokenizer), "max_length": 512}, "data": {"name": "none", "licence": "none", "files": []},
    }  # fmt: skip
    checkpoint.publish(store, "reward-model", write, manifest)


def prompt_texts(job: Job, tokenizer: Any) -> list[str]:
    """User texts whose templated prompts have exactly job.prompt_tokens tokens; one for each group of the run."""
    from grpo_safe.data.text import encode_prompts
    from grpo_safe.records import Prompt

    def length(text: str) -> int:
        messages = [{"role": "user", "content": text}]
        return len(encode_prompts(tokenizer, [Prompt("", messages)], SYSTEM_PROMPT, 10**6).ids[0])

    words = WORDS.split()
    texts = []
    for i in range(job.prompts * job.steps):
        text, at = f"Number {i}:", i
        while length(text) < job.prompt_tokens:
            text, at = f"{text} {words[at % len(words)]}", at + 1
        if length(text) != job.prompt_tokens:
            raise SystemExit(
                f"no prompt of {job.prompt_tokens} tokens can be made: with its template, one has {length(text)} at least"
            )
        texts.append(text)
    return texts


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(job: Job, pipe: Connection) -> None:
    """train_policy.run, stopped after each step by the function that picks the step's samples; its completions are stored."""
    from grpo_safe import models, rollout
    from grpo_safe.stages import train_policy
    from grpo_safe.stages.train_policy import collecting

    tokenizer = models.load_tokenizer(models.resolve_start(job.policy, None, False, "--policy"))
    rows = [{"prompt": text} for text in prompt_texts(job, tokenizer)]
    (job.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg, run_dir = our_config(job), job.folder / "run"
    gate, pick_samples, sample = Gate(pipe), train_policy.sample_rows, collecting.sample
    stored: list[dict[str, Any]] = []

    def first_sample(decode: Any, policy: Any, *rest: Any) -> Any:
        if not stored:
            start = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
            torch.save(start if job.tuning == "lora" else {}, job.folder / "start.pt")
        return sample(decode, policy, *rest)

    def end_of_step(found: Any, scores: Any, advantages: torch.Tensor, *rest: Any) -> Any:
        stored.append(
            {
                "users": [p.text for p in found.prompts],
                "prompt_ids": [i[m.bool()].tolist() for i, m in zip(found.prompt_ids, found.prompt_mask, strict=True)],
                "completion_ids": found.completion_ids.tolist(),
            }
        )
        if found.completion_ids.shape[1] != job.new_tokens or not bool(found.completion_mask.all()):
            raise SystemExit(f"expected {job.new_tokens} tokens in every completion")
        (job.folder / "rollouts.json").write_text(json.dumps(stored))
        metrics = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        parts = {k.removeprefix("seconds/"): v for k, v in metrics.items() if k.startswith("seconds/")}
        last = len(stored) == job.steps
        gate.report(last, advantages=advantages.tolist(), loss=metrics["loss"], grad_norm=metrics["grad_norm"], parts=parts)
        return pick_samples(found, scores, advantages, *rest)

    collecting.sample, train_policy.sample_rows = first_sample, end_of_step  # type: ignore[assignment]
    rollout.end_tokens = lambda model, tokenizer: set()  # completions of exactly new_tokens tokens
    train_policy.run(cfg, run_dir)


def our_config(job: Job) -> Any:
    """The command's own configuration with what the comparison fixes."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from grpo_safe.checks import typed, validated
    from grpo_safe.cli import STAGES, conf_dir, prepared_overrides

    words = [
        "reward_model=latest", "reward_model_gate=warn", f"store={job.store}", f"policy.start={job.policy}",
        f"policy.system_prompt='{SYSTEM_PROMPT}'", f"policy.lora.enabled={str(job.tuning == 'lora').lower()}",
        f"data.train={job.folder / 'prompts.jsonl'}", f"data.validation={job.folder / 'prompts.jsonl'}",
        f"algo.group_size={job.group_size}", f"algo.kl_coef={KL_COEF}", "algo.tie_spread=0", f"train.steps={job.steps}",
        f"train.prompts_per_step={job.prompts}", f"sampling.max_new_tokens={job.new_tokens}", "train.save_every=null",
        f"optim.lr={LEARNING_RATE[job.tuning]}", "optim.warmup=0", f"policy.dtype={job.dtype}", *job.ours,
    ]  # fmt: skip
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose(config_name=STAGES["train-policy"], overrides=prepared_overrides("train-policy", words))
    run_dir = job.folder / "run"
    OmegaConf.update(cfg, "run_dir", str(run_dir))
    run_dir.mkdir(parents=True)
    return typed(validated("train-policy", cfg))


# --- TRL --------------------------------------------------------------------------------------------------------------


def theirs(job: Job, pipe: Connection) -> None:
    """GRPOTrainer.train, stopped after each step by a callback."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from grpo_safe import models

    start = models.resolve_start(job.policy, None, False, "--policy")
    tokenizer = models.load_tokenizer(start)
    stored = json.loads((job.folder / "rollouts.json").read_text()) if job.replay else []
    users = [u for step in stored for u in step["users"][:: job.group_size]] or prompt_texts(job, tokenizer)
    chats = [[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": u}] for u in users]
    texts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    rewards, processing = trl_rewards(job)
    rows = job.trl_rows or job.rows
    micro_batches = job.rows // rows
    settings: dict[str, Any] = dict(
        use_cpu=not torch.cuda.is_available(), bf16=False, fp16=False, gradient_checkpointing=False,
        use_vllm=False, use_transformers_continuous_batching=False, beta=KL_COEF, epsilon=0.2, loss_type="grpo",
        scale_rewards="group", use_bias_correction_kl=False, num_iterations=1, num_generations=job.group_size,
        per_device_train_batch_size=rows, gradient_accumulation_steps=micro_batches, steps_per_generation=micro_batches,
        max_completion_length=job.new_tokens,
        generation_kwargs={"min_new_tokens": job.new_tokens}, temperature=1.0, top_p=1.0, top_k=0,
        reward_weights=[1.0 / len(rewards)] * len(rewards), max_steps=job.steps, learning_rate=LEARNING_RATE[job.tuning],
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, shuffle_dataset=False, dataloader_num_workers=0,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, log_completions=False, seed=0,
    )  # fmt: skip
    args = GRPOConfig(str(job.folder / "trl"), **settings | job.trl)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if job.tuning == "lora" else None
    policy = models.load_causal_lm(start, job.dtype)
    dataset = Dataset.from_dict({"prompt": texts, "user": users})
    trainer = GRPOTrainer(
        policy, rewards, args, dataset, processing_class=tokenizer, peft_config=lora, reward_processing_classes=processing
    )
    if job.no_end_token:
        trainer.eos_token_ids = [policy.config.vocab_size]  # one past the last
        trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = trainer.eos_token_ids
    if job.replay:
        trainer.model.load_state_dict(torch.load(job.folder / "start.pt"), strict=False)
        replayed = iter(stored)
        trainer.rollout_func = lambda prompts, trainer: {**next(replayed), "logprobs": None}
    advantages: list[list[float]] = []
    sampling: list[float] = []
    generate = trainer._generate_single_turn

    def timed(*words: Any, **named: Any) -> Any:
        began = time.perf_counter()
        found = generate(*words, **named)  # lists of tokens: the device has answered
        sampling.append(time.perf_counter() - began)
        return found

    trainer._generate_single_turn = timed
    prepare = trainer._generate_and_score_completions

    def recorded(inputs: Any) -> Any:
        found = prepare(inputs)
        advantages.append(found["advantages"].tolist())
        if not job.replay and int(found["completion_mask"].sum()) != job.rows * job.new_tokens:
            raise SystemExit(f"expected {job.new_tokens} tokens in every completion")
        return found

    trainer._generate_and_score_completions = recorded
    gate = Gate(pipe)

    class Stop(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:  # the last of a step's calls
                last = state.global_step == job.steps
                parts = {"sampling": sampling[-1]} if sampling else {}
                gate.report(last, advantages=advantages[-1], loss=logs["loss"], grad_norm=float(logs["grad_norm"]), parts=parts)

    trainer.remove_callback(PrinterCallback)  # a screenful a step
    trainer.add_callback(Stop())
    trainer.train()


def trl_rewards(job: Job) -> tuple[list[Any], list[Any] | None]:
    """TRL's reward functions: K columns of our K-head model, which runs once a step, or K models of one head each."""
    from transformers import AutoModelForSequenceClassification

    from grpo_safe import models
    from grpo_safe.models.reward_model import open_reward_model, score_texts
    from grpo_safe.records import Prompt
    from grpo_safe.versions import checkpoint

    version = checkpoint.open_version(job.store, "reward-model", "latest", "quick", "reward_model", None)
    if job.trl_rewards == "models":
        tokenizer = models.load_tokenizer(models.Start(str(version.path), str(version.path), {}))
        heads = [
            AutoModelForSequenceClassification.from_pretrained(version.path, num_labels=1, ignore_mismatched_sizes=True).eval()
            for _ in range(job.objectives)
        ]
        return list(heads), [tokenizer for _ in heads]
    reward_model = open_reward_model(version, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    seen: dict[str, Any] = {}

    def column(k: int) -> Any:
        def reward(completions: list[str], user: list[str], **_: Any) -> list[float]:
            if k == 0:
                prompts = [Prompt("", [{"role": "user", "content": u}]) for u in user]
                seen["scores"] = score_texts(reward_model, prompts, [c.strip() for c in completions], 8192)[0]
            return seen["scores"][:, k].tolist()

        reward.__name__ = names_of(job.objectives)[k]
        return reward

    return [column(k) for k in range(job.objectives)], None
