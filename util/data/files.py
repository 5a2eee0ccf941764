"""Data files, JSON, JSONL and Parquet: their records, by number.

What is wrong with a file raises UserError; what is wrong with a record, ValueError.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from util.config import UserError, logger, make_visible
from util.media.source import check_local_file, what_it_is

# An epoch is laid out in memory: so many times a file is more than anybody means.
MAX_RATE = 1000
# A row group of so many bytes takes as long to read as a few photographs to decode.
LARGE_GROUP = 64 * 2**20


class Records:
    """The records of one or several data files, JSON lists, JSONL or Parquet, by number.

    `names` are paths, each with an optional sampling rate: "a.json", "b.jsonl:0.5". Records stay
    bytes until they are asked for, and those of JSONL and Parquet files stay on the disk, so that a
    million lines cost no process more than their offsets. Raises UserError where a file cannot be
    used.
    """

    def __init__(self, names: list[str]):
        self.files = [_open_file(*_split_rate(name)) for name in names]
        self._digest = None
        self._ends = np.cumsum([len(file.starts) for file in self.files])

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, i: int):
        """Return record `i`, parsed.

        Raises ValueError where it cannot be read, DataHaveChanged where the file is another one.
        """
        file, i = self._find(i)
        if file.rows:
            try:
                return file.rows[i]
            finally:
                file.refuse_changes()
        data = file.read(int(file.starts[i]), int(file.ends[i]))
        try:
            text = data.decode("utf-8-sig")
            record = json.loads(text)
            if "\\ud" in text.lower():  # half of a pair of these is no text: nothing can write it
                json.dumps(record, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON at column {error.colno}: {error.msg}") from error
        except UnicodeError as error:
            raise ValueError(f"not UTF-8 text: {error}") from error
        except (ValueError, RecursionError) as error:  # a number of 4,300 digits, 1,000 levels
            raise ValueError(f"not JSON that Python can read: {error}") from error
        return record

    def where(self, i: int) -> str:
        """Return the file and place of record `i`, for messages."""
        file, i = self._find(i)
        place = f"sample {i}" if file.lines is None else f"line {file.lines[i]}"
        return make_visible(f"{file.path}: {place}")

    def folder(self, i: int) -> Path:
        """Return the folder of the file that holds record `i`."""
        return Path(self._find(i)[0].path).parent

    def digest(self) -> str:
        """Return a hash of all records and of the places that they stand at.

        Raises DataHaveChanged where a file is not what it was when it was opened.
        """
        if self._digest:
            return self._digest  # to read a large file takes its time
        key = hashlib.sha256()
        for file in self.files:
            for start in range(0, file.num_bytes, 1 << 24):
                key.update(file.read(start, min(start + (1 << 24), file.num_bytes)))
            key.update(file.starts.tobytes())
        self._digest = key.hexdigest()
        return self._digest

    def refuse_changes(self) -> None:
        """Raise DataHaveChanged where a file is not what it was when it was opened."""
        for file in self.files:
            file.refuse_changes()

    def groups(self) -> list[tuple[int, int, float]]:
        """Return (first, last, rate) of each file; record number `last` is the next file's."""
        ends = self._ends.tolist()
        return [(a, b, file.rate) for a, b, file in zip([0, *ends], ends, self.files)]

    def _find(self, i: int):
        number = int(np.searchsorted(self._ends, i, side="right"))
        return self.files[number], int(i - (self._ends[number - 1] if number else 0))


class DataHaveChanged(UserError):
    """A data file was edited after its records were counted: no plan can hold with it."""


@dataclass
class DataFile:
    """The bytes of a data file and where its records start and end in them."""

    path: str
    rate: float
    data: bytes | FileIO  # a file stays open: one that is renamed over it is another one
    starts: np.ndarray
    ends: np.ndarray
    lines: np.ndarray | None = None  # line numbers from 1, for JSONL
    rows: Sequence | None = None  # of a Parquet file, whose starts and ends are its own

    def __post_init__(self):
        self._opened = self._state()

    @property
    def num_bytes(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self._opened[0]

    def read(self, start: int, end: int) -> bytes:
        """Return some of the bytes. Raises DataHaveChanged where they were edited."""
        if isinstance(self.data, bytes):
            return self.data[start:end]
        data = os.pread(self.data.fileno(), end - start, start)
        self.refuse_changes()
        return data

    def refuse_changes(self) -> None:
        """Raise DataHaveChanged where the file was edited since it was opened."""
        if self._state() != self._opened:
            raise DataHaveChanged(
                f"{self.path}: was changed while it was in use. Do not edit it during a run: write "
                "a new file and rename it"
            )

    def _state(self) -> tuple[int, int]:
        if isinstance(self.data, bytes):
            return len(self.data), 0
        stat = os.fstat(self.data.fileno())
        return stat.st_size, stat.st_mtime_ns


def _split_rate(name: str) -> tuple[str, float]:
    path, _, rate = name.rpartition(":")
    try:
        rate = float(rate)
    except ValueError:
        return name, 1.0
    if not path:
        return name, 1.0
    if not 0 < rate <= MAX_RATE:
        raise UserError(f"{name}: the sampling rate must be above 0 and at most {MAX_RATE:,}")
    return path, rate


def _open_file(path: str, rate: float) -> DataFile:
    try:
        check_local_file(path)
        file = FileIO(path)
        start = os.pread(file.fileno(), 64, 0)
        is_parquet = path.endswith(".parquet") and start.startswith(b"PAR1")
        kind = None if is_parquet else what_it_is(start)
        if kind or path.endswith(".csv"):
            raise ValueError(
                f"is {kind or 'a table'}. Data files are JSON lists, JSONL of one record a line, "
                "or Parquet"
            )
        content = None if path.endswith((".jsonl", ".parquet")) else file.readall()
    except ValueError as error:
        missing = not os.path.lexists(path)
        raise UserError(
            f"{path}: {f'No such file: {Path(path).absolute()}' if missing else error}"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if path.endswith(".jsonl"):
        return DataFile(path, rate, file, *_find_lines(path, file))
    if path.endswith(".parquet"):
        return _open_parquet(path, rate, file)
    # Kept as bytes like JSONL: a list of objects would be copied into every worker process.
    records = [json.dumps(record).encode() for record in _parse_list(path, content)]
    ends = np.cumsum([len(record) for record in records])
    return DataFile(path, rate, b"".join(records), ends - [len(r) for r in records], ends)


def _open_parquet(path: str, rate: float, data: FileIO) -> DataFile:
    # Here, as it takes 0.3 s and 55 MB, which other files do not need.
    from util.data.parquet import ParquetRows

    nothing = np.zeros(0, np.int64)
    file = DataFile(path, rate, data, nothing, nothing)
    try:
        file.rows = ParquetRows(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: is not a Parquet file that can be read: {error}") from error
    if not len(file.rows):
        raise UserError(f"{path}: holds no records")
    if file.rows.largest_group > LARGE_GROUP:
        logger.warning(
            f"{path}: its row groups have up to {file.rows.largest_group >> 20:,} MiB. Every "
            "process that reads may hold one, and half of one is read for every sample: write it "
            "with a smaller row_group_size"
        )
    file.starts = file.ends = np.arange(len(file.rows))
    return file


def _find_lines(path: str, file: FileIO) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the starts, ends and numbers of the lines that are not blank."""
    ends, num_bytes = [], 0
    while part := file.read(1 << 24):
        ends.append(np.flatnonzero(np.frombuffer(part, np.uint8) == ord("\n")) + num_bytes)
        num_bytes += len(part)
    ends = np.concatenate([*ends, [num_bytes]])
    starts = np.concatenate([[0], ends[:-1] + 1])
    # No record is so short; lines of white space are.
    lengths = ends - starts
    short = np.flatnonzero((lengths > 0) & (lengths < 40))
    for i in short:
        if not os.pread(file.fileno(), int(lengths[i]), int(starts[i])).strip():
            lengths[i] = 0
    kept = np.flatnonzero(lengths)
    if len(kept) == 0:
        raise UserError(f"{path}: holds no records")
    return starts[kept], ends[kept], (kept + 1).astype(np.int32)


def _parse_list(path: str, data: bytes) -> list:
    try:
        records = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}. "
            "One object a line? Then its name must end in .jsonl"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON that Python can read: {error}") from error
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: must be a non-empty JSON list of conversations")
    return records
