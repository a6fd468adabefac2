"""Tables on disk -> raw rows, with nothing guessed: a cell of text is text, and only a column of labels holds numbers."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from grpo_safe.errors import UserError

FLAGS = {"true": 1.0, "false": 0.0}
LONGEST_CELL = 2**31 - 1


def delimited_rows(path: Path, source: str, key: str, labels: Collection[str]) -> Iterator[tuple[str, Any]]:
    """(where, row) of a .csv or .tsv file with a header line; an empty cell is None, in a column of `labels` a number or None.

    A row is a record, however many lines its cells span. Raises UserError naming the row that is wrong.
    """
    number, opener = 0, gzip.open if path.suffix == ".gz" else open
    delimiter = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    csv.field_size_limit(LONGEST_CELL)  # the module's own limit is 128 KiB a cell
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
            records = csv.reader(lines, delimiter=delimiter, strict=True)
            header = next(records, [])
            twice = [name for name in header if name and header.count(name) > 1]
            if not header or twice:
                found = f"the header names {twice[0]!r} twice" if twice else "it has no header line"
                raise UserError(f"{key}={source}: cannot be read ({found}); expected a line with the names of the columns")
            for cells in records:
                if not cells:  # an empty line
                    continue
                number += 1
                where = f"{source} row {number}"
                if len(cells) != len(header):
                    raise UserError(
                        f"{key}={source}: row {number}, line {records.line_num}, has {len(cells)} cells and the header {len(header)}; "
                        "put quotes around a cell that holds the separator"
                    )
                row = dict(zip(header, cells, strict=True))
                yield where, {name: _number(text, name, where) if name in labels else text or None for name, text in row.items()}
    except csv.Error as error:
        raise UserError(f"{key}={source}: row {number + 1} cannot be read ({error})") from error
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{key}={source} after row {number}: cannot be read ({error}); expected UTF-8") from error


def _number(text: str, name: str, where: str) -> float | None:
    """A cell of labels: a number, true or false, None where it is empty or nan."""
    plain = text.strip().casefold()
    if not plain:
        return None
    try:
        value = FLAGS[plain] if plain in FLAGS else float(plain.replace("_", "?"))  # Python reads 1_0 as 10
    except ValueError:
        raise UserError(f"{where}: {name}={text!r:.80}: expected a number, true, false, or an empty cell") from None
    return None if math.isnan(value) else value


def array_rows(path: Path) -> Iterator[tuple[str, Any]] | None:
    """(where, row) of a .json file that holds one list of rows; None: it holds something else, such as a row a line."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            if not file.read(4096).lstrip().startswith("["):
                return None
            file.seek(0)
            rows = json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: malformed JSON ({error.msg} at column {error.colno})") from error
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected UTF-8 JSON") from error
    return ((f"{path} row {n}", row) for n, row in enumerate(rows, 1))


def open_saved(path: Path, source: str, key: str) -> tuple[dict[str, Any], Iterator[tuple[str, Any]]]:
    """Fingerprint and rows of a folder that `Dataset.save_to_disk` wrote."""
    from datasets import Dataset, load_from_disk

    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text())["splits"]
        raise UserError(f"{key}={source}: a folder of several splits ({', '.join(names)}); name one, such as {source}/{names[0]}")
    try:
        table = load_from_disk(str(path))
    except Exception as error:  # the reader raises many kinds
        raise UserError(f"{key}={source}: cannot be read ({type(error).__name__}: {error!s:.200})") from error
    assert isinstance(table, Dataset)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.arrow")):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return {"source": source, "sha256": digest.hexdigest()}, ((f"{source} row {n}", row) for n, row in enumerate(table, 1))


def is_saved(path: Path) -> bool:
    """Whether a folder is one that `datasets` saved."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
