"""Between the composed config and the worker: resuming, versions by name, processes, what a worker left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from in_process import composed, fake_policy, fake_reward_model
from omegaconf import DictConfig, OmegaConf

from grpo_safe import cli, launch
from grpo_safe.checks import load_frozen, validated
from grpo_safe.errors import StageError, UserError
from grpo_safe.stages import __main__ as worker
from grpo_safe.versions import checkpoint


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in launch.OUTSIDE:
        monkeypatch.delenv(name, raising=False)


# --- resume -----------------------------------------------------------------------------------------------------------


def old_run(run_dir: Path, *words: str, command: str = "train-policy", steps: tuple[int, ...] = (4,)) -> DictConfig:
    """A run directory as a killed run leaves it."""
    cfg = validated(command, composed(command, *words, run_dir=run_dir.absolute()))
    for step in steps:
        (run_dir / "state" / f"step-{step:06d}").mkdir(parents=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    return cfg


def resumed(*words: str, command: str = "train-policy") -> DictConfig:
    cfg = composed(command, *words, run_dir="fresh")
    return launch._resumed(command, cfg, cli.prepared_overrides(command, list(words)))


def test_resume_takes_the_frozen_config_and_only_what_is_typed_now(capsys: pytest.CaptureFixture[str]) -> None:
    frozen = old_run(Path("old"), "seed=7", "algo.group_size=4", "objectives.safety.weight=2", "optim.lr=1e-3")
    found = resumed("resume=old", "train.steps=900", "optim.lr=2e-3")
    assert (found.seed, found.algo.group_size, found.objectives.safety.weight) == (7, 4, 2.0)  # not the defaults of today
    assert (found.train.steps, found.optim.lr) == (900, 2e-3)
    line = capsys.readouterr().out.strip()
    assert line == f"resume old: train.steps: {frozen.train.steps} -> 900, optim.lr: 0.001 -> 0.002"
    assert found.run_dir == str(Path("old").absolute()) and found.resume == "old"


def test_resume_with_nothing_typed_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    frozen = old_run(Path("old"), "seed=7")
    found = resumed("resume=old")
    assert capsys.readouterr().out.strip() == "resume old: same config"
    assert {**found, "resume": None} == dict(frozen)


def test_resume_may_set_null_choose_a_group_and_weigh_an_objective(capsys: pytest.CaptureFixture[str]) -> None:
    old_run(Path("old"), "objectives.safety.weight=2")
    found = resumed("resume=old", "train.save_every=null", "launch=zero2", "objectives.wit.weight=0.5")
    assert found.train.save_every is None
    assert found.launch.strategy == "zero2"
    assert {name: o.weight for name, o in found.objectives.items()} == {"safety": 2.0, "wit": 0.5}
    assert "train.save_every: 50 -> None" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["+model=7b", "+debug/train_policy=tiny"])
def test_resume_takes_no_overlay(word: str) -> None:
    old_run(Path("old"))
    with pytest.raises(UserError, match="an overlay cannot be added"):
        launch._resumed("train-policy", composed("train-policy", "resume=old"), ["resume=old", word])


def test_resume_checks_what_is_typed() -> None:
    old_run(Path("old"))
    with pytest.raises(UserError, match=r"algo\.group_size=1"):
        resumed("resume=old", "algo.group_size=1")


def test_resume_of_a_folder_that_was_moved_goes_on_there() -> None:
    old_run(Path("old"))
    Path("old").rename("moved")
    found = resumed("resume=moved")
    assert found.run_dir == str(Path("moved").absolute())


def test_resume_removes_the_folder_that_hydra_made_for_it() -> None:
    old_run(Path("old"))
    Path("fresh").mkdir()
    (Path("fresh") / "cli.log").touch()
    resumed("resume=old")
    assert not Path("fresh").exists()
    Path("fresh").mkdir()
    (Path("fresh") / "mine.txt").write_text("kept")
    resumed("resume=old")
    assert (Path("fresh") / "mine.txt").exists()


def test_resume_latest_is_the_run_with_the_newest_state_of_that_name() -> None:
    runs = Path("runs/train-policy")
    for n, place in enumerate(["default/b", "default/a", "other/c"]):
        old_run(runs / place, steps=(2, 4))
        for step in ("2", "4"):
            os.utime(runs / place / "state" / f"step-00000{step}", (1000 + n, 1000 + n))
    old_run(runs / "default/later-without-state", steps=())
    assert resumed("resume=latest").run_dir == str((runs / "default/a").absolute())
    assert resumed("resume=latest", "name=other").run_dir == str((runs / "other/c").absolute())


@pytest.mark.parametrize(
    ("word", "fragment"),
    [
        ("resume=latest", "no run under runs/train-policy/default has a resume state"),
        ("resume=nowhere", "nowhere/config.yaml does not exist; expected a run directory, or latest"),
        ("resume=stateless", "no resume state in stateless/state; the run wrote none (train.save_every)"),
        ("resume=other", "unknown key backbone"),
        ("resume=torn", "torn/config.yaml cannot be read as a run's config"),
    ],
)
def test_resume_of_what_cannot_be_resumed(word: str, fragment: str) -> None:
    old_run(Path("stateless"), steps=())
    old_run(Path("other"), command="train-rm")
    old_run(Path("torn"))
    (Path("torn") / "config.yaml").write_text("seed: [1\nname")
    with pytest.raises(UserError) as caught:
        resumed(word)
    assert fragment in str(caught.value)


def test_eval_has_no_states_and_may_be_run_again() -> None:
    old_run(Path("old"), "seed=7", command="eval", steps=())
    assert resumed("resume=old", command="eval").seed == 7


def test_resumed_run_refuses_another_reward_model_at_the_same_place() -> None:
    fake_reward_model(Path("checkpoints"))
    launch.launch("train-policy", composed("train-policy", "launch.freeze_only=true", run_dir="old"), [])
    (Path("old") / "state" / "step-000001").mkdir(parents=True)
    frozen = load_frozen("train-policy", Path("old/config.yaml"))
    assert (
        frozen.reward_model_sha256
        == checkpoint.open_version(Path("checkpoints"), "reward-model", "v1").manifest["content_sha256"]
    )
    Path("checkpoints/reward-model/v001").rename("elsewhere")
    other = fake_reward_model(Path("checkpoints"), heads=("safety",))
    assert other.name == "v001"
    words = ["resume=old", "launch.freeze_only=true"]
    with pytest.raises(UserError, match=r"v001 is not the version that this run was frozen with.*reward_model=vN"):
        launch.launch("train-policy", composed("train-policy", *words), words)
    words.append("reward_model=v1")  # said aloud, it is meant
    launch.launch("train-policy", composed("train-policy", *words), words)
    assert load_frozen("train-policy", Path("old/config.yaml")).reward_model_sha256 == other.manifest["content_sha256"]


# --- versions by name -------------------------------------------------------------------------------------------------


def test_eval_judges_with_the_reward_model_that_the_policy_was_trained_against() -> None:
    store = Path("checkpoints")
    first = fake_reward_model(store)
    fake_reward_model(store, heads=("safety",))
    fake_policy(store, (first,))
    cfg = validated("eval", composed("eval"))
    launch._resolve_versions("eval", cfg)
    assert (cfg.policy, cfg.reward_model) == ("checkpoints/policy/v001", "checkpoints/reward-model/v001")
    cfg = validated("eval", composed("eval", "reward_model=latest"))
    launch._resolve_versions("eval", cfg)
    assert cfg.reward_model == "checkpoints/reward-model/v002"


def test_eval_of_a_policy_without_a_known_judge_asks_for_one() -> None:
    fake_policy(Path("checkpoints"))
    with pytest.raises(UserError, match="names no reward model; give one: reward_model=vN"):
        launch._resolve_versions("eval", validated("eval", composed("eval")))


def test_policy_may_start_from_a_published_one() -> None:
    fake_reward_model(Path("checkpoints"))
    fake_policy(Path("checkpoints"))
    cfg = validated("train-policy", composed("train-policy", "policy.start=v1"))
    launch._resolve_versions("train-policy", cfg)
    assert cfg.policy.start == "checkpoints/policy/v001"


# --- processes --------------------------------------------------------------------------------------------------------


def processes(*words: str) -> int:
    cfg = validated("train-policy", composed("train-policy", *words))
    found = launch._processes(cfg)
    launch._check_divides(cfg, found)
    return found


def test_one_process_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_cuda_devices", lambda: 4)
    assert processes("launch=zero2") == 4
    assert processes("launch=zero2", "launch.processes=2") == 2
    assert processes("launch=single") == 1
    assert processes("launch=zero2", "launch.device=cpu") == 1
    assert processes("launch=zero2", "launch.device=cpu", "launch.processes=8") == 8
    with pytest.raises(UserError, match=r"launch\.processes=5: 4 CUDA devices are visible; start one process a device"):
        processes("launch=zero2", "launch.processes=5")


def test_without_a_device_one_process_per_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_cuda_devices", lambda: 0)
    assert processes("launch=zero2") == 1
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(UserError, match=rf"launch\.processes={cores + 1}: no CUDA device and {cores} CPU cores"):
        processes("launch=zero2", f"launch.processes={cores + 1}")
    with pytest.raises(UserError, match=r"launch\.device=cuda: no CUDA device is visible"):
        processes("launch=zero2", "launch.device=cuda")


def test_groups_are_whole_on_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_cuda_devices", lambda: 3)
    assert processes("launch=zero2", "train.prompts_per_step=12") == 3
    with pytest.raises(UserError, match=r"train\.prompts_per_step=16 does not divide by launch\.processes=3.*multiple of 3"):
        processes("launch=zero2")
    with pytest.raises(UserError, match=r"algo\.minibatches=13.*train\.prompts_per_step=12.*whole groups"):
        processes("launch=zero2", "train.prompts_per_step=12", "algo.minibatches=13")


@pytest.mark.parametrize("name", launch.OUTSIDE)
def test_command_under_an_outside_launcher_is_told_the_two_steps(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fake_reward_model(Path("checkpoints"))
    monkeypatch.setenv(name, "0")
    with pytest.raises(UserError) as caught:
        launch.launch("train-policy", composed("train-policy"), [])
    for fragment in (
        f"{name} is set",
        "launch.freeze_only=true",
        "torchrun ... -m grpo_safe.stages train_policy RUN_DIR/config.yaml",
    ):
        assert fragment in str(caught.value)
    assert not Path("run").exists()


def test_freeze_only_writes_the_config_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_reward_model(Path("checkpoints"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launch, "run_worker", lambda *_, **__: pytest.fail("a worker was started"))
    cfg = composed("train-policy", "launch=zero3", "launch.freeze_only=true", "launch.processes=64", "train.prompts_per_step=64")
    launch.launch("train-policy", cfg, [])
    out, err = capsys.readouterr()
    assert out.strip() == "run"  # a script may take it: RUN_DIR=$(grpo-safe ...)
    assert "torchrun" in err and "grpo_safe.stages train_policy run/config.yaml" in err
    frozen = load_frozen("train-policy", Path("run/config.yaml"))
    assert frozen.reward_model == "checkpoints/reward-model/v001" and frozen.launch.processes == 64


# --- workers ----------------------------------------------------------------------------------------------------------


def test_worker_command_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cfg = validated("train-policy", composed("train-policy", "launch=zero2", "launch.device=cpu"))
    one, several = (launch._worker_command("train_policy", Path("r/config.yaml"), n) for n in (1, 4))
    assert one[1:] == ["-m", "grpo_safe.stages", "train_policy", "r/config.yaml"]
    assert several[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    assert several[5:] == ["4", *one[1:]]
    alone = launch._worker_environment(cfg, 1)
    assert (alone["WORLD_SIZE"], alone["CUDA_VISIBLE_DEVICES"], alone["DS_ACCELERATOR"]) == ("1", "", "cpu")
    shared = launch._worker_environment(cfg, 1000)
    assert shared["OMP_NUM_THREADS"] == "1" and "WORLD_SIZE" not in shared


def launched_with(monkeypatch: pytest.MonkeyPatch, code: int, error: dict[str, object] | None) -> None:
    fake_reward_model(Path("checkpoints"))
    Path("run").mkdir()
    (Path("run") / "error.json").write_text('{"kind": "user", "message": "of an earlier start", "rank": 0}')

    def call(*_: object, **__: object) -> int:
        assert not (Path("run") / "error.json").exists()  # or a killed worker would be told with an old error
        if error is not None:
            (Path("run") / "error.json").write_text(json.dumps(error))
        return code

    monkeypatch.setattr(launch, "run_worker", call)
    launch.launch("train-policy", composed("train-policy"), [])


def test_worker_that_succeeds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    launched_with(monkeypatch, 0, None)
    assert "run directory run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "kind", "fragment"),
    [
        ({"kind": "user", "message": "rows.jsonl row 3", "rank": 1}, UserError, "^rows.jsonl row 3$"),
        ({"kind": "internal", "message": "KeyError: 'x'", "rank": 1}, StageError, r"KeyError: 'x' \(rank 1; traceback above"),
        (None, StageError, "ended with code 9 and left no error.json in run: somebody killed it"),
    ],
)
def test_worker_that_fails(
    monkeypatch: pytest.MonkeyPatch, error: dict[str, object] | None, kind: type[Exception], fragment: str
) -> None:
    with pytest.raises(kind, match=fragment):
        launched_with(monkeypatch, 9, error)


def frozen_run(run_dir: Path) -> Path:
    old_run(run_dir, command="train-rm", steps=())
    return run_dir / "config.yaml"


def told(run_dir: Path) -> dict[str, object]:
    assert [p.name for p in run_dir.glob(".error*")] == []
    return json.loads((run_dir / "error.json").read_text())


def test_worker_reports_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    frozen = frozen_run(Path("run"))
    frozen.write_text(frozen.read_text().replace("embedded:train", "nowhere.jsonl"))
    assert worker.main(["train_rm", str(frozen)]) == 2
    entry = told(Path("run"))
    assert (entry["kind"], entry["rank"]) == ("user", 3)
    assert "data.train=nowhere.jsonl: no such file" in str(entry["message"])
    assert "Traceback" not in capsys.readouterr().err


def test_worker_reports_an_internal_error_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from grpo_safe.stages import train_rm

    monkeypatch.setattr(train_rm, "run", lambda cfg, run_dir: {}[cfg.name])
    assert worker.main(["train_rm", str(frozen_run(Path("run")))]) == 1
    assert told(Path("run")) == {"kind": "internal", "message": "KeyError: 'default'", "rank": 0}
    assert "Traceback" in capsys.readouterr().err


def test_the_first_rank_that_failed_is_heard() -> None:
    worker._report(Path(), "user", "first")
    worker._report(Path(), "internal", "second")
    assert told(Path())["message"] == "first"


@pytest.mark.parametrize("words", [[], ["train_rm"], ["nonsense", "config.yaml"]])
def test_worker_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert worker.main(words) == 2
    assert "usage: python -m grpo_safe.stages" in capsys.readouterr().err
