"""Every YAML file composes for the commands it is meant for, nothing is hidden, and nothing wrong passes."""

from __future__ import annotations

import math
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from in_process import CONF, composed, conf_with, leaves
from omegaconf import DictConfig, OmegaConf

from grpo_safe import cli
from grpo_safe.checks import CHOICES, NOT_NEGATIVE, POSITIVE, typed, validated
from grpo_safe.config import SCHEMAS, LimitConfig
from grpo_safe.errors import UserError
from grpo_safe.rewards import Objectives
from grpo_safe.stages.train_policy.method import build_method

COMMANDS = tuple(SCHEMAS)
ROOT = Path(__file__).parents[2]
GIVEN = {"data/files": ("data.train=x.jsonl",), "data/base": ("data.train=x.jsonl", "data.name=x", "data.licence=none")}

# group -> the commands in whose defaults list it stands; overlays are in none
GROUPS = {
    "data": COMMANDS, "launch": COMMANDS, "tracking": COMMANDS, "rollout": ("train-policy", "eval"),
    "objectives": ("train-policy",), "algo": ("train-policy",),
}  # fmt: skip
ONLY = {"rollout/dataset": ("train-policy",), "data/as_trained": ("eval",)}  # files that fewer commands take than their group
OVERLAYS = {"model": ("train-policy",), "backbone": ("train-rm",), "sweep": COMMANDS}


def cases() -> list[Any]:
    """(file, command, words) for each use of each file below conf/."""
    found = []
    for path in sorted(CONF.rglob("*.yaml")):
        name = path.relative_to(CONF).with_suffix("").as_posix()
        folder, _, option = name.rpartition("/")
        group = folder.split("/")[0]
        if group in GROUPS:
            uses = [(command, f"{folder}={option}") for command in ONLY.get(name, GROUPS[group])]
        elif group in OVERLAYS:
            uses = [(command, f"+{folder}={option}") for command in OVERLAYS[group]]
        elif group in ("debug", "experiment"):
            (command,) = [c for c, stage in cli.STAGES.items() if folder == f"{group}/{stage}"]
            uses = [(command, f"+{group}={option}")]
        elif group == "optim":
            uses = [("train-rm" if option.startswith("reward_model") else "train-policy", f"optim={option}")]
        else:  # a primary config, or what all of them include
            assert group == "" and (name == "common" or name in cli.STAGES.values()), f"conf/{name}.yaml is used by no command"
            uses = [(command, "") for command in COMMANDS if name in ("common", cli.STAGES[command])]
        found += [pytest.param(name, command, word, id=f"{command} {word or name}") for command, word in uses]
    return found


@pytest.mark.parametrize(("name", "command", "word"), cases())
def test_composes_and_validates(name: str, command: str, word: str) -> None:
    cfg = typed(validated(command, composed(command, *([word] if word else []), *GIVEN.get(name, ()))))
    assert isinstance(cfg, SCHEMAS[command]) and cfg.command == command
    option = name.rpartition("/")[2]
    says = {"launch": "launch.strategy", "tracking": "tracking.kind", "rollout": "rollout.engine"}.get(name.split("/")[0])
    assert says is None or OmegaConf.select(OmegaConf.structured(cfg), says) == option  # the file's name is what it holds
    if name.startswith("data/") and option != "base":
        assert cfg.data.name == option


@pytest.mark.parametrize("command", COMMANDS)
def test_every_knob_is_visible(command: str) -> None:
    schema = set(leaves(OmegaConf.structured(SCHEMAS[command])))
    shown = set(leaves(composed(command)))
    assert {key for key in schema - shown if not key.endswith("_sha256")} - {"data.objectives"} == set()
    assert {key for key in shown - schema if not key.startswith("data.objectives.")} == set()


def test_overlays_win_over_defaults_and_the_command_line_over_overlays() -> None:
    cfg = composed("train-policy", "+model=7b", "launch=zero3", "train.prompts_per_step=8")
    assert cfg.policy.start == "Qwen/Qwen2.5-7B-Instruct"
    assert (cfg.launch.strategy, cfg.train.prompts_per_step) == ("zero3", 8)
    assert composed("train-policy", "+model=7b").launch.strategy == "zero2"  # an overlay may choose from a group
    assert composed("train-policy", "train.steps=3", "+debug=tiny").train.steps == 3


def test_objectives_are_named_freely() -> None:
    cfg = typed(
        validated("train-policy", composed("train-policy", "objectives.wit.weight=0.5", "objectives.brevity.function=a.b"))
    )
    assert (cfg.objectives["wit"].weight, cfg.objectives["brevity"].function) == (0.5, "a.b")
    spec = typed(
        validated("train-rm", composed("train-rm", "data=files", "data.train=x", "data.objectives.wit.range=[1,5]"))
    ).data
    assert spec.objectives["wit"].range == [1.0, 5.0]


def commands_in(text: str) -> list[str]:
    """The stage commands that a text tells its reader to type."""
    found = re.findall(r"grpo-safe (?:train-rm|train-policy|eval) [^\n`)]*", text)
    return [line.partition("  ")[0].partition(" #")[0].strip() for line in found]


DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TYPED = sorted(
    {c for path in (*DOCUMENTS, ROOT / "conf/common.yaml", ROOT / "scripts/demo.sh") if path.is_file()
     for c in commands_in(path.read_text())} | set(commands_in(cli.HELP))
)  # fmt: skip


@pytest.mark.parametrize("line", TYPED)
def test_documented_commands_compose(line: str) -> None:
    _, command, *words = shlex.split(line)
    taken = [w for w in words if "=" in w and "$" not in w and not w.startswith("resume=")]
    if "-m" in words:
        taken = [w.partition(",")[0] for w in taken]
    assert validated(command, composed(command, *taken)).command == command


def test_documented_commands_were_found() -> None:
    assert any("+model=7b" in line for line in TYPED) and any("-m" in line for line in TYPED)
    assert any("algo.aggregation=mypackage.rewards.harmonic" in line for line in TYPED)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(command: str, cfg: DictConfig, *fragments: str) -> str:
    with pytest.raises(UserError) as caught:
        validated(command, cfg)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} not in {message}"
    return message


@cache
def default(command: str) -> DictConfig:
    return composed(command)


def changed(command: str, **values: object) -> DictConfig:
    """The default config with some keys replaced (a__b for a.b)."""
    cfg = default(command).copy()
    for key, value in values.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


def command_with(key: str) -> str:
    """A command that has the key: a check of a key that none has checks nothing."""
    found = [c for c in COMMANDS if key in leaves(OmegaConf.structured(SCHEMAS[c]))]
    assert found, f"no command has {key}"
    return found[0]


@pytest.mark.parametrize(("key", "allowed"), CHOICES, ids=[key for key, _ in CHOICES])
def test_closed_choices(key: str, allowed: tuple[bool | str, ...]) -> None:
    command = command_with(key)
    words = ", ".join({False: "false", True: "true"}.get(word, word) for word in allowed)
    refused(command, changed(command, **{key: "nonsense"}), f"{key}=nonsense", f"expected one of {words}")
    for word in allowed:
        beside = {"rollout.engine": "dataset"} if (key, word) == ("train.scores", "labels") else {}
        assert OmegaConf.select(validated(command, changed(command, **{key: word}, **beside)), key) == word


@pytest.mark.parametrize("key", POSITIVE)
def test_what_must_be_positive(key: str) -> None:
    command = command_with(key)
    for value in (0, -1):
        refused(command, changed(command, **{key: value}), f"{key}={value}", "above 0")


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_what_must_not_be_negative(key: str) -> None:
    command = command_with(key)
    refused(command, changed(command, **{key: -1}), f"{key}=-1", "0 or more")
    validated(command, changed(command, **{key: 0}))


def test_nan_is_no_number() -> None:
    refused("train-policy", changed("train-policy", algo__kl_coef=math.nan), "algo.kl_coef=nan")
    refused("train-policy", changed("train-policy", optim__lr=math.nan), "optim.lr=nan")


@pytest.mark.parametrize(
    ("command", "words", "fragments"),
    [
        ("train-policy", ("launch.processes=2",), ("launch=single", "launch.processes=2", "launch=zero1, zero2 or zero3")),
        ("train-policy", ("algo.group_size=1",), ("algo.group_size=1", "2 or more")),
        ("train-policy", ("sampling.top_p=1.5",), ("sampling.top_p=1.5", "at most 1")),
        ("train-policy", ("rollout.gpu_memory=1",), ("rollout.gpu_memory=1.0", "below 1")),
        ("train-policy", ("rollout=vllm", "sampling.top_p=0.9"), ("rollout=vllm", "sampling.top_p=0.9", "algo.sampler_cap=null")),
        ("train-rm", ("data.objectives.safety.range=[1,1]",), ("data.objectives.safety.range=[1.0, 1.0]", "two different numbers")),
        ("train-rm", ("data.objectives.safety.range=[0]",), ("data.objectives.safety.range=[0.0]", "[lo, hi]")),
        ("train-policy", ("train.steps=many",), ("train.steps", "many", "Integer")),
        ("train-policy", ("policy.lora.enabled=perhaps",), ("policy.lora.enabled", "perhaps")),
        ("train-rm", ("train.epochs=",), ("train.epochs",)),
        ("train-rm", ("data.objectives.safety.rnage=[0,1]",), ("data.objectives.safety.rnage",)),
        ("eval", ("+objectives.safety.weight=2",), ("objectives", "EvalConfig")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)  # fmt: skip
def test_values_that_do_not_go(command: str, words: tuple[str, ...], fragments: tuple[str, ...]) -> None:
    refused(command, composed(command, *words), *fragments)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "algo").glob("*.yaml")))
def test_each_method_goes_with_each_engine(name: str) -> None:
    """Importance weights are on where the engine is not the trainer's and the loss has a use for them."""
    no_use = name in ("ppo", "ppo_c", "dpo", "tdpo", "group_robust", "gflow_dpo", "pro", "superhf", "a_lol")
    limits = {"safety": LimitConfig(0.5)} if name in ("safe_grpo", "hc_grpo") else {}
    for engine, words, cap in (
        ("native", (), None), ("vllm", (), None if no_use else 2.0), ("vllm", ("algo.sampler_cap=null", "sampling.top_p=0.9"), None),
    ):  # fmt: skip
        cfg = typed(validated("train-policy", composed("train-policy", f"algo={name}", f"rollout={engine}", *words)))
        assert cfg.algo.sampler_cap == cap
        build_method(cfg.algo, Objectives(["safety", "helpfulness"], [1.0, 1.0], [0, 1], [None, None], limits=limits), {}, 8)


@pytest.mark.parametrize(
    ("name", "typo", "words", "key"),
    [
        ("algo/grpo.yaml", "\nclip_epz: 0.1\n", (), "algo.clip_epz"),
        ("train_policy.yaml", "\nrewrad_model: latest\n", (), "rewrad_model"),
        ("model/7b.yaml", "\nexport:\n  mergde: true\n", ("+model=7b",), "export.mergde"),
        ("debug/train_policy/tiny.yaml", "\nalgorithm: {group_size: 4}\n", ("+debug=tiny",), "algorithm"),
        ("objectives/paper.yaml", "\nwit: { wieght: 1.0 }\n", ("objectives=paper",), "objectives.wit.wieght"),
    ],
)
def test_typo_in_a_file_is_refused_by_its_key(tmp_path: Path, name: str, typo: str, words: tuple[str, ...], key: str) -> None:
    conf = conf_with(tmp_path, name, lambda text: text + typo)
    message = refused("train-policy", composed("train-policy", *words, conf=conf), "unknown key")
    assert re.search(rf"unknown key {re.escape(key)}:", message), message


def test_missing_values_are_listed_at_once() -> None:
    refused("train-rm", composed("train-rm", "data=base"), "no value for data.licence, data.name, data.train;", "KEY=VALUE")
    refused("train-policy", composed("train-policy", "data=files"), "no value for data.train;")


def test_a_file_may_demand_what_the_schema_would_fill_in(tmp_path: Path) -> None:
    conf = conf_with(tmp_path, "common.yaml", lambda text: text.replace("seed: 0", "seed: ???"))
    refused("train-rm", composed("train-rm", "data=files", conf=conf), "no value for data.train, seed;")
