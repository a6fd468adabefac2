"""Published versions: written once and whole, found by name, refused when anything about them is wrong."""

import errno
import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from grpo_safe.errors import UserError
from grpo_safe.versions.checkpoint import FORMAT, MANIFEST, all_versions, open_version, publish, require_room

FILES = {"model.safetensors": b"\x00weights" * 50, "config.json": b"{}", "tokenizer/vocab.txt": b"a\nb\n"}


def writer(files: dict[str, bytes] | None = None):
    def write(draft: Path) -> None:
        for name, content in (FILES if files is None else files).items():
            path = draft / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    return write


def published(store: Path, kind: str = "reward-model", **changes: bytes):
    return publish(store, kind, writer(FILES | changes), {"seed": 3})


def change_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(store: Path, reference: str, *words: str, kind: str = "reward-model", verify: str = "full") -> None:
    with pytest.raises(UserError) as caught:
        open_version(store, kind, reference, verify=verify)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in {caught.value}"


# --- publish, then open -----------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    made = published(tmp_path)
    found = open_version(tmp_path, "reward-model", "latest")
    assert found == made and found.name == "v001" and found.path == tmp_path / "reward-model" / "v001"
    assert {name: (found.path / name).read_bytes() for name in FILES} == FILES
    listed = found.manifest["files"]
    assert set(listed) == set(FILES)  # the manifest does not list itself
    for name, content in FILES.items():
        assert listed[name] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert (found.manifest["kind"], found.manifest["format"], found.manifest["seed"]) == ("reward-model", FORMAT, 3)
    assert found.manifest["packages"]["torch"] and found.manifest["created"].endswith("+00:00")


def test_latest_number_and_path_name_versions(tmp_path):
    for n in range(3):
        published(tmp_path, **{"config.json": str(n).encode()})
    path = tmp_path / "reward-model" / "v002"
    numbers = {reference: open_version(tmp_path, "reward-model", reference).manifest["version"] for reference in (
        "latest", "v1", "v002", "v3", str(path)
    )}  # fmt: skip
    assert numbers == {"latest": 3, "v1": 1, "v002": 2, "v3": 3, str(path): 2}
    assert open_version(tmp_path / "elsewhere", "reward-model", str(path)).name == "v002"


def test_numbers_are_compared_as_numbers_and_gaps_stay_empty(tmp_path):
    folder = tmp_path / "reward-model"
    for _ in range(2):
        published(tmp_path)
    (folder / "v002").rename(folder / "v999")
    change_manifest(folder / "v999", version=999)
    assert published(tmp_path).name == "v1000"
    assert open_version(tmp_path, "reward-model", "latest").manifest["version"] == 1000
    (folder / "v001").rename(tmp_path / "moved")
    assert published(tmp_path).name == "v1001"


def test_kinds_are_numbered_apart_and_listed_together(tmp_path):
    for kind in ("policy", "reward-model", "policy"):
        published(tmp_path, kind)
    listed = [(version.kind, version.name) for version in all_versions(tmp_path)]
    assert listed == [("reward-model", "v001"), ("policy", "v001"), ("policy", "v002")]
    assert all_versions(tmp_path / "nowhere") == []


def test_nothing_is_visible_while_it_is_written(tmp_path):
    published(tmp_path)
    seen = []

    def write(draft: Path) -> None:
        writer()(draft)
        seen.append((open_version(tmp_path, "reward-model", "latest").name, len(all_versions(tmp_path))))

    assert publish(tmp_path, "reward-model", write, {}).name == "v002"
    assert seen == [("v001", 1)]


# --- the content hash -------------------------------------------------------------------------------------------------


def test_content_hash_is_of_names_and_bytes(tmp_path):
    hashes = [
        published(tmp_path).manifest["content_sha256"],
        published(tmp_path, **{"config.json": b"{ }"}).manifest["content_sha256"],
        publish(tmp_path, "reward-model", writer({"a": b"1", "b": b"2"}), {}).manifest["content_sha256"],
        publish(tmp_path, "reward-model", writer({"a": b"2", "b": b"1"}), {}).manifest["content_sha256"],
    ]
    assert len(set(hashes)) == 4
    assert published(tmp_path).manifest["content_sha256"] == hashes[0]


def test_link_to_a_parent_holds_its_content_hash(tmp_path):
    parent = published(tmp_path)
    child = publish(tmp_path, "policy", writer(), {"parents": [parent.link]})
    (link,) = open_version(tmp_path, "policy", child.name).manifest["parents"]
    content = open_version(tmp_path, "reward-model", "v1").manifest["content_sha256"]
    assert link == {"kind": "reward-model", "version": 1, "content_sha256": content}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "command"), [("reward-model", "grpo-safe train-rm"), ("policy", "grpo-safe train-policy")])
def test_no_version_yet_names_the_command_that_makes_one(tmp_path, kind, command):
    key = kind.replace("-", "_")
    refused(tmp_path, "latest", f"{key}=latest", str(tmp_path / kind), command, f"{key}=PATH", kind=kind)


def test_unknown_number_names_those_there_are(tmp_path):
    refused(tmp_path, "v7", "reward_model=v7", "it holds none")
    published(tmp_path)
    refused(tmp_path, "v7", "reward_model=v7", "it holds v001")


def test_unknown_path(tmp_path):
    refused(tmp_path, str(tmp_path / "gone"), f"reward_model={tmp_path / 'gone'}", "no such folder", "latest, vN or the path")


def test_key_of_the_message_can_be_given(tmp_path):
    with pytest.raises(UserError, match=r"policy\.start=v3: no such version"):
        open_version(tmp_path, "policy", "v3", key="policy.start")


def test_wrong_kind(tmp_path):
    path = published(tmp_path, "policy").path
    refused(tmp_path, str(path), str(path), "is a policy version", "expected a reward-model version")


@pytest.mark.parametrize("number", [FORMAT + 1, "2", None])
def test_newer_format(tmp_path, number):
    path = published(tmp_path).path
    change_manifest(path, format=number)
    refused(tmp_path, "latest", str(path), f"has format {number}", f"({FORMAT})", "update grpo-safe")


@pytest.mark.parametrize("verify", ["full", "quick"])
def test_missing_file(tmp_path, verify):
    path = published(tmp_path).path
    (path / "tokenizer" / "vocab.txt").unlink()
    refused(tmp_path, "latest", str(path), "tokenizer/vocab.txt is missing", "copy the whole folder", verify=verify)


@pytest.mark.parametrize("verify", ["full", "quick"])
def test_file_cut_short(tmp_path, verify):
    weights = published(tmp_path).path / "model.safetensors"
    os.truncate(weights, 399)
    refused(tmp_path, "latest", f"{weights} has 399 bytes", "the manifest says 400", verify=verify)


def test_altered_byte_is_found_by_full_and_passes_quick(tmp_path):
    weights = published(tmp_path).path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[123] ^= 1
    weights.write_bytes(content)
    refused(tmp_path, "latest", f"{weights} was altered", "sha256", "restore the file")
    assert open_version(tmp_path, "reward-model", "latest", verify="quick").name == "v001"


@pytest.mark.parametrize("kept", [0, 1, 200])
def test_torn_manifest(tmp_path, kept):
    manifest = published(tmp_path).path / MANIFEST
    os.truncate(manifest, kept)
    refused(tmp_path, "latest", str(manifest), "is not JSON", "altered or torn")


def test_folder_that_is_no_version(tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    refused(tmp_path, str(folder), f"{folder} has no {MANIFEST}", "not a version")


# --- writers that fail, writers that meet -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_writer_that_raises_leaves_nothing_behind(tmp_path, error):
    def write(draft: Path) -> None:
        writer()(draft)
        raise error

    with pytest.raises(type(error)):
        publish(tmp_path, "policy", write, {})
    assert list((tmp_path / "policy").iterdir()) == []
    assert published(tmp_path, "policy").name == "v001"


def test_full_disk_is_a_sentence_and_leaves_nothing_behind(tmp_path):
    def write(draft: Path) -> None:
        (draft / "half").write_bytes(b"0" * 100)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="no room left on the disk while writing a policy version") as caught:
        publish(tmp_path, "policy", write, {})
    assert f"store={tmp_path}" in str(caught.value)
    assert list((tmp_path / "policy").iterdir()) == []


def test_require_room_says_what_is_free_and_what_is_needed(tmp_path):
    folder = tmp_path / "not" / "yet" / "there"
    require_room(folder, 1, "a policy")
    with pytest.raises(UserError) as caught:
        require_room(folder, 10**18, "a policy")
    message = str(caught.value)
    assert str(folder) in message and "GB free, a policy needs about 1000000000.00 GB" in message and "store=PATH" in message
    assert not folder.exists()


def publish_three(store: Path, number: int, start) -> None:
    start.wait(60)
    for turn in range(3):
        publish(store, "policy", writer({"who": f"{number}.{turn}".encode()}), {"who": f"{number}.{turn}"})


def test_processes_that_publish_at_once_get_numbers_of_their_own(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    processes = [context.Process(target=publish_three, args=(tmp_path, number, start)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    versions = [open_version(tmp_path, "policy", f"v{number}") for number in range(1, 13)]
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == [f"v{number:03d}" for number in range(1, 13)]
    assert [version.manifest["version"] for version in versions] == list(range(1, 13))
    assert {v.manifest["who"] for v in versions} == {f"{n}.{turn}" for n in range(4) for turn in range(3)}
    assert all((v.path / "who").read_text() == v.manifest["who"] for v in versions)


def test_a_store_that_cannot_be_written_is_found_before(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"store=.*file/store: a reward model cannot be written there \(.*file: Not a directory\)"
    ):
        require_room(tmp_path / "file" / "store", 1, "a reward model")
    require_room(tmp_path / "new" / "store", 1, "a reward model")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
