"""Every knob of the three stages: its type, its unit, the reason for its default. No torch here.

A primary config in `conf/` is merged into one of the three classes at the bottom, so a typo in a YAML file is refused by the
same check as one on the command line. Stages receive the typed object; the rooms below them get plain arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class LaunchConfig:
    """How many processes, and how DeepSpeed shards among them."""

    strategy: str = "single"  # single | zero1 | zero2 | zero3 | zero3_offload
    processes: int | None = None  # null: one per visible GPU (one, where there is no GPU)
    freeze_only: bool = False  # write config.yaml for an outside launcher (torchrun, Slurm), start nothing
    device: str = "auto"  # auto | cpu | cuda
    param_persistence_threshold: int = 100_000  # ZeRO-3: tensors up to this many elements stay whole (DeepSpeed's default)
    bucket_elements: int = 50_000_000  # ZeRO: elements reduced or gathered at once
    timeout_minutes: int = 60  # how long a rank waits for the others before it gives up


@dataclass
class TrackingConfig:
    """Where figures go besides metrics.jsonl and the terminal."""

    kind: str = "local"  # local | wandb
    project: str = "grpo-safe"
    mode: str = "online"  # wandb: online | offline
    samples: bool = False  # send prompts and completions to wandb: off, they may be attacker-shaped or private
    sample_count: int = 4  # completions written to samples.jsonl each step


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): W + (alpha / r) B A."""

    enabled: bool = True
    r: int = 16
    alpha: int = 32  # alpha = 2 r, as public GRPO runs set it
    dropout: float = 0.0  # 0, or log-probs at sampling and in the update differ
    target_modules: Any = "all-linear"  # all-linear, a layer's name or a list of them, or a regular expression of whole names


@dataclass
class OptimConfig:
    """AdamW, a warm-up, a schedule."""

    lr: float = 2.0e-5
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1.0e-8
    schedule: str = "cosine"  # constant | linear | cosine
    warmup: float = 0.1  # share of all optimizer steps
    min_lr: float = 0.0  # where linear and cosine end, as a share of lr
    max_grad_norm: float = 1.0
    critic_lr_scale: float = 3.0  # PPO's value head learns at lr times this (arXiv 2307.04964)


@dataclass
class ColumnsConfig:
    """Which column of a source holds what. A row function (data.row_function) may make these columns first."""

    prompt: str = "prompt"  # a string, or a list of {role, content}
    response: str = "response"
    chosen: str = "chosen"
    rejected: str = "rejected"
    objective: str = "objective"  # of a preference row
    kind: str = "kind"  # optional: harmful | lookalike | everyday | benign, for refusal rates
    labels: str = "labels"  # optional: one column with {objective: number}


@dataclass
class DataObjectiveConfig:
    """One labelled objective of a data set."""

    range: list[float] = field(default_factory=lambda: [0.0, 1.0])  # [lo, hi] of the raw label; [hi, lo] inverts
    column: str | None = None  # column of the raw label; null: the labels column, under the objective's name
    binary: bool = False  # labels are 0 or 1 after mapping: the card adds AUC and calibration error
    weight: float = 1.0  # what train-policy gives this head unless told otherwise; 0 where more is not better (verbosity)


AS_TRAINED = "as_trained"  # data.name of an evaluation that takes the policy's data set


@dataclass
class DataConfig:
    """Rows to fit on, prompts to train and evaluate on."""

    name: str = MISSING
    licence: str = MISSING  # goes into the manifest of what is trained on it
    train: Any = (
        MISSING  # one source or a list: PATH (.jsonl .json .csv .tsv .parquet) | FOLDER | hub:OWNER/NAME:SPLIT | embedded:SPLIT
    )
    validation: Any = None  # null: validation_fraction of the train prompts
    heldout: Any = None  # eval's prompts; null: the validation prompts
    validation_fraction: float = 0.1  # of prompts, not of rows
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    objectives: dict[str, DataObjectiveConfig] = field(default_factory=dict)
    pair_objective: str | None = None  # the objective of every preference row, where no column says it
    row_function: str | None = None  # import path of (row: dict) -> list[dict], for shapes that columns cannot express
    limit: int | None = None  # at most so many rows, or prompts, of each split, drawn with the seed
    overlong: str = (
        "error"  # error | skip | cut: a prompt that the policy's context cannot hold; cut: the left side of its text goes
    )


@dataclass
class BackboneConfig:
    """The model that the reward model starts from."""

    start: str = "embedded:all-MiniLM-L6-v2"  # a folder, a hub name, or embedded:NAME
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "float32"  # float32 | bfloat16: of the forward pass; trained weights stay float32
    attn_implementation: str = "sdpa"
    max_length: int = 256  # tokens of prompt and response; the prompt's left side goes first
    gradient_checkpointing: bool | str = False  # false | true | selective, as policy.gradient_checkpointing
    dropout: float | None = None  # null: the backbone's own
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(enabled=False))


@dataclass
class TrainRMLoopConfig:
    """The fitting loop."""

    epochs: float = 4.0
    rows_per_step: int = 16  # rows of one optimizer step, over all processes
    micro_batch_tokens: int = 8192  # tokens of one forward on one process, padding counted
    calibrate: bool = True  # affine fit with positive slope on half of the validation prompts
    bootstrap: int = 1000  # resamples of the card's intervals
    log_every: int = 10
    save_every: int | None = None  # optimizer steps between resume states; null: one, when the fit is done
    max_skipped: int = 3  # steps in a row whose gradient is not finite, each left out, before the run stops


@dataclass
class PolicyConfig:
    """The model that is trained, and how it is spoken to."""

    start: str = "embedded:SmolLM2-135M-Instruct"  # a folder, a hub name, embedded:NAME, or a published version (v3)
    revision: str | None = None
    trust_remote_code: bool = False
    system_prompt: str | None = "You are a helpful, honest and harmless assistant."  # null: none is sent
    dtype: str = "float32"  # float32 | bfloat16
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool | str = False  # false | selective (keeps matrix products) | true (keeps layers' inputs)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class LimitConfig:
    """An objective's mean score must reach a threshold, instead of, or beside, its weight."""

    at_least: float = MISSING  # of the calibrated score
    confidence: float | None = None  # 0.9: the lower 90% bound of the mean must reach it; null: the mean


@dataclass
class ObjectiveConfig:
    """One thing that is scored: a head of the reward model, or a plain function."""

    weight: float | None = (
        None  # the reward is sum w_k s_k / sum |w_k|; 0: scored and logged only; null: what the data set says of its head (1)
    )
    weight_end: float | None = None  # the weight moves in a line from `weight` to this over the run; null: it stays
    function: str | None = None  # import path of (prompts, completions) -> list of numbers; null: the head of this name
    limit: LimitConfig | None = None


@dataclass
class AlgoConfig:
    """GRPO (arXiv 2402.03300) over K objectives; defaults as in DeepSeekMath where the paper is silent.

    aggregation, calibration, normalization, constraint, filter, loss and reference are slots: a name, {name: NAME, number: ...} or the import path of a
    function of your own. docs/methods.md lists them; conf/algo/*.yaml are the published methods.
    """

    name: str = "grpo"
    group_size: int = 8  # G, completions per prompt
    order: str = "aggregate_first"  # aggregate_first: K scores -> reward -> advantages | normalize_first: advantages per objective, then combined
    aggregation: Any = "linear"
    calibration: Any = (
        "none"  # none | difference | threshold: the reward follows a confidence that each completion is asked to state
    )
    normalization: Any = "group_std"
    whiten: bool = False  # normalize_first: the combined advantages are whitened over the batch (GDPO)
    constraint: Any = "lagrangian"  # how multipliers follow the limits, where an objective has one
    filter: Any = "everything"  # which completions of a group the loss sees
    tau: float = 0.0  # softens the division: sqrt(std^2 + tau^2)
    tie_spread: float = 1.0e-3  # a group whose reward std is below this gets advantage 0, and is counted
    resample_ties: int = 0  # sample on, so many rounds at most, until no group is tied (DAPO's dynamic sampling); 0: keep ties
    loss: Any = "clip"  # clip | gspo | cispo | ppo | dpo | tdpo | group_robust | gflow_dpo | pro | best_of_group | a_lol
    clip_eps: float = 0.2
    clip_eps_high: float | None = None  # the upper side, where it differs (clip-higher); null: clip_eps
    reduction: str = "sequence_mean"  # sequence_mean | token_mean | constant
    kl_coef: float = 0.04  # against the reference; 0: no reference is run
    reference: Any = "start"  # start | ema | refresh | soup: what the KL term is measured against
    kl_estimator: str = "k3"  # k1 | k2 | k3
    kl_in: str = "loss"  # loss | reward
    entropy_coef: float = 0.0
    sampler_cap: float | None = (
        None  # truncated importance sampling min(pi_old / pi_sampler, cap), for an engine of another precision
    )
    updates_per_rollout: int = 1
    minibatches: int = 1  # optimizer steps per update of one rollout
    truncated: str = "keep"  # keep | mask | penalize | soft_overlong: completions that hit sampling.max_new_tokens
    truncation_penalty: float = 0.5  # penalize: taken off the reward; soft_overlong: the most that is taken off
    overlong_share: float = 0.2  # soft_overlong: the last share of max_new_tokens over which the penalty grows


@dataclass
class SamplingConfig:
    """How completions are drawn."""

    max_new_tokens: int = 256
    max_prompt_tokens: int | None = None  # null: what the context leaves; a longer prompt: see data.overlong
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 128  # completions decoded at once on one process


@dataclass
class EvalSamplingConfig:
    """The same for an evaluation; null: as the policy was trained, filled in from its manifest when the config is frozen."""

    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    batch_size: int = 128


@dataclass
class RolloutConfig:
    """The engine that samples."""

    engine: str = "native"  # native | generate | vllm | dataset: answers that data.train holds
    cuda_graphs: bool = True  # native on a GPU: a decoding step is captured once per shape and replayed; its buffers stay allocated between rollouts
    sampler_cap: float | None = (
        None  # conf/algo/grpo.yaml takes algo.sampler_cap from here: an engine of other numerics brings its own
    )
    dtype: str | None = None  # vllm: float32 | bfloat16; null: the policy's
    gpu_memory: float = 0.3  # vllm: share of a GPU's memory for its weights and cache (what TRL takes beside its trainer)
    kv_cache_gb: float | None = None  # vllm: size of its cache; null: what gpu_memory leaves, on a CPU 1 GB
    sleep: bool = False  # vllm on a GPU: free its weights and cache outside of sampling
    eager: bool = False  # vllm: no CUDA graphs, so a quicker start; always so on a CPU


@dataclass
class TrainPolicyLoopConfig:
    """The training loop."""

    steps: int = 200
    prompts_per_step: int = 16  # B, over all processes
    micro_batch_tokens: int = 4096  # tokens of one training forward on one process, a prompt that is shared counted once
    packed: bool = (
        True  # the completions of a group share their prompt's tokens; false, or an architecture not proven: a row each
    )
    score_batch_tokens: int = 8192  # tokens of one reward-model forward on one process
    scores: str = (
        "model"  # model | labels: what scores the answers of rollout=dataset; labels: the data's own, for objectives with a head
    )
    profile: bool = False  # log each phase's time against the machine's floor, and show a table at the end
    save_every: int | None = 50  # steps between resume states; null: none
    keep_states: int = 2  # resume states kept
    eval_every: int | None = None  # steps between evaluations on data.validation
    eval_prompts: int = 32  # how many of them
    max_skipped: int = 3  # steps in a row whose gradient is not finite, each left out, before the run stops


@dataclass
class ExportConfig:
    """What a policy version holds."""

    merged: bool = False  # publish merged weights also where an adapter would do
    dtype: str | None = (
        None  # of whole weights; null: what loses nothing, float32 wherever an adapter is merged or float32 weights trained
    )


@dataclass
class EvalLoopConfig:
    """The comparison."""

    prompts: int | None = None  # at most so many held-out prompts; null: all
    completions: int = 1  # per prompt
    bootstrap: int = 2000
    samples: int = 12  # side-by-side samples in the report
    score_batch_tokens: int = 8192


@dataclass
class TrainRMConfig:
    command: str = "train-rm"
    seed: int = 0
    name: str = "default"
    store: str = "checkpoints"  # root of published versions
    run_dir: str = MISSING
    resume: str | None = None  # a run directory, or latest
    verify: str = "full"  # full | quick: hash the files that are read, or check their sizes
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainRMLoopConfig = field(default_factory=TrainRMLoopConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class TrainPolicyConfig:
    command: str = "train-policy"
    seed: int = 0
    name: str = "default"
    store: str = "checkpoints"
    run_dir: str = MISSING
    resume: str | None = None
    verify: str = "full"
    reward_model: str = "latest"  # latest | vN | PATH
    reward_model_sha256: str | None = None  # content hash, filled when the config is frozen
    reward_model_gate: str = "error"  # error | warn: what happens when a head is no better than the mean
    reward_model_dtype: str = "float32"  # float32 | bfloat16: a large reward model wants bfloat16
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objectives: dict[str, ObjectiveConfig] = field(default_factory=dict)  # empty: every head, by the weight of its data set (1)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainPolicyLoopConfig = field(default_factory=TrainPolicyLoopConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class EvalConfig:
    command: str = "eval"
    seed: int = 0
    name: str = "default"
    store: str = "checkpoints"
    run_dir: str = MISSING
    resume: str | None = None
    verify: str = "full"
    policy: str = "latest"  # latest | vN | PATH
    policy_sha256: str | None = None  # content hash, filled when the config is frozen
    reward_model: str | None = None  # null: the one that the policy was trained against
    reward_model_dtype: str = "float32"
    reward_model_sha256: str | None = None
    dtype: str = "float32"
    data: DataConfig = field(default_factory=DataConfig)
    sampling: EvalSamplingConfig = field(default_factory=EvalSamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    eval: EvalLoopConfig = field(default_factory=EvalLoopConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    trust_remote_code: bool = False  # run code that comes with the policy or its start (policy.trust_remote_code of its training)


SCHEMAS = {"train-rm": TrainRMConfig, "train-policy": TrainPolicyConfig, "eval": EvalConfig}
