"""Names of objectives become keys, metric names and words of the command line: what would break one of them is refused when a config is composed."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import composed, grpo_safe
from omegaconf import DictConfig, OmegaConf

from grpo_safe import launch
from grpo_safe.checks import validated
from grpo_safe.errors import UserError

ODD = ("score/mean", "a.b", "my wit", "tab\there", "", "wit=2", "[wit]", "a,b", "line\nbreak", "-wit")


def with_objective(command: str, name: str) -> DictConfig:
    """A composed config with an objective of that name, as a file of the user's in conf/ holds it."""
    cfg = composed(command)
    OmegaConf.set_struct(cfg, False)
    if command == "train-policy":
        cfg.objectives[name] = {"function": "my.wit", "weight": 1.0}
    else:
        cfg.data.objectives[name] = {"range": [0, 1]}
    return cfg


@pytest.mark.parametrize("command", ["train-rm", "train-policy"])
@pytest.mark.parametrize("name", ODD)
def test_a_name_that_breaks_keys_or_metrics_is_refused(command: str, name: str) -> None:
    key = "objectives" if command == "train-policy" else "data.objectives"
    with pytest.raises(UserError) as caught:
        validated(command, with_objective(command, name))
    assert str(caught.value).startswith(f"{key}: {name!r} is no name for an objective; expected letters, digits, _ and -")


@pytest.mark.parametrize("command", ["train-rm", "train-policy"])
@pytest.mark.parametrize("name", ["wit", "Wit_2", "is-safe", "höflichkeit", "4chan"])
def test_other_names_pass(command: str, name: str) -> None:
    cfg = validated(command, with_objective(command, name))
    assert name in (cfg.objectives if command == "train-policy" else cfg.data.objectives)


@pytest.mark.parametrize(
    "words", [("train-policy", "+objectives={my wit: {function: a.b}}"), ("train-rm", "+data.objectives={a/b: {range: [0, 1]}}")]
)
def test_the_command_says_so_and_starts_nothing(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "run_worker", lambda *_: pytest.fail("a worker was started"))
    ended = grpo_safe(monkeypatch, capsys, *words)
    assert ended.code == 2 and "is no name for an objective" in ended.err and "Traceback" not in ended.err
