"""Data files, JSON and JSONL: their records, by number.

What is wrong with a file raises UserError; what is wrong with a record, ValueError.
"""

import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.config import UserError, make_visible
from util.media.source import check_local_file

# An epoch is laid out in memory: so many times a file is more than anybody means.
MAX_RATE = 1000


class Records:
    """The records of one or several data files, JSON lists or JSONL, by number.

    `names` are paths, each with an optional sampling rate: "a.json", "b.jsonl:0.5". Records stay
    bytes until they are asked for: a JSONL file is mapped, not read, so that a million lines cost
    no process more than their offsets. Raises UserError where a file cannot be used.
    """

    def __init__(self, names: list[str]):
        self.files = [_open_file(*_split_rate(name)) for name in names]
        self._ends = np.cumsum([len(file.starts) for file in self.files])

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, i: int):
        """Return record `i`, parsed. Raises ValueError where a line is not JSON."""
        file, i = self._find(i)
        try:
            text = bytes(file.data[file.starts[i] : file.ends[i]]).decode("utf-8-sig")
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
        """Return a hash of the content of all files."""
        key = hashlib.sha256()
        for file in self.files:
            with open(file.path, "rb") as stream:
                key.update(hashlib.file_digest(stream, "sha256").digest())
        return key.hexdigest()

    def groups(self) -> list[tuple[int, int, float]]:
        """Return (first, last, rate) of each file; record number `last` is the next file's."""
        ends = self._ends.tolist()
        return [(a, b, file.rate) for a, b, file in zip([0, *ends], ends, self.files)]

    def _find(self, i: int):
        number = int(np.searchsorted(self._ends, i, side="right"))
        return self.files[number], int(i - (self._ends[number - 1] if number else 0))


@dataclass
class DataFile:
    """The bytes of a data file and where its records start and end in them."""

    path: str
    rate: float
    data: bytes | mmap.mmap
    starts: np.ndarray
    ends: np.ndarray
    lines: np.ndarray | None  # line numbers from 1, for JSONL


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
        with open(path, "rb") as file:
            if path.endswith(".jsonl"):
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            else:
                data = file.read()
    except ValueError as error:
        missing = not os.path.lexists(path)
        raise UserError(
            f"{path}: {f'No such file: {Path(path).absolute()}' if missing else error}"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if path.endswith(".jsonl"):
        return DataFile(path, rate, data, *_find_lines(path, data))
    # Kept as bytes like JSONL: a list of objects would be copied into every worker process.
    records = [json.dumps(record).encode() for record in _parse_list(path, data)]
    ends = np.cumsum([len(record) for record in records])
    return DataFile(path, rate, b"".join(records), ends - [len(r) for r in records], ends, None)


def _find_lines(path: str, data: mmap.mmap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the starts, ends and numbers of the lines that are not blank."""
    ends = []
    view = np.frombuffer(data, np.uint8)
    for start in range(0, len(view), 1 << 24):  # in parts, or the comparison copies the file
        part = view[start : start + (1 << 24)]
        ends.append(np.flatnonzero(part == ord("\n")) + start)
        data.madvise(mmap.MADV_DONTNEED, start, len(part))  # nor does the file stay in memory
    ends = np.concatenate([*ends, [len(view)]])
    starts = np.concatenate([[0], ends[:-1] + 1])
    # No record is so short; lines of white space are.
    lengths = ends - starts
    short = np.flatnonzero((lengths > 0) & (lengths < 40))
    lengths[[i for i in short if not data[starts[i] : ends[i]].strip()]] = 0
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
