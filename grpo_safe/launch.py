"""Validate, freeze config.yaml into the run directory, start one process per device on that file, say what went wrong.

Composed once here: the ranks never run Hydra, so they cannot disagree.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo_safe.checks import load_frozen, validated
from grpo_safe.config import AS_TRAINED, SCHEMAS, DataConfig
from grpo_safe.errors import StageError, UserError
from grpo_safe.lifetime import die_with_parent
from grpo_safe.versions import checkpoint

MODULES = {"train-rm": "train_rm", "train-policy": "train_policy", "eval": "evaluate"}
OUTSIDE = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def launch(command: str, composed: DictConfig, overrides: list[str]) -> None:
    """One run of a command. Raises UserError (nothing was started) or StageError (a worker failed)."""
    outside = next((name for name in OUTSIDE if name in os.environ), None)
    if outside and not composed.launch.freeze_only:
        raise UserError(
            f"{outside} is set: an outside launcher started this process, and every rank would make a run of its own. First, once: "
            f"grpo-safe {command} launch.freeze_only=true ...; then on the nodes: torchrun ... -m grpo_safe.stages {MODULES[command]} RUN_DIR/config.yaml"
        )
    cfg = _resumed(command, composed, overrides) if composed.resume else validated(command, composed)
    run_dir = Path(cfg.run_dir)
    _resolve_versions(command, cfg)
    processes = 1 if cfg.launch.freeze_only else _processes(cfg)
    _check_divides(cfg, processes)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "error.json").unlink(missing_ok=True)
    frozen = run_dir / "config.yaml"
    frozen.write_text(OmegaConf.to_yaml(cfg))
    if cfg.launch.freeze_only:
        print(run_dir)
        print(
            f"torchrun --nnodes NODES --nproc-per-node GPUS ... -m grpo_safe.stages {MODULES[command]} {frozen}", file=sys.stderr
        )
        return
    print(f"grpo-safe {command}: run directory {run_dir}", flush=True)
    code = run_worker(_worker_command(MODULES[command], frozen, processes), _worker_environment(cfg, processes))
    if code != 0:
        _raise_worker_error(run_dir, code)


def show_checkpoints(argv: list[str]) -> None:
    """Print the table of published versions and the tree of what was made from what."""
    unknown = [word for word in argv if not word.startswith("store=")]
    if unknown:
        raise UserError(f"checkpoints {unknown[0]}: expected nothing, or store=PATH")
    store = Path(argv[0].removeprefix("store=")) if argv else Path("checkpoints")
    from grpo_safe.report.lineage import print_versions

    print_versions(store, [v.manifest for v in checkpoint.all_versions(store)])


# --- before anything starts -------------------------------------------------------------------------------------------


def _resumed(command: str, composed: DictConfig, overrides: list[str]) -> DictConfig:
    """The run's frozen config with only the overrides typed now, and what they changed on screen."""
    run_dir = _run_to_resume(command, composed)
    frozen_path = run_dir / "config.yaml"
    if not frozen_path.is_file():
        raise UserError(f"resume={composed.resume}: {frozen_path} does not exist; expected a run directory, or latest")
    if command != "eval" and not any(run_dir.glob("state/step-*")):
        raise UserError(
            f"resume={composed.resume}: no resume state in {run_dir / 'state'}; the run wrote none (train.save_every), start it anew"
        )
    frozen = load_frozen(command, frozen_path)
    merged = DictConfig(OmegaConf.to_container(frozen))  # plain: an objective may be new
    absent = object()
    for override in overrides:
        key = re.sub(r"^[+~]*", "", override).partition("=")[0]
        if key == "resume":
            continue
        value = OmegaConf.select(composed, key, default=absent)
        if (override.startswith("+") and not override.startswith("++")) or value is absent:
            raise UserError(f"{override}: an overlay cannot be added to a run that is resumed; type the keys that shall change")
        OmegaConf.update(merged, key, value, force_add=True)
        if f"{key}_sha256" in merged:  # another version is wanted: its hash is not the frozen one
            merged[f"{key}_sha256"] = None
    merged.resume, merged.run_dir = str(run_dir), str(run_dir.absolute())  # the folder may have been moved
    merged = validated(command, merged)
    changed = _differences(frozen, merged)
    print(f"resume {run_dir}" + (": " + ", ".join(changed) if changed else ": same config"))
    empty = Path(composed.run_dir)
    if empty.is_dir() and all(p.name == "cli.log" and not p.stat().st_size for p in empty.iterdir()):  # Hydra's, and nothing else
        shutil.rmtree(empty)
    return merged


def _run_to_resume(command: str, composed: DictConfig) -> Path:
    if composed.resume != "latest":
        return Path(composed.resume)
    runs = Path("runs") / command / str(composed.name)
    candidates = sorted(p.parent for p in runs.glob("**/state") if any(p.glob("step-*")))
    if not candidates:
        raise UserError(f"resume=latest: no run under {runs} has a resume state")
    return max(candidates, key=lambda p: newest_state(p).stat().st_mtime)


def newest_state(run_dir: Path) -> Path:
    return max((run_dir / "state").glob("step-*"))


def _differences(before: DictConfig, after: DictConfig) -> list[str]:
    def flat(cfg: DictConfig) -> dict[str, object]:
        rows: dict[str, object] = {}

        def walk(node: object, prefix: str) -> None:
            if isinstance(node, dict):
                for key, value in node.items():
                    walk(value, f"{prefix}{key}.")
            else:
                rows[prefix[:-1]] = node

        walk(OmegaConf.to_container(cfg, resolve=True), "")
        return rows

    old, new = flat(before), flat(after)
    return [f"{k}: {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v and k not in ("resume", "run_dir")]


def _resolve_versions(command: str, cfg: DictConfig) -> None:
    """Names of published versions -> path and content hash, verified once, here, for all ranks."""
    store = Path(cfg.store)
    if command == "train-policy":
        cfg.reward_model, cfg.reward_model_sha256 = _pinned(cfg, "reward-model", cfg.reward_model, cfg.reward_model_sha256)
        if re.fullmatch(r"latest|v\d+", cfg.policy.start):
            cfg.policy.start = str(checkpoint.open_version(store, "policy", cfg.policy.start, cfg.verify, "policy.start").path)
        _resolve_soup(store, cfg)
    if command == "eval":
        cfg.policy, cfg.policy_sha256 = _pinned(cfg, "policy", cfg.policy, cfg.policy_sha256)
        inherit(cfg, checkpoint.locate(store, "policy", cfg.policy, "policy"))
        judge = cfg.reward_model or _reward_model_of(checkpoint.locate(store, "policy", cfg.policy, "policy"), store)
        cfg.reward_model, cfg.reward_model_sha256 = _pinned(cfg, "reward-model", judge, cfg.reward_model_sha256)


def inherit(cfg: DictConfig, policy: checkpoint.Version) -> None:
    """What an evaluation is not told it takes from the policy's manifest: how completions are drawn, and the data set whose held-out prompts they answer."""
    trained = OmegaConf.create(policy.manifest["config"])
    for key in cfg.sampling:
        if cfg.sampling[key] is None:
            cfg.sampling[key] = OmegaConf.select(trained, f"sampling.{key}")
    if AS_TRAINED in (cfg.data.name, cfg.data.train):
        if OmegaConf.select(trained, "data") is None:
            raise UserError(f"{policy.path}: its manifest names no data set; choose one: data=NAME")
        trained.data.limit = None  # of the prompts that were trained on
        plain = OmegaConf.to_container(OmegaConf.structured(DataConfig(name=AS_TRAINED, licence=AS_TRAINED, train=AS_TRAINED)))
        told = _other(OmegaConf.to_container(cfg.data), plain)
        cfg.data = OmegaConf.merge(OmegaConf.structured(DataConfig), trained.data, told)
    lacking = [key for key in ("max_new_tokens", "temperature", "top_p") if cfg.sampling[key] is None]
    if lacking:
        raise UserError(f"{policy.path}: its manifest does not say how it was sampled; give sampling.{lacking[0]}=NUMBER")
    print(
        f"grpo-safe eval: policy {policy.name}, data {cfg.data.name}, {cfg.sampling.max_new_tokens} new tokens at temperature {cfg.sampling.temperature:g}, "
        f"top_p {cfg.sampling.top_p:g}"
    )


def _other(now: Any, default: Any) -> dict[str, Any]:
    """The keys of a config whose values are not the default's."""
    found = {key: _other(value, default.get(key, {})) if isinstance(value, dict) else value for key, value in now.items()}
    return {key: value for key, value in found.items() if (value if isinstance(now[key], dict) else value != default.get(key))}


def _resolve_soup(store: Path, cfg: DictConfig) -> None:
    """Published versions among the policies of algo.reference={name: soup, policies: [...]} -> their paths."""
    if not OmegaConf.is_dict(cfg.algo.reference) or not OmegaConf.is_list(cfg.algo.reference.get("policies")):
        return
    for i, policy in enumerate(cfg.algo.reference.policies):
        if re.fullmatch(r"latest|v\d+", str(policy)):
            found = checkpoint.open_version(store, "policy", policy, cfg.verify, f"algo.reference.policies[{i}]")
            cfg.algo.reference.policies[i] = str(found.path)


def _pinned(cfg: DictConfig, kind: str, reference: str, frozen: str | None) -> tuple[str, str]:
    """Path and content hash of a version, as the frozen config names it."""
    found = checkpoint.open_version(Path(cfg.store), kind, reference, cfg.verify, kind.replace("-", "_"), frozen)
    return str(found.path), str(found.manifest["content_sha256"])


def _reward_model_of(policy: checkpoint.Version, store: Path) -> str:
    """Path of the reward model that a policy was trained against: the one with its content, whatever its number in this store."""
    for parent in policy.manifest["parents"]:
        if parent["kind"] == "reward-model":
            found = checkpoint.find_content(store, "reward-model", parent["content_sha256"])
            if found is None:
                raise UserError(
                    f"{policy.path} was trained against reward model v{parent['version']:03d} with content {parent['content_sha256'][:12]}, and "
                    f"{store / 'reward-model'} holds no version of that content; name one: reward_model=PATH or vN"
                )
            return str(found.path)
    raise UserError(f"{policy.path}: its manifest names no reward model; give one: reward_model=vN")


def _processes(cfg: DictConfig) -> int:
    """One process per visible device; UserError where more are asked for than there are."""
    if cfg.launch.strategy == "single":
        return 1
    asked = cfg.launch.processes
    if cfg.launch.device == "cpu":
        return asked or 1
    devices = _cuda_devices()
    if devices == 0 and cfg.launch.device == "cuda":
        raise UserError("launch.device=cuda: no CUDA device is visible; expected one, or launch.device=cpu")
    if devices and asked and asked > devices:
        raise UserError(f"launch.processes={asked}: {devices} CUDA devices are visible; start one process a device at most")
    cores = len(os.sched_getaffinity(0))
    if not devices and asked and asked > cores:
        raise UserError(f"launch.processes={asked}: no CUDA device and {cores} CPU cores; start one process a core at most")
    return asked or devices or 1


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()


def _check_divides(cfg: DictConfig, processes: int) -> None:
    prompts = OmegaConf.select(cfg, "train.prompts_per_step")
    if prompts is not None and prompts % processes:
        raise UserError(
            f"train.prompts_per_step={prompts} does not divide by launch.processes={processes}: a group lives on one process; "
            f"choose a multiple of {processes}"
        )


# --- workers ----------------------------------------------------------------------------------------------------------


def _worker_command(module: str, frozen: Path, processes: int) -> list[str]:
    entry = ["-m", "grpo_safe.stages", module, str(frozen)]
    if processes == 1:
        return [sys.executable, *entry]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *entry]


def _worker_environment(cfg: DictConfig, processes: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    environment.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::DeprecationWarning")
    environment.setdefault("DS_LOG_LEVEL", "error")
    if processes == 1 and cfg.launch.strategy != "single":  # a group of one, without torchrun
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if cfg.launch.device == "cpu":  # accelerate takes a visible GPU whatever it is told
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if processes > 1:  # ranks that share cores must not spin while they wait for each other
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        environment.setdefault("TORCHELASTIC_ERROR_FILE", str(Path(cfg.run_dir) / "torchelastic.json"))
    return environment


def run_worker(words: list[str], environment: dict[str, str]) -> int:
    """Start the worker (or torchrun, which starts one a device), wait for it, and pass on to it what ends this process; returns its exit code.

    Raises KeyboardInterrupt or SystemExit (128 + signal) where a signal ended the run: nobody trains on after the command is gone.
    """
    worker = subprocess.Popen(words, env=environment, start_new_session=True, preexec_fn=die_with_parent)
    caught: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        caught.append(number)
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, number if len(caught) == 1 else signal.SIGKILL)  # a second one does not wait

    mine = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if mine}
    try:
        code = worker.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not caught:
        return code
    if caught[0] == signal.SIGINT:
        raise KeyboardInterrupt
    print(f"grpo-safe: stopped by {signal.Signals(caught[0]).name}", file=sys.stderr)
    raise SystemExit(128 + caught[0])


def _raise_worker_error(run_dir: Path, code: int) -> None:
    path = run_dir / "error.json"
    if not path.is_file():
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise StageError(f"the stage {how} and left no error.json in {run_dir}: somebody killed it, or it ran out of memory")
    entry = json.loads(path.read_text())
    if entry["kind"] == "user":
        raise UserError(entry["message"])
    if entry["kind"] == "stage":
        raise StageError(f"{entry['message']} (run directory {run_dir})")
    raise StageError(f"{entry['message']} (rank {entry['rank']}; traceback above; run directory {run_dir})")


assert set(MODULES) == set(SCHEMAS)
