"""The index: what is known of every sample before the first step."""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.config import UserError, logger
from util.data.files import Records
from util.data.sample import SampleEncoder
from util.data.workers import run_all

REPO_DIR = Path(__file__).resolve().parents[2]
CACHE_DIR = REPO_DIR / ".cache"


@dataclass
class Index:
    """What is known of every sample before the first step: int64 arrays, one entry a sample."""

    num_tokens: np.ndarray
    num_supervised_tokens: np.ndarray
    num_image_tokens: np.ndarray
    num_video_tokens: np.ndarray
    num_patch_pairs: np.ndarray  # of patches that attend to each other in the vision tower
    remarks: np.ndarray  # what is odd about the media, a Remark

    def __len__(self):
        return len(self.num_tokens)

    def summary(self) -> str:
        """Return one line on how much data this is."""
        lengths = self.num_tokens[self.num_tokens > 0]
        return (
            f"{len(lengths):,} samples of {lengths.min():,} to {lengths.max():,} "
            f"tokens, {self.num_tokens.sum():,} in all: {self.num_image_tokens.sum():,} of images, "
            f"{self.num_video_tokens.sum():,} of videos, {self.num_supervised_tokens.sum():,} "
            "supervised"
        )


def build_index(records: Records, encoder: SampleEncoder) -> tuple[Index, list[str]]:
    """Measure every sample, in parallel, and return the index and a list of problems.

    The index is kept on disk, under a key of everything that it depends on except the media files
    themselves: a sample whose media have changed since is refused when it is read. Samples with
    a problem are measured again every time. Their entries are 0.
    """
    cache_file = CACHE_DIR / f"index-{_index_key(records, encoder)}.npy"
    rows = _load_rows(cache_file, len(records))
    problems = []
    missing = np.flatnonzero(rows[:, 0] == 0)
    for i, row in run_all(_measure, "index", missing, records, encoder):
        if isinstance(row, str):
            problems.append(f"{records.where(i)}: {row}")
        else:
            rows[i] = row
    if len(missing) > len(problems):
        partial = cache_file.with_suffix(f".{os.getpid()}.npy")
        try:
            CACHE_DIR.mkdir(exist_ok=True)
            partial.write_bytes(hashlib.sha256(rows.tobytes()).digest() + rows.tobytes())
            os.replace(partial, cache_file)
        except OSError as error:
            logger.warning(f"the index is not kept, and will be measured again: {error}")
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    return Index(*rows.T), problems


def _load_rows(cache_file: Path, num_samples: int) -> np.ndarray:
    """Return what is known of the samples, a row of 6 each: zeros, where nothing is."""
    if cache_file.is_file():
        content = cache_file.read_bytes()
        checksum, values = content[:32], content[32:]
        if hashlib.sha256(values).digest() == checksum and len(values) == num_samples * 6 * 8:
            return np.frombuffer(values, np.int64).reshape(-1, 6).copy()
        logger.warning(f"{cache_file} is damaged: the samples are measured again")
    return np.zeros((num_samples, 6), dtype=np.int64)


def decode_all(records: Records, index: Index, max_tokens: int, encoder) -> list[str]:
    """Decode every sample that fits, in parallel, and return a list of problems.

    What is longer is never trained on, and could take all memory there is.
    """
    capacity = max_tokens - encoder.num_dummy_tokens
    numbers = np.flatnonzero((index.num_tokens > 0) & (index.num_tokens <= capacity))
    results = run_all(_decode, "decode", numbers, records, encoder)
    return [f"{records.where(i)}: {problem}" for i, problem in results if problem]


def _measure(encoder: SampleEncoder, records: Records, i: int) -> tuple | str:
    try:
        return encoder.measure(records[i], records.folder(i))
    except ValueError as error:
        return str(error)


def _decode(encoder: SampleEncoder, records: Records, i: int) -> str | None:
    try:
        encoder.encode(records[i], records.folder(i))
    except ValueError as error:
        return str(error)
    return None


def _index_key(records: Records, encoder: SampleEncoder) -> str:
    key = hashlib.sha256(records.digest().encode())
    util = REPO_DIR / "util"
    others = [util / "vision_util.py", util / "model" / "families.py"]
    for path in sorted([*util.glob("data/*.py"), *util.glob("media/*.py"), *others]):
        key.update(path.read_bytes())
    key.update(encoder.digest().encode())
    folders = [os.path.abspath(file.path) for file in records.files]
    key.update(repr((folders, os.getcwd())).encode())
    return key.hexdigest()[:20]


def check_lengths(records: Records, index: Index, max_tokens: int, encoder) -> list[str]:
    """Return a problem for every sample that does not fit into one forward pass."""
    capacity = max_tokens - encoder.num_dummy_tokens
    return [
        f"{records.where(i)}: has {index.num_tokens[i]} tokens ({index.num_image_tokens[i]} of "
        f"images, {index.num_video_tokens[i]} of videos), and with the dummy segment of "
        f"{encoder.num_dummy_tokens} that is more than --max_tokens {max_tokens}: raise it, lower "
        "--max_pixels, --video_fps, --video_max_frames or --video_max_pixels, or shorten the sample"
        for i in np.flatnonzero(index.num_tokens > capacity).tolist()
    ]


def raise_problems(problems: list[str], most: int = 10) -> None:
    """Raise UserError with the first problems, where there are any."""
    if problems:
        more = f"\n... and {len(problems) - most} more" if len(problems) > most else ""
        raise UserError("\n".join(problems[:most]) + more)
