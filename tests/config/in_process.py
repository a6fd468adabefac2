"""The command line without a process of its own: tests of configs and of bad input, at the price of a function call."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from grpo_safe import cli, launch
from grpo_safe.versions import checkpoint

CONF = cli.conf_dir()


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def grpo_safe(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> Ended:
    """`grpo-safe WORDS` in this process."""
    GlobalHydra.instance().clear()
    patch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it: put back when the test ends
    patch.setattr(sys, "argv", ["grpo-safe", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return Ended(int(left.value.code or 0), out, err)


def workers_in_process(patch: pytest.MonkeyPatch) -> None:
    """The launcher calls the stage instead of starting a process on it."""
    from grpo_safe.stages.__main__ import main

    patch.setattr(launch, "run_worker", lambda words, env: main(words[words.index("grpo_safe.stages") + 1 :]))


def composed(command: str, *words: str, conf: Path = CONF, run_dir: object = "run") -> DictConfig:
    """What Hydra makes of the words, before any check."""
    GlobalHydra.instance().clear()
    overrides = [*cli.prepared_overrides(command, list(words)), f"run_dir={run_dir}"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf)):
        return compose(config_name=cli.STAGES[command], overrides=overrides)


def conf_with(folder: Path, name: str, change: Callable[[str], str]) -> Path:
    """A copy of conf/ in which the text of one file is changed."""
    copy = folder / "conf"
    shutil.copytree(CONF, copy)
    before = (copy / name).read_text()
    after = change(before)
    assert after != before
    (copy / name).write_text(after)
    return copy


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of everything in a config that is not a group of keys."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, throw_on_missing=False)
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix


def fake_reward_model(store: Path, heads: tuple[str, ...] = ("safety", "politeness"), low: float = 0.2) -> checkpoint.Version:
    """A published version with a manifest and no weights: opening it as a model would fail."""
    r2 = {"value": 0.5, "low": low, "high": 0.7}
    manifest = {
        "command": "train-rm", "config": {"name": "fake", "seed": 0},
        "objectives": [{"name": h, "range": [0, 1], "scale": "absolute", "slope": 1.0, "offset": 0.0, "temperature": 4.0} for h in heads],
        "scoring": {"formatter": "pair", "max_length": 64},
        "metrics": {"objectives": {h: {"n": 50, "n_pairs": 0, "r2": r2} for h in heads}},
        "parents": [], "base": {"start": "embedded:tiny-bert", "revision": None},
        "data": {"name": "fake", "licence": "none", "files": []},
    }  # fmt: skip
    return checkpoint.publish(store, "reward-model", lambda draft: _no_weights(draft, heads), manifest)


def fake_policy(store: Path, parents: tuple[checkpoint.Version, ...] = ()) -> checkpoint.Version:
    """The same for a policy."""
    manifest = {
        "command": "train-policy",
        "config": {
            "name": "fake", "seed": 0, "sampling": {"max_new_tokens": 16, "max_prompt_tokens": None, "temperature": 0.7, "top_p": 1.0},
            "data": {"name": "embedded", "licence": "Apache-2.0", "train": "embedded:train", "heldout": "embedded:heldout"},
        }, "objectives": [{"name": "safety", "weight": 1.0}],
        "metrics": {"reward/mean": 0.25}, "parents": [p.link for p in parents],
        "base": {"start": "embedded:tiny-llama", "revision": None}, "system_prompt": None,
        "data": {"name": "fake", "licence": "none", "files": []}, "layout": {"layout": "full"},
    }  # fmt: skip
    return checkpoint.publish(store, "policy", lambda draft: _no_weights(draft, ("policy",)), manifest)


def _no_weights(draft: Path, words: tuple[str, ...]) -> None:
    (draft / "model.safetensors").write_bytes(b"no weights " * 20)
    (draft / "config.json").write_text('{"names": "' + " ".join(words) + '"}')
