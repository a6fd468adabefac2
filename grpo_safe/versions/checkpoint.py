"""Published versions: checkpoints/<kind>/vNNN, written once, verified by every reader. No torch here.

A version is a plain Hugging Face folder with a manifest.json beside the weights. It is written under a temporary name, fsynced, then
renamed, so that a reader never sees half of one and two writers never get one number.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from grpo_safe import __version__
from grpo_safe.errors import UserError

FORMAT = 2  # 1: its content hash covers the files alone
KINDS = ("reward-model", "policy")
MANIFEST = "manifest.json"
REQUIRED = {"format", "kind", "version", "files", "content_sha256", "parents"}
# What a reader acts on beside the files: under format 2 the content hash covers these entries too.
MEANING = ("objectives", "scoring", "metrics", "parents", "base", "layout", "system_prompt", "states_confidence", "data")
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "safetensors", "numpy")


@dataclass(frozen=True)
class Version:
    """A published version that was found, and, by `open_version`, verified."""

    kind: str
    path: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """vNNN."""
        return f"v{self.manifest['version']:03d}"

    @property
    def link(self) -> dict[str, Any]:
        """How a child's manifest names this version as its parent."""
        return {"kind": self.kind, "version": self.manifest["version"], "content_sha256": self.manifest["content_sha256"]}


def publish(store: Path, kind: str, write: Callable[[Path], None], manifest: dict[str, Any]) -> Version:
    """Let `write` fill a folder, add the manifest, make it visible as the next vNNN.

    Raises UserError where the disk has no room; nothing is left behind then.
    """
    folder = store / kind
    draft = folder / f".draft-{uuid.uuid4().hex}"
    try:
        draft.mkdir(parents=True)
        write(draft)
        files = {str(p.relative_to(draft)): _sha256(p) for p in sorted(draft.rglob("*")) if p.is_file()}
        sizes = {name: (draft / name).stat().st_size for name in files}
        entry = {
            "format": FORMAT,
            "kind": kind,
            "version": 0,
            "parents": [],
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **manifest,
            "code_version": __version__,
            "packages": {"python": platform.python_version(), **{p: _package_version(p) for p in PACKAGES}},
            "files": {name: {"sha256": digest, "bytes": sizes[name]} for name, digest in files.items()},
        }
        entry["content_sha256"] = _content_sha256(entry)
        while True:  # another process may take the number first: then the rename fails and the next number is tried
            entry["version"] = max((v for v, _ in _numbered(folder)), default=0) + 1
            (draft / MANIFEST).write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            _sync_tree(draft)
            target = folder / f"v{entry['version']:03d}"
            try:
                os.rename(draft, target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    continue
                raise
            _sync(folder)
            return Version(kind, target, entry)
    except Exception as error:
        if _disk_full(error):
            raise UserError(
                f"store={store}: no room left on the disk while writing a {kind} version; nothing was published"
            ) from error
        raise
    finally:
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)


def open_version(
    store: Path, kind: str, reference: str, verify: str = "full", key: str = "", content_sha256: str | None = None
) -> Version:
    """Find `latest`, `vN` or a path, and verify it: kind, format, content hash, no file but the listed ones, each one's size and, if verify is full, its
    sha256.

    content_sha256: what a frozen run holds; other content at that place is refused. Raises UserError saying what was found and what was wanted.
    """
    found = locate(store, kind, reference, key or kind.replace("-", "_"))
    manifest = found.manifest
    where = f"{found.path}"
    if manifest.get("kind") != kind:
        raise UserError(f"{where} is a {manifest.get('kind')} version; expected a {kind} version")
    if not isinstance(manifest.get("format"), int) or manifest["format"] > FORMAT:
        raise UserError(
            f"{where} has format {manifest.get('format')}, newer than this program reads ({FORMAT}); update grpo-safe"
        )
    if _content_sha256(manifest) != manifest["content_sha256"]:
        raise UserError(
            f"{found.path / MANIFEST} was altered: its content hash is not that of its entries ({', '.join(('files', *MEANING))}). Publish again, or "
            "restore the file"
        )
    unlisted = sorted(_files(found.path) - set(manifest["files"]))
    if unlisted:
        raise UserError(
            f"{where}: file {unlisted[0]} is not in the manifest, and would be loaded with the rest; remove it ({len(unlisted)} in all)"
        )
    for name, entry in manifest["files"].items():
        path = found.path / name
        if not path.is_file():
            raise UserError(f"{where}: file {name} is missing; the manifest lists it. Publish again, or copy the whole folder")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path} has {path.stat().st_size} bytes; the manifest says {entry['bytes']}: it was altered or torn")
        if verify == "full" and _sha256(path) != entry["sha256"]:
            raise UserError(f"{path} was altered: its sha256 is not the manifest's. Publish again, or restore the file")
    if content_sha256 not in (None, manifest["content_sha256"]):
        raise UserError(
            f"{where} is not the version that this run was frozen with: its content hash differs; "
            f"put that one back, or choose another: {kind.replace('-', '_')}=vN"
        )
    return found


def locate(store: Path, kind: str, reference: str, key: str) -> Version:
    """`latest`, `vN` or a path -> its manifest, not verified."""
    folder = store / kind
    if reference == "latest":
        numbered = _numbered(folder)
        if not numbered:
            raise UserError(
                f"{key}=latest: {folder} holds no version; {_made_by(kind)} publishes one, or name a path: {key}=PATH"
            )
        path = max(numbered)[1]
    elif re.fullmatch(r"v\d+", reference):
        matches = [p for number, p in _numbered(folder) if number == int(reference[1:])]
        if not matches:
            known = ", ".join(p.name for _, p in _numbered(folder)) or "none"
            raise UserError(f"{key}={reference}: no such version in {folder}; it holds {known}")
        path = matches[0]
    else:
        path = Path(reference)
        if not path.is_dir():
            raise UserError(f"{key}={reference}: no such folder; expected latest, vN or the path of a published version")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} has no {MANIFEST}: it is not a version that grpo-safe published") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path / MANIFEST} is not JSON ({error}): it was altered or torn") from error
    lacking = REQUIRED - set(manifest) if isinstance(manifest, dict) else REQUIRED
    if lacking:
        raise UserError(f"{path / MANIFEST} lacks {', '.join(sorted(lacking))}: it was altered, or is not of grpo-safe")
    return Version(manifest.get("kind", "?"), path, manifest)


def all_versions(store: Path) -> list[Version]:
    """Every published version, by kind and number; not verified."""
    return [locate(store, kind, str(path), kind) for kind in KINDS for _, path in sorted(_numbered(store / kind))]


def require_room(folder: Path, needed: int, what: str) -> None:
    """UserError unless `folder` can be written and its disk has `needed` bytes free. Called before anything expensive; leaves nothing behind."""
    probe = folder.resolve()
    while not probe.exists():
        probe = probe.parent
    try:
        attempt = probe / f".probe-{uuid.uuid4().hex}"
        attempt.touch()
        attempt.unlink()
    except OSError as error:
        raise UserError(
            f"store={folder}: {what} cannot be written there ({probe}: {error.strerror or error}); set store=PATH to a folder that can"
        ) from error
    free = shutil.disk_usage(probe).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB free, {what} needs about {needed / 1e9:.2f} GB; free some room or set store=PATH"
        )


def _disk_full(error: Exception) -> bool:
    """safetensors and torch wrap the system's error in kinds of their own; its words survive."""
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in str(error)


def _made_by(kind: str) -> str:
    return {"reward-model": "grpo-safe train-rm", "policy": "grpo-safe train-policy"}[kind]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return [(int(p.name[1:]), p) for p in folder.iterdir() if re.fullmatch(r"v\d+", p.name)]


def _files(folder: Path) -> set[str]:
    """Names of the files of a version but its manifest."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()} - {MANIFEST}


def _content_sha256(entry: dict[str, Any]) -> str:
    """What a version is, whatever its number, its date and the machine that made it."""
    content: dict[str, Any] = {name: file["sha256"] for name, file in entry["files"].items()}
    if entry["format"] > 1:
        content = {"files": content, "meaning": {name: entry[name] for name in MEANING if name in entry}}
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()


def find_content(store: Path, kind: str, content_sha256: str) -> Version | None:
    """The version of a store with this content, whatever its number."""
    found = (locate(store, kind, str(path), kind) for _, path in sorted(_numbered(store / kind)))
    return next((v for v in found if v.manifest["content_sha256"] == content_sha256), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
