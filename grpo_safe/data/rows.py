"""Files and hub data sets -> rows and prompts. Every bad row is found here, before a model is loaded."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module, resources
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import parse_qs

from grpo_safe.config import ColumnsConfig, DataConfig, DataObjectiveConfig
from grpo_safe.data.tables import array_rows, delimited_rows, is_saved, open_saved
from grpo_safe.errors import UserError
from grpo_safe.records import LabelledRow, Message, PreferenceRow, Prompt, Row

ROLES = ("system", "user", "assistant", "tool")
# What a message may hold beside its content that a chat template would show: dropping it would change what was said.
MEANT = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "thinking", "images", "audio", "refusal")
KINDS = ".jsonl, .json, .csv, .tsv (each also .gz), .parquet, or a folder of Dataset.save_to_disk"


@dataclass(frozen=True)
class Split:
    """The rows of one split, and what they were read from (for the manifest)."""

    rows: list[Row]
    fingerprints: list[dict[str, Any]]


def load_rows(spec: DataConfig, seed: int) -> tuple[Split, Split]:
    """Train and validation rows; without data.validation, a share of the train prompts is held back, by prompt.

    Raises UserError naming file, row and key of the first bad row; for an empty split; for an objective without labels.
    """
    if not spec.objectives:
        raise UserError(f"data={spec.name}: data.objectives is empty; expected at least one NAME: {{range: [lo, hi]}}")
    train = _read_rows(spec, spec.train, "data.train")
    if spec.validation is not None:
        validation = _read_rows(spec, spec.validation, "data.validation")
    else:
        held = {r.prompt.id for r in train.rows if _share(r.prompt.id) < spec.validation_fraction}
        validation = Split([r for r in train.rows if r.prompt.id in held], train.fingerprints)
        train = Split([r for r in train.rows if r.prompt.id not in held], train.fingerprints)
    train, validation = _limited(train, spec.limit, seed), _limited(validation, spec.limit, seed)
    for split, key in ((train, "data.train"), (validation, "data.validation")):
        if not split.rows:
            raise UserError(
                f"{key}: no rows: data.validation_fraction={spec.validation_fraction:g} of the prompts of "
                f"data.train={spec.train} leaves none; expected more prompts, another share, or data.validation=SOURCE"
            )
        present = {name for r in split.rows for name in _objectives_of(r)}
        absent = [name for name in spec.objectives if name not in present]
        if absent:
            raise UserError(
                f"{key}: no row has a label or a pair for objective {', '.join(absent)}; "
                "remove it from data.objectives, or check its column"
            )
    return train, validation


def load_prompts(spec: DataConfig, split: str, seed: int = 0) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """The distinct prompts of a split (train, validation or heldout), in file order, and their fingerprints; at most data.limit, drawn with `seed`.

    A split that the data set lacks falls back to the next: heldout -> validation -> a share of train, held back by prompt.
    """
    fingerprints: list[dict[str, Any]] = []
    prompts: dict[str, Prompt] = {}
    for _, _, prompt in _rows_of_split(spec, split, fingerprints):
        prompts.setdefault(prompt.id, prompt)
    return _drawn(list(prompts.values()), spec.limit, seed), fingerprints


def load_answers(spec: DataConfig, labelled: bool, seed: int = 0) -> tuple[list[LabelledRow], list[dict[str, Any]]]:
    """Every answer of the train split with its prompt, a pair as two of them, and the fingerprints.

    At most data.limit prompts, drawn with `seed`, each with all of its answers: a comparison needs them.
    labelled: with labels in [0, 1] as in load_rows, 1 and 0 for the better and the worse of a pair; else no label is read, and the response may
    be a list of answers.
    """
    fingerprints: list[dict[str, Any]] = []
    answers: list[LabelledRow] = []
    for where, raw, prompt in _rows_of_split(spec, "train", fingerprints, _label_columns(spec) if labelled else ()):
        if labelled:
            row = _row(raw, spec, where)
            if isinstance(row, PreferenceRow):
                labels = ((row.chosen, 1.0), (row.rejected, 0.0))
                answers += [LabelledRow(row.prompt, text, {row.objective: label}, row.source) for text, label in labels]
            else:
                answers.append(row)
            continue
        texts = _texts(raw, spec.columns, where)
        answers += [LabelledRow(_told_apart(prompt, texts[0]), text, {}) for text in texts]
    kept = set(_drawn(list(dict.fromkeys(row.prompt.id for row in answers)), spec.limit, seed))
    return [row for row in answers if row.prompt.id in kept], fingerprints


def _texts(raw: dict[str, Any], columns: ColumnsConfig, where: str) -> list[str]:
    """chosen and rejected, the response, or a list of responses."""
    if raw.get(columns.chosen) is not None:
        return [_text(raw, c, where) for c in (columns.chosen, columns.rejected)]
    several = raw.get(columns.response)
    if isinstance(several, list) and several and not _messages(several, f"{where}: {columns.response}"):
        return [_text({columns.response: text}, columns.response, where) for text in several]
    return [_text(raw, columns.response, where)]


def _rows_of_split(
    spec: DataConfig, split: str, fingerprints: list[dict[str, Any]], labels: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any], Prompt]]:
    """(where, row, prompt) of a split; fingerprints fills up on the way."""
    source, held_back = spec.train, None
    if split != "train":
        if split == "heldout" and spec.heldout is not None:
            source = spec.heldout
        elif spec.validation is not None:
            source = spec.validation
        else:
            held_back = True
    elif spec.validation is None:
        held_back = False
    key, empty = f"data.{split}", True
    for path in _as_list(source, key):
        fingerprint, numbered = _open_source(path, key, labels)
        fingerprints.append(fingerprint)
        for where, raw in numbered:
            for row in _canonical(raw, spec.row_function, where):
                prompt = _prompt(row, spec.columns, where)
                if held_back is None or (_share(prompt.id) < spec.validation_fraction) == held_back:
                    empty = False
                    yield where, row, prompt
    if empty:
        raise UserError(f"{key}={source}: no prompts")


def import_function(path: str, key: str) -> Callable[..., Any]:
    """The function at an import path `package.module.name`; UserError naming the config key where there is none."""
    module_name, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}={path}: no such function ({error}); expected package.module.function") from error
    except Exception as error:  # the user's own module may raise anything while it is read, a SyntaxError too
        raise UserError(f"{key}={path}: its module cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise UserError(f"{key}={path}: not a function")
    return function


# --- rows -------------------------------------------------------------------------------------------------------------


def _read_rows(spec: DataConfig, sources: Any, key: str) -> Split:
    rows: list[Row] = []
    fingerprints = []
    for source in _as_list(sources, key):
        fingerprint, numbered = _open_source(source, key, _label_columns(spec))
        before = len(rows)
        for where, raw in numbered:
            for row in _canonical(raw, spec.row_function, where):
                rows.append(_row(row, spec, where))
        fingerprints.append({**fingerprint, "rows": len(rows) - before})
    if not rows:
        raise UserError(f"{key}={sources}: no rows")
    return Split(rows, fingerprints)


def _row(raw: dict[str, Any], spec: DataConfig, where: str) -> Row:
    columns = spec.columns
    prompt = _prompt(raw, columns, where)
    source = str(raw.get("source") or "")
    if raw.get(columns.chosen) is not None:
        chosen, rejected = (_text(raw, c, where) for c in (columns.chosen, columns.rejected))
        objective = raw.get(columns.objective) or spec.pair_objective
        if objective not in spec.objectives:
            raise UserError(
                f"{where}: preference for objective {objective!r} (column {columns.objective}, or data.pair_objective); "
                f"expected one of {', '.join(spec.objectives)}"
            )
        if chosen == rejected:
            raise UserError(f"{where}: {columns.chosen} and {columns.rejected} are the same text")
        return PreferenceRow(_told_apart(prompt, chosen), chosen, rejected, objective, source)
    response = _text(raw, columns.response, where)
    labels = _labels(raw, columns, spec.objectives, where)
    return LabelledRow(_told_apart(prompt, response), response, labels, source)


def _told_apart(prompt: Prompt, answer: str) -> Prompt:
    """Rows without a prompt share nothing: each is a prompt of its own, or all would fall into one half of every split."""
    return prompt if prompt.text.strip() else replace(prompt, id=hashlib.sha256(answer.encode()).hexdigest()[:16])


def _label_columns(spec: DataConfig) -> set[str]:
    return {objective.column or name for name, objective in spec.objectives.items()}


def _labels(
    raw: dict[str, Any], columns: ColumnsConfig, objectives: dict[str, DataObjectiveConfig], where: str
) -> dict[str, float]:
    nested = raw.get(columns.labels) or {}
    if not isinstance(nested, dict):
        raise UserError(f"{where}: {columns.labels}={nested!r}: expected {{objective: number}}")
    unknown = [name for name in nested if name not in objectives]
    if unknown:
        raise UserError(f"{where}: label for unknown objective {unknown[0]!r}; data.objectives has {', '.join(objectives)}")
    labels = {}
    for name, objective in objectives.items():
        value = raw.get(objective.column) if objective.column else nested.get(name, raw.get(name))
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue  # missing: masked in the loss
        if not isinstance(value, (int, float)):
            raise UserError(f"{where}: label {name}={value!r}: expected a number or null")
        lo, hi = objective.range
        if not min(lo, hi) <= value <= max(lo, hi):
            raise UserError(f"{where}: label {name}={value} is outside its range [{lo:g}, {hi:g}]")
        labels[name] = (value - lo) / (hi - lo)
    if not labels:
        names = ", ".join(objectives)
        raise UserError(f"{where}: no label for any of {names} (all missing or null); remove the row, or check the columns")
    return labels


def _prompt(raw: dict[str, Any], columns: ColumnsConfig, where: str) -> Prompt:
    if columns.prompt not in raw:
        raise UserError(f"{where}: no column {columns.prompt!r}; it has {', '.join(map(str, raw))} (data.columns.prompt maps it)")
    value = raw[columns.prompt]
    if _is_text(value):
        messages = [{"role": "user", "content": value}]
    elif messages := _messages(value, f"{where}: {columns.prompt}"):
        pass
    else:
        raise UserError(
            f"{where}: {columns.prompt}={value!r:.80}: expected a valid string, or a list of {{role, content}} "
            f"with roles {', '.join(ROLES)}"
        )
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return Prompt(digest[:16], messages, str(raw.get(columns.kind) or "unknown"))


def _messages(value: Any, where: str) -> list[Message]:
    """A list of {role, content} as messages of plain text; empty where it is not one. UserError for a field that would be dropped."""
    if not isinstance(value, list):
        return []
    found = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return []
        for name in MEANT:
            if message.get(name):
                raise UserError(
                    f"{where}: a message of role {message['role']} has {name}={message[name]!r:.80}, which would not be read; "
                    "expected role and content alone: write it into the content (data.row_function may), or remove the row"
                )
        content = _joined(message.get("content"), where)
        if not _is_text(content):
            return []
        found.append({"role": message["role"], "content": content})
    return found


def _joined(content: Any, where: str) -> Any:
    """Content given as parts [{type: text, text: ...}] as one text; anything else as it is. UserError for a part that is no text."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not _is_text(part.get("text")):
            raise UserError(
                f"{where}: a message's content has the part {part!r:.80}; expected parts of text alone, {{type: text, text: ...}}"
            )
    return "\n".join(part["text"] for part in content)


def _is_text(value: Any) -> TypeGuard[str]:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair: no tokenizer takes it
        return False
    return True


def _text(raw: dict[str, Any], column: str, where: str) -> str:
    value = raw.get(column)
    if messages := _messages(value, f"{where}: {column}"):  # an answer with its conversation: the last turn
        if messages[-1]["role"] != "assistant":
            raise UserError(
                f"{where}: {column} ends with a turn of role {messages[-1]['role']}; expected the assistant's answer last"
            )
        value = messages[-1]["content"]
    if not _is_text(value) or not value.strip():
        raise UserError(f"{where}: {column}={value!r:.80}: expected a valid text that is not empty")
    return value


def _objectives_of(row: Row) -> Iterable[str]:
    return row.labels if isinstance(row, LabelledRow) else (row.objective,)


def _limited(split: Split, limit: int | None, seed: int) -> Split:
    return Split(_drawn(split.rows, limit, seed), split.fingerprints)


def _drawn(items: list[Any], limit: int | None, seed: int) -> list[Any]:
    """At most `limit` of the items, in their order."""
    if limit is None or len(items) <= limit:
        return items
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]


def _share(prompt_id: str) -> float:
    return int(prompt_id[:8], 16) / 0x1_0000_0000


# --- sources ----------------------------------------------------------------------------------------------------------


def _as_list(sources: Any, key: str) -> list[str]:
    listed = sources if isinstance(sources, list) else [sources]
    if not listed or not all(isinstance(source, str) and source for source in listed):
        raise UserError(f"{key}={sources!r}: expected a path, hub:OWNER/NAME:SPLIT or embedded:SPLIT, or a list of them")
    return listed


def _canonical(raw: Any, row_function: str | None, where: str) -> list[dict[str, Any]]:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: found {type(raw).__name__}; expected an object with columns")
    if row_function is None:
        return [raw]
    function = import_function(row_function, "data.row_function")
    try:
        given = function(raw)
        rows = [] if isinstance(given, dict) else list(given)
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"{where}: data.row_function={row_function} failed: {type(error).__name__}: {error}") from error
    if isinstance(given, dict) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where}: data.row_function={row_function} returned {given!r:.80}; expected a list of dicts")
    return rows


def _open_source(source: str, key: str, labels: Collection[str] = ()) -> tuple[dict[str, Any], Iterator[tuple[str, Any]]]:
    """Fingerprint and (where, row) of a source; `labels` are the columns that hold numbers, where the file cannot say so itself."""
    if source.startswith("hub:"):
        return _open_hub(source, key)
    if source.startswith("embedded:"):
        path = Path(str(resources.files("grpo_safe").joinpath("embedded", f"{source.removeprefix('embedded:')}.jsonl")))
    else:
        path = Path(source)
    if is_saved(path):
        return open_saved(path, source, key)
    if not path.is_file():
        raise UserError(f"{key}={source}: no such file; expected {KINDS}")
    fingerprint = {"source": source, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        rows = array_rows(path) if name.endswith(".json") else None
        return fingerprint, rows if rows is not None else _json_lines(path)
    if name.endswith((".csv", ".tsv")):
        return fingerprint, delimited_rows(path, source, key, labels)
    if name.endswith(".parquet"):
        from datasets import Dataset

        try:
            table = Dataset.from_parquet(str(path))
        except Exception as error:  # the readers raise many kinds
            raise UserError(f"{key}={source}: cannot be read ({_reason(error)})") from error
        return fingerprint, ((f"{source} row {n}", row) for n, row in enumerate(table, 1))
    raise UserError(f"{key}={source}: unknown kind of file; expected {KINDS}")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path} row {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} row {number}: malformed JSON ({error.msg} at column {error.colno})") from error
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:  # not UTF-8, not gzip, cut short
        raise UserError(f"{path} after row {number}: cannot be read ({_reason(error)}); expected UTF-8 lines of JSON") from error


def _open_hub(source: str, key: str) -> tuple[dict[str, Any], Iterator[tuple[str, Any]]]:
    """hub:OWNER/NAME:SPLIT[?name=CONFIG&data_dir=DIR&revision=REV], read through `datasets`."""
    from datasets import load_dataset

    address, _, query = source.removeprefix("hub:").partition("?")
    name, _, split = address.partition(":")
    options = {k: v[0] for k, v in parse_qs(query).items()}
    unknown = set(options) - {"name", "data_dir", "revision"}
    if unknown or not split:
        raise UserError(f"{key}={source}: expected hub:OWNER/NAME:SPLIT[?name=CONFIG&data_dir=DIR&revision=REV]")
    try:
        table = load_dataset(name, split=split, **options)
    except Exception as error:  # network, missing set, wrong split: datasets raises many kinds
        raise UserError(f"{key}={source}: the hub data set cannot be loaded ({_reason(error)})") from error
    fingerprint = {"source": source, "fingerprint": table._fingerprint}
    return fingerprint, ((f"{source} row {n}", row) for n, row in enumerate(table, 1))


def _reason(error: BaseException) -> str:
    """The first line of what lies at the root: `datasets` wraps what its readers raise."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
