"""Where a model starts from: a folder, a hub name at its commit, an embedded model, a published adapter on its base."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_safe.errors import UserError
from grpo_safe.models import embedded

ADAPTER_CONFIG = "adapter_config.json"  # peft's name


MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Start:
    """Where a model starts from, as from_pretrained takes it."""

    name: str  # what the user wrote
    location: str  # a folder or a hub name
    options: dict[str, Any]
    key: str = ""  # the config key that named it, for messages
    adapter: str | None = None  # a folder with a LoRA adapter of the model at `location`: the start is both together
    dtype: str | None = None  # what the base of that adapter is rounded to before the adapter is added; None: as it is stored

    @property
    def is_hub(self) -> bool:
        """Whether the hub has this very model, so that a name is enough to find it again."""
        return self.adapter is None and on_hub(self.location)

    @property
    def folder(self) -> str:
        """What the user pointed at: where its tokenizer and its manifest are."""
        return self.adapter or self.location

    @property
    def called(self) -> str:
        """How a message names it: KEY=NAME."""
        return f"{self.key}={self.name}" if self.key else self.name


def on_hub(location: str) -> bool:
    """A location that is no folder is a hub name."""
    return not Path(location).is_dir()


def resolve_start(start: str, revision: str | None, trust_remote_code: bool, key: str) -> Start:
    """A folder, a hub name or embedded:NAME, checked as far as the local disk can tell."""
    location = start
    if embedded.is_embedded(start):
        location = str(embedded.embedded_folder(start))
    elif start.startswith((".", "/", "~")) or start.count("/") != 1:
        location = str(Path(start).expanduser())
        if (Path(location) / ADAPTER_CONFIG).is_file():
            return _adapter_start(start, Path(location), trust_remote_code, key)
        if not (Path(location) / "config.json").is_file():
            raise UserError(
                f"{key}={start}: no model folder (no config.json there); expected a folder, OWNER/NAME on the hub, embedded:NAME"
            )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    return Start(start, location, options, key)


def _adapter_start(start: str, folder: Path, trust_remote_code: bool, key: str) -> Start:
    """A LoRA adapter and the model that it was trained on: by its manifest where we published it, else by peft's own config."""
    if (folder / MANIFEST).is_file():
        layout = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["layout"]
        name, revision, dtype = layout["base"], layout.get("revision"), layout.get("dtype")
    else:
        peft_config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        name, revision, dtype = peft_config.get("base_model_name_or_path"), peft_config.get("revision"), None
    if not name:
        raise UserError(
            f"{key}={start}: {folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path); merge the adapter, or name its base there"
        )
    base = resolve_start(name, revision, trust_remote_code, f"{key}={start}: its base")
    if base.adapter is not None:
        raise UserError(f"{key}={start}: its base {name} is an adapter too; merge that one first")
    return replace(base, name=start, key=key, adapter=str(folder), dtype=dtype)


def pinned(start: Start) -> Start:
    """The start at the very commit that the hub (or its cache here) has now: what is loaded later, and by whoever opens what is published, is the
    same. A local folder has no commit.
    """
    if not on_hub(start.location):
        return start
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        found = cached_file(start.location, "config.json", revision=start.options.get("revision"))
    except OSError as error:
        raise UserError(f"{start.called}: its config cannot be loaded ({reason(error)})") from error
    commit = extract_commit_hash(found, None)
    return start if commit is None else replace(start, options=start.options | {"revision": commit})


def reason(error: BaseException) -> str:
    """A library's error on one line."""
    if "trust_remote_code" in str(error):
        return "it comes with code of its own; if you trust it: policy.trust_remote_code=true, backbone. in train-rm, trust_remote_code=true in eval"
    lines = str(error).strip().splitlines()
    text = f"{lines[0]:.200}" if lines else type(error).__name__
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"
