"""Resume states: runs/.../state/step-000200/, complete or absent. Safetensors and JSON, no pickle, any number of processes.

Randomness follows from (seed, step, ...), and data order from (seed, epoch), so weights, Adam moments, the step and a small record are all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from grpo_safe.errors import StageError, UserError
from grpo_safe.runtime import Runtime, Trainable
from grpo_safe.tracking import truncate_metrics

SHARD_BYTES = 4 * 2**30
PUBLISHED = "published.txt"
DATA = "data.json"
Files = dict[str, list[dict[str, Any]]]  # split -> fingerprints of its sources


@dataclass(frozen=True)
class Resumed:
    """Where a resumed run goes on."""

    step: int
    record: dict[str, Any]
    beside: dict[str, torch.Tensor]  # tensors that a stage keeps besides the model's


class Stored(Mapping[str, torch.Tensor]):
    """The tensors of a state, read from its shards one at a time as they are asked for: no rank holds the whole state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, str] = json.loads((folder / "index.json").read_text())

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor of its own, float32 on the CPU; UserError where the state has none of that name."""
        if name not in self.index:
            raise UserError(
                f"{self.folder}: no {name} in this resume state; it is of a model with other trainable weights: resume with the config of its run"
            )
        with safe_open(self.folder / self.index[name], framework="pt") as shard:
            return shard.get_tensor(name).clone()  # what is read may be a view of the file, which goes when the state is old

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def save(
    run_dir: Path,
    step: int,
    trainable: Trainable,
    rt: Runtime,
    record: dict[str, Any],
    keep: int,
    optimizer_steps: int | None = None,
    beside: dict[str, torch.Tensor] | None = None,
    also: Collection[int] = (),
) -> None:
    """Write the state of a finished step; every rank calls, the main one writes.

    Of earlier states the last `keep` stay, this one counted, and the steps `also`; later ones are of a run that was taken up again before them, and go.
    Raises StageError where a weight is not finite: the earlier states stay as they are.
    """
    folder = run_dir / "state" / f"step-{step:06d}"
    draft = folder.with_name(f".draft-{folder.name}")
    if rt.is_main:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(draft, chain(trainable.state(), ((f"beside/{n}", t) for n, t in (beside or {}).items())))
        entry = {"step": step, "optimizer_steps": optimizer_steps if optimizer_steps is not None else step, "record": record}
        (draft / "state.json").write_text(json.dumps(entry) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
        numbered = {int(p.name.removeprefix("step-")): p for p in folder.parent.glob("step-*")}
        kept = {*sorted(n for n in numbered if n <= step)[-keep:], *also}
        for number, old in numbered.items():
            if number > step or number not in kept:
                shutil.rmtree(old)
    else:
        for _ in trainable.state():  # gathering is collective
            pass
    rt.barrier()


def best_steps(run_dir: Path) -> set[int]:
    """The steps that the kept states note as the best so far: a run that goes on from one of them will ask for it."""
    records = (json.loads(path.read_text())["record"] for path in (run_dir / "state").glob("step-*/state.json"))
    return {record["best"]["step"] for record in records if record.get("best")}


def load(run_dir: Path, trainable: Trainable, step: int | None = None) -> Resumed:
    """Put the newest state back, or that of `step`. Raises UserError where there is none."""
    folder = newest(run_dir) if step is None else run_dir / "state" / f"step-{step:06d}"
    if folder is None or not folder.is_dir():
        raise UserError(
            f"resume={run_dir}: no resume state in {run_dir / 'state'}; the run wrote none (train.save_every), start it anew"
        )
    entry = json.loads((folder / "state.json").read_text())
    tensors = Stored(folder)
    beside = {name.removeprefix("beside/"): tensors[name] for name in tensors if name.startswith("beside/")}
    trainable.load_state(tensors, entry["optimizer_steps"])
    return Resumed(entry["step"], entry["record"], beside)


def mark_published(run_dir: Path, version: str) -> None:
    """Note what a finished run published, so that resuming it again does not publish a double."""
    (run_dir / PUBLISHED).write_text(version + "\n")


def refuse_finished(run_dir: Path, step: int, steps: int) -> None:
    """UserError where the run to be resumed has done all its steps and published."""
    published = run_dir / PUBLISHED
    if step >= steps and published.is_file():
        raise UserError(
            f"resume={run_dir}: the run is finished, published as {published.read_text().strip()}; to go on from there, type a larger train.steps"
        )


def note_data(run_dir: Path, files: Files) -> None:
    """Note what a run reads when it starts, so that it goes on with nothing else."""
    (run_dir / DATA).write_text(json.dumps(files, indent=1) + "\n")


def refuse_changed_data(run_dir: Path, files: Files) -> None:
    """UserError naming the first source whose content is not the one that the run noted at its start; its name may have changed."""
    if not (run_dir / DATA).is_file():  # the run is older than the note
        return
    noted: Files = json.loads((run_dir / DATA).read_text())
    for split, now in files.items():
        before = noted.get(split, [])
        if not before or not now:  # a split that only one of the two reads, such as validation under train.eval_every
            continue
        changed = [new["source"] for old, new in zip(before, now, strict=False) if _content(old) != _content(new)]
        if len(before) != len(now):
            changed.append(f"{len(now)} sources in place of {len(before)}")
        if changed:
            raise UserError(
                f"resume={run_dir}: data.{split}: {changed[0]} is not what the run began with; put the data back, or start a new run "
                "on the other data"
            )


def _content(source: dict[str, Any]) -> Any:
    return source.get("sha256") or source.get("fingerprint")


def newest(run_dir: Path) -> Path | None:
    """The folder of the last complete state."""
    states = sorted((run_dir / "state").glob("step-*"))
    return states[-1] if states else None


def rewind_logs(run_dir: Path, step: int, rt: Runtime) -> None:
    """Metrics written after the state are cut, so that no step stands twice."""
    if rt.is_main:
        truncate_metrics(run_dir, step)
    rt.barrier()


def _write(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal shard, size
        name = f"shard-{len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for key, tensor in tensors:
        if not tensor.isfinite().all():
            raise StageError(
                f"{key} is not finite: nothing was saved. Lower optim.lr, or resume from an earlier state with another one"
            )
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[key] = tensor.contiguous().clone()
        size += tensor.nbytes
    flush()
    (folder / "index.json").write_text(json.dumps(index))
