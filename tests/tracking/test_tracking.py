"""Figures arrive where they should, once each, and nothing leaves the machine that was not asked for."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_safe.algorithm.advantages import group_advantages
from grpo_safe.algorithm.comparison import Comparison
from grpo_safe.config import TrackingConfig
from grpo_safe.records import Prompt, Rollout, Scores
from grpo_safe.rewards import Objectives
from grpo_safe.runtime import Runtime
from grpo_safe.runtime.peak import CLEAR, peak_memory_gb
from grpo_safe.stages.train_policy.metrics import sample_rows, step_metrics
from grpo_safe.tracking import Stopwatch, Tracker, truncate_metrics

SECRET = "attacker-shaped completion"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text(encoding="utf-8").split("\n") if line]


def tracker(run_dir: Path, is_main: bool = True, **settings: Any) -> Tracker:
    return Tracker(TrackingConfig(**settings), run_dir, {"name": "trial", "seed": 3}, is_main)


# --- files ------------------------------------------------------------------------------------------------------------


def test_each_step_is_a_line_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    t = tracker(tmp_path)
    t.log(1, {"loss": 0.5, "kl": math.nan, "grad_norm": math.inf, "tokens": 7})
    t.log(2, {"loss": -math.inf, "note": "größer"})
    t.close()
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "kl": None, "grad_norm": None, "tokens": 7},
        {"step": 2, "loss": None, "note": "größer"},
    ]


def test_samples_are_kept_in_a_file_of_their_own(tmp_path: Path) -> None:
    t = tracker(tmp_path)
    t.samples(3, [{"prompt": "Hi\nthere", "scores": {"safety": 0.5}}, {"prompt": "Ho", "advantage": math.nan}])
    assert lines(tmp_path / "samples.jsonl") == [
        {"step": 3, "prompt": "Hi\nthere", "scores": {"safety": 0.5}},
        {"step": 3, "prompt": "Ho", "advantage": None},
    ]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t = tracker(tmp_path, is_main=False, kind="wandb", mode="offline")
    t.start(10, 0, "train-policy")
    t.log(1, {"loss": 0.5})
    t.samples(1, [{"prompt": "Hi"}])
    t.say("hello")
    t.advance("x")
    t.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_progress_starts_where_a_resumed_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t = tracker(tmp_path)
    t.start(10, 4, "train-policy")
    t.say("published v001")
    for _ in range(6):
        t.advance("reward 0.5")
    t.close()
    out, err = capsys.readouterr()
    assert "published v001" in out
    assert "train-policy" in err and "4/10" in err and "10/10" in err and "reward 0.5" in err


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_rows_after_the_resume_state_and_torn_rows_are_dropped(tmp_path: Path, name: str) -> None:
    rows = [{"step": step, "text": "ä"} for step in (1, 2, 2, 3, 4)]
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 5, "te', encoding="utf-8")
    truncate_metrics(tmp_path, 3)
    assert lines(path) == rows[:4]
    assert path.read_bytes().endswith(b"\n")
    truncate_metrics(tmp_path, 3)
    assert lines(path) == rows[:4]
    truncate_metrics(tmp_path, 0)
    assert path.read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_nothing_to_truncate(tmp_path: Path) -> None:
    truncate_metrics(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_samples_with_line_separators_of_unicode_survive_a_resume(tmp_path: Path) -> None:
    t = tracker(tmp_path)
    t.samples(1, [{"completion": "one\u2028two\x85three\x0cfour"}])
    before = (tmp_path / "samples.jsonl").read_bytes()
    truncate_metrics(tmp_path, 1)
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_stopwatch_adds_up_phases_also_when_one_fails_inside_another() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch("sampling"):
            time.sleep(0.01)
    with pytest.raises(ValueError), watch("update"), watch("inner"):
        time.sleep(0.01)
        raise ValueError
    assert set(watch.seconds) == {"sampling", "update", "inner"}
    assert watch.seconds["sampling"] >= 0.02
    assert 0.01 <= watch.seconds["inner"] <= watch.seconds["update"] < 5
    assert watch.peaks == {}


@pytest.mark.skipif(not CLEAR.exists(), reason="a phase's peak of a CPU process needs Linux's /proc/self/clear_refs")
def test_stopwatch_tells_the_peak_of_each_phase() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with watch("large"):
        torch.ones(100_000_000).sum()  # 0.4 GB, freed at once
    with watch("small"):
        pass
    assert 0.3 < watch.peaks["large"] - watch.peaks["small"] < 0.5


# --- wandb ------------------------------------------------------------------------------------------------------------


def stored(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log, 7 bytes of header, chunks (crc, length, kind) in blocks of 32 KiB."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def wandb_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch, samples: bool) -> tuple[list[Any], list[Path]]:
    """The records and the files that wandb keeps of a run that it did not send."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(run_dir / "of-wandb"))
    monkeypatch.setenv("WANDB_MODE", "online")  # the tracker sets it: put back when the test ends
    run_dir.mkdir(exist_ok=True)
    t = tracker(run_dir, kind="wandb", mode="offline", samples=samples)
    t.log(1, {"loss": 0.5, "kl": math.nan})
    t.samples(1, [{"prompt": "Hi", "completion": SECRET}])
    t.close()
    assert wandb.run is None
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    (path,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 30
    records: list[Any] = []
    while not any(r.HasField("exit") for r in records):  # its own process writes the file, a moment after finish()
        assert time.monotonic() < deadline, "wandb wrote no end of the run"
        time.sleep(0.05)
        records = [Record.FromString(data) for data in stored(path.read_bytes())]
    return records, [p for p in folder.rglob("*") if p.is_file()]


def test_wandb_offline_keeps_figures_and_no_code_host_or_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, files = wandb_run(tmp_path / "run", monkeypatch, samples=False)
    (run,) = [r.run for r in records if r.HasField("run")]
    assert run.project == "grpo-safe" and run.display_name == "trial" and run.host == ""
    assert not run.HasField("git")
    assert {c.key: c.value_json for c in run.config.update if c.key != "_wandb"} == {"name": '"trial"', "seed": "3"}
    logged = {i.key or "/".join(i.nested_key): i.value_json for r in records if r.HasField("history") for i in r.history.item}
    assert logged["loss"] == "0.5" and "kl" not in logged
    names = {p.name for p in files}
    assert not names & {"wandb-metadata.json", "diff.patch", "output.log", "conda-environment.yaml"}
    assert not [p for p in files if p.suffix in (".py", ".ipynb") or "code" in p.parts]
    assert not any(SECRET.encode() in p.read_bytes() for p in files)
    assert lines(tmp_path / "run" / "samples.jsonl")[0]["completion"] == SECRET  # on this machine they stay


def test_wandb_gets_samples_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, files = wandb_run(tmp_path / "run", monkeypatch, samples=True)
    assert any(SECRET.encode() in p.read_bytes() for p in files)


# --- what a step says -------------------------------------------------------------------------------------------------


VALID = torch.ones(4, dtype=torch.bool)


def one_step() -> tuple[Rollout, Scores]:
    """Two groups of two completions, two objectives, one score missing."""
    prompts = [Prompt(str(n), [{"role": "user", "content": f"Question {n}?"}], "everyday") for n in (0, 0, 1, 1)]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]])
    rollout = Rollout(
        prompts, torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2, dtype=torch.long), torch.zeros(4, 3, dtype=torch.long), mask,
        torch.zeros(4, 3), torch.tensor([True, False, False, False]), ["a", "b", "c", "d"],
    )  # fmt: skip
    values = torch.tensor([[1.0, 0.2], [0.0, 0.4], [0.5, 0.0], [0.5, 0.6]])
    known = torch.ones(4, 2, dtype=torch.bool)
    known[2, 1] = False
    return rollout, Scores(["safety", "wit"], values, known)


def test_step_metrics_by_hand() -> None:
    rt = Runtime(0, 1, torch.device("cpu"), "single")
    rollout, scores = one_step()
    objectives = Objectives(["safety", "wit"], [3.0, 1.0], [0, 1], [None, None])
    rewards = torch.tensor([0.8, 0.1, 0.5, 0.5])
    groups = group_advantages(rewards, torch.ones(4, dtype=torch.bool), 2, 0.0, 1e-3)
    sums = {"loss": 0.6, "passes": 2.0, "skipped_updates": 1.0, "tokens": 8.0, "kl": 0.4, "ratio": 8.0, "clipped": 2.0}
    first = {"safety": 0.3}
    metrics = step_metrics(rt, rollout, scores, objectives, Comparison(rewards, VALID, groups, [], {}), sums, 2, first)
    expected = {
        "reward/mean": 0.475, "zero_spread_groups": 0.5, "length/mean": 2.0, "length/max": 3.0, "truncated": 0.25,
        "completion_tokens": 8, "score/safety": 0.5, "score/wit": 0.4, "missing/safety": 0.0, "missing/wit": 0.25,
        "gain/safety": 0.75 * (0.5 - 0.3), "gain/wit": 0.0, "score_std/wit": 0.2, "loss": 0.3, "kl": 0.05, "ratio": 1.0,
        "clip_share": 0.25,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert first == pytest.approx({"safety": 0.3, "wit": 0.4})  # the first step's mean is what gains are measured from
    assert "entropy" not in metrics


def test_objective_that_scored_nothing_has_no_mean() -> None:
    rt = Runtime(0, 1, torch.device("cpu"), "single")
    rollout, scores = one_step()
    scores.mask[:, 1] = False
    rewards = torch.tensor([0.8, 0.1, 0.5, 0.5])
    groups = group_advantages(rewards, torch.ones(4, dtype=torch.bool), 2, 0.0, 1e-3)
    objectives = Objectives(["safety", "wit"], [1.0, 1.0], [0, 1], [None, None])
    metrics = step_metrics(
        rt,
        rollout,
        scores,
        objectives,
        Comparison(rewards, VALID, groups, [], {}),
        {"loss": 0, "passes": 1, "skipped_updates": 0, "tokens": 0, "clipped": 0},
        2,
        {},
    )
    assert math.isnan(metrics["score/wit"]) and metrics["missing/wit"] == 1.0
    assert metrics["score/safety"] == pytest.approx(0.5)


def test_sample_rows_are_spread_over_the_groups_and_only_of_the_main_rank() -> None:
    rollout, scores = one_step()
    rows = sample_rows(rollout, scores, torch.tensor([1.0, -1.0, 0.0, 0.0]), 2, Runtime(0, 1, torch.device("cpu"), "single"))
    assert [(r["prompt"], r["completion"], r["advantage"]) for r in rows] == [
        ("Question 0?", "a", 1.0),
        ("Question 1?", "c", 0.0),
    ]
    assert rows[0]["scores"] == {"safety": 1.0, "wit": 0.2} and rows[0]["truncated"] is True
    assert sample_rows(rollout, scores, torch.zeros(4), 2, Runtime(1, 2, torch.device("cpu"), "zero2")) == []
    assert sample_rows(rollout, scores, torch.zeros(4), 0, Runtime(0, 1, torch.device("cpu"), "single")) == []


def test_peak_memory_of_a_process() -> None:
    assert 0.05 < peak_memory_gb(torch.device("cpu")) < 1000
