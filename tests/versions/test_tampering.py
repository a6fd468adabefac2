"""Verification protects what is loaded: nothing beside the listed files, no entry that a reader acts on changed."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from grpo_safe.errors import UserError
from grpo_safe.versions.checkpoint import MANIFEST, find_content, open_version

sys.path.insert(0, str(Path(__file__).parents[1] / "config"))
from in_process import fake_policy, fake_reward_model


def edit(folder: Path, change) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("verify", ["full", "quick"])
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "deeper/model.safetensors", "config.json.bak"]
)
def test_a_file_that_is_not_listed_is_refused(tmp_path: Path, name: str, verify: str) -> None:
    folder = fake_reward_model(tmp_path).path
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"planted")
    with pytest.raises(UserError, match=f"file {name} is not in the manifest") as caught:
        open_version(tmp_path, "reward-model", "v1", verify)
    assert str(folder) in str(caught.value)
    (folder / name).unlink()
    assert open_version(tmp_path, "reward-model", "v1", verify).name == "v001"


def changed_file_with_its_entry(manifest: dict) -> None:
    manifest["files"]["config.json"] = {"sha256": hashlib.sha256(b"[]").hexdigest(), "bytes": 2}


CHANGES = {
    "a file with its entry": changed_file_with_its_entry,
    "an offset": lambda m: m["objectives"][0].update(offset=0.5),
    "the gate's figure": lambda m: m["metrics"]["objectives"]["safety"]["r2"].update(low=0.9),
    "how inputs are cut": lambda m: m["scoring"].update(max_length=8),
    "the base": lambda m: m["base"].update(start="OWNER/OTHER"),
    "the data's licence": lambda m: m["data"].update(licence="MIT"),
    "the parents": lambda m: m.update(parents=[{"kind": "policy", "version": 1, "content_sha256": "0" * 64}]),
    "an entry taken away": lambda m: m.pop("metrics"),
    "the hash itself": lambda m: m.update(content_sha256="0" * 64),
    "an older format, whose hash covers less": lambda m: m.update(format=1),
}


@pytest.mark.parametrize("verify", ["full", "quick"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_entry_is_refused(tmp_path: Path, change: str, verify: str) -> None:
    folder = fake_reward_model(tmp_path).path
    edit(folder, CHANGES[change])
    if change == "a file with its entry":
        (folder / "config.json").write_bytes(b"[]")
    with pytest.raises(UserError, match="was altered"):
        open_version(tmp_path, "reward-model", "v1", verify)


def test_what_says_nothing_of_the_content_may_differ(tmp_path: Path) -> None:
    folder = fake_reward_model(tmp_path).path
    edit(folder, lambda m: m.update(created="1999-01-01T00:00:00+00:00", code_version="0.0.1"))
    assert open_version(tmp_path, "reward-model", "v1").name == "v001"


def test_a_version_of_format_1_is_read_by_its_own_hash(tmp_path: Path) -> None:
    folder = fake_reward_model(tmp_path).path

    def to_format_1(manifest: dict) -> None:
        files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        manifest |= {"format": 1, "content_sha256": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()}

    edit(folder, to_format_1)
    assert open_version(tmp_path, "reward-model", "v1").manifest["format"] == 1


def test_a_version_is_found_by_its_content(tmp_path: Path) -> None:
    first, second = fake_reward_model(tmp_path), fake_reward_model(tmp_path, ("helpfulness",))
    assert find_content(tmp_path, "reward-model", second.manifest["content_sha256"]).path == second.path
    assert find_content(tmp_path / "elsewhere", "reward-model", first.manifest["content_sha256"]) is None


def test_eval_asks_the_reward_model_of_the_lineage_whatever_its_number(tmp_path: Path) -> None:
    from grpo_safe.launch import _reward_model_of

    fake_reward_model(tmp_path / "here", ("honesty",))  # v001 of this store is another one
    parent = fake_reward_model(tmp_path / "there", ("safety",))
    policy = fake_policy(tmp_path / "here", (parent,))
    with pytest.raises(UserError, match=f"content {parent.manifest['content_sha256'][:12]}.*reward_model=PATH"):
        _reward_model_of(policy, tmp_path / "here")
    again = fake_reward_model(tmp_path / "here", ("safety",))
    assert again.name == "v002" and _reward_model_of(policy, tmp_path / "here") == str(again.path)
