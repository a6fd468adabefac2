"""An evaluation takes from the policy's manifest what it is not told: data set, lengths, temperature."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import composed, fake_policy, fake_reward_model
from omegaconf import OmegaConf

from grpo_safe import launch
from grpo_safe.checks import typed, validated
from grpo_safe.errors import UserError


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fake_policy(Path("checkpoints"), (fake_reward_model(Path("checkpoints")),))


def resolved(*words: str):
    cfg = validated("eval", composed("eval", *words))
    launch._resolve_versions("eval", cfg)
    return typed(validated("eval", cfg))


def test_what_is_not_said_is_the_policys(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = resolved()
    assert (cfg.sampling.max_new_tokens, cfg.sampling.temperature, cfg.sampling.top_p) == (16, 0.7, 1.0)
    assert (cfg.data.name, cfg.data.train, cfg.data.heldout) == ("embedded", "embedded:train", "embedded:heldout")
    assert "policy v001, data embedded, 16 new tokens at temperature 0.7" in capsys.readouterr().out


def test_what_is_said_wins() -> None:
    cfg = resolved("sampling.max_new_tokens=99", "data=files", "data.train=x.jsonl", "data.limit=3")
    assert (cfg.sampling.max_new_tokens, cfg.sampling.temperature) == (99, 0.7)
    assert (cfg.data.name, cfg.data.train, cfg.data.limit) == ("files", "x.jsonl", 3)
    assert resolved("data.limit=3").data.limit == 3


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("data.heldout=mine.jsonl", "heldout", "mine.jsonl"), ("data.train=x.jsonl", "train", "x.jsonl"), ("data.name=foo", "name", "foo"),
        ("data.columns.kind=category", "columns.kind", "category"), ("data.row_function=a.b", "row_function", "a.b"),
    ],
)  # fmt: skip
def test_a_key_of_the_data_that_is_typed_wins_and_the_others_are_the_policys(word: str, key: str, value: str) -> None:
    cfg = validated("eval", composed("eval", word))
    launch._resolve_versions("eval", cfg)
    assert OmegaConf.select(cfg.data, key) == value
    others = {"name": "embedded", "train": "embedded:train", "heldout": "embedded:heldout", "columns.prompt": "prompt"}
    for other, expected in others.items():
        assert other == key or OmegaConf.select(cfg.data, other) == expected


@pytest.mark.parametrize("command", ["train-rm", "train-policy"])
def test_only_an_evaluation_has_a_policy(command: str) -> None:
    with pytest.raises(UserError, match="data=as_trained: only an evaluation"):
        validated(command, composed(command, "data=as_trained"))
