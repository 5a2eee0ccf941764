"""Data files and the conversations in them: three formats, JSON and JSONL.

What is wrong with a file raises UserError; what is wrong with a record, ValueError naming the
message in it.
"""

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.config import UserError
from util.media_source import check_local_file, check_media_item

ROLES = ("system", "user", "assistant")
# As LLaVA, its followers and Qwen's own script name them.
SPEAKERS = {
    **{"system": "system", "human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant"},
}
MEDIA_TYPES = ("image", "video")
MEDIA_TAG = re.compile("<(image|video)>")


# ---------------------------------------------------------------- the data files


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
        return f"{file.path}: {place}"

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
    if not 0 < rate < float("inf"):
        raise UserError(f"{name}: the sampling rate must be above 0")
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


# ---------------------------------------------------------------- the conversation


def parse_conversation(record) -> list[dict]:
    """Return the messages of one record of a data file, checked.

    Three formats, told apart by their keys: "messages" with typed content (the one returned);
    "messages" with <image> and <video> tags in the text and lists "images" and "videos";
    "conversations" of {"from": ..., "value": ...} with the same tags and "image" or "video".

    A message is {"role": ..., "content": ...}; content is a string or a list of items
    {"type": "text", "text": ...}, {"type": "image", "image": ...}, {"type": "video", "video": ...}.
    Raises ValueError naming the message where a record is anything else.
    """
    if not isinstance(record, dict):
        record = {}
    key = "messages" if record.get("conversations") is None else "conversations"
    if key == "conversations" and record.get("messages") is not None:
        raise ValueError('both "messages" and "conversations": use one of them')
    messages = record.get(key)
    if not isinstance(messages, list):
        raise ValueError('must be an object with a list "messages" or "conversations"')
    if not messages:
        raise ValueError("the conversation is empty")
    if key == "conversations":
        messages = [_from_turn(i, turn) for i, turn in enumerate(messages)]
    messages = [_parse_message(i, message) for i, message in enumerate(messages)]
    return _place_tagged_media(messages, record)


def _from_turn(i: int, turn) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f"message {i}: must be an object with from and value")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise ValueError(f"message {i}: unknown speaker {speaker!r}: use human, gpt or system")
    return {"role": SPEAKERS[speaker], "content": turn.get("value")}


def _place_tagged_media(messages: list[dict], record: dict) -> list[dict]:
    """Put the record's own lists of media where the tags in its text stand."""
    media = {kind: _media_list(record, kind) for kind in MEDIA_TYPES}
    left = {kind: iter(items) for kind, items in media.items()}
    counts = dict.fromkeys(MEDIA_TYPES, 0)
    texts = [message["content"] for message in messages if isinstance(message["content"], str)]
    # LLaVA-Video writes <image> for its clips.
    is_llava_video = not media["image"] and not any("<video>" in text for text in texts)
    for i, message in enumerate(messages):
        if not isinstance(message["content"], str) or not MEDIA_TAG.search(message["content"]):
            continue
        content = []
        # Odd parts are tags. The line break that sets a tag apart is not part of the text.
        for k, part in enumerate(re.split(r"\n?<(image|video)>\n?", message["content"])):
            if k % 2 == 0:
                content += [{"type": "text", "text": part}] if part else []
            else:
                kind = "video" if is_llava_video and media["video"] else part
                counts[kind] += 1
                item = next(left[kind], None)
                content += [_parse_item(f"message {i}", item)] if item else []
        message["content"] = content
    for kind in MEDIA_TYPES:
        if counts[kind] != len(media[kind]):
            raise ValueError(
                f"<{kind}> tags in the text: {counts[kind]}, but in the record's list: "
                f"{len(media[kind])}. Put one tag where each {kind} belongs"
            )
    return messages


def _media_list(record: dict, kind: str) -> list[dict]:
    """Return what a record lists under "image" or "images" (or video) as items."""
    values = [record.get(key) for key in (kind, f"{kind}s")]
    values = [value for value in values if value not in (None, [], "")]
    if len(values) == 2:
        raise ValueError(f'both "{kind}" and "{kind}s": use one of them')
    items = []
    for entry in values[0] if values and isinstance(values[0], list) else values:
        if isinstance(entry, dict) and entry.get("type", kind) != kind:
            raise ValueError(f'"{kind}s" lists an item of type {entry["type"]!r}')
        if entry is not None:
            items.append({**(entry if isinstance(entry, dict) else {kind: entry}), "type": kind})
    return items


def _parse_message(i: int, message) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f"message {i}: must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {i}: unknown role {role!r}: use system, user or assistant")
    if role == "system" and i > 0:
        raise ValueError(f"message {i}: a system message must come first")
    for kind in MEDIA_TYPES:
        if message.get(kind) or message.get(f"{kind}s"):
            raise ValueError(
                f'message {i}: has a key "{kind}": {kind}s are items of the content, or stand in '
                "the record's own list"
            )
    if isinstance(content, list):
        content = [_parse_item(f"message {i}, item {k}", item) for k, item in enumerate(content)]
    elif not isinstance(content, str):
        raise ValueError(f"message {i}: content must be a string or a list")
    return {"role": role, "content": content}


def _parse_item(where: str, item) -> dict:
    # Rows that passed through Arrow carry every key of every item, with null where there is none.
    item = {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else {}
    kind = item.get("type")
    if kind not in ("text", *MEDIA_TYPES):
        raise ValueError(f"{where}: unknown type {kind!r}: use text, image or video")
    if kind in MEDIA_TYPES:
        try:
            check_media_item(item)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return item
    if not isinstance(item.get("text"), str):
        raise ValueError(f'{where}: an item of type text needs a string "text"')
    if extra := set(item) - {"type", "text"}:
        raise ValueError(f"{where}: unknown key {min(extra)!r}")
    return item


def text_of(message: dict) -> str:
    """Return all text of a message."""
    if isinstance(message["content"], str):
        return message["content"]
    return "".join(item["text"] for item in message["content"] if item["type"] == "text")


def media_of(messages: list[dict]) -> Iterator[tuple[int, dict]]:
    """Yield (message number, item) for every picture and clip, in order."""
    for i, message in enumerate(messages):
        if not isinstance(message["content"], str):
            yield from ((i, item) for item in message["content"] if item["type"] in MEDIA_TYPES)
