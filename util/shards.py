"""The shards of a checkpoint, written and read so that no file in them can run code.

torch.distributed.checkpoint (DCP) keeps its index of tensors as a pickle, which it loads without
restriction. Here the index is JSON; of the shards, torch.load reads what `weights_only` allows.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as types
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.futures import Future

# Bytes of a file of shards: so much of what is on a GPU is in main memory while it is written.
SHARD_FILE_BYTES = 2**30
INDEX_FILE = "index.json"
SHARD_NAME = re.compile(r"__\d+_\d+\.distcp")
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8)}


class ShardWriter(dcp.FileSystemWriter):
    """Writes one file after the other, each of about SHARD_FILE_BYTES, and the index as JSON.

    torch 2.14 keeps what it has copied from the GPU until a file is closed
    (https://github.com/pytorch/pytorch/issues/195982), so that one file of all would take as much
    main memory as the checkpoint has bytes. Can go when that is closed.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, per_thread_copy_ahead=0)

    def write_data(self, plan, planner) -> Future:
        """Count files: the writer of torch takes one for each thread."""
        tensors = [item.tensor_data for item in plan.items if item.tensor_data]
        sizes = [math.prod(t.chunk.sizes) * t.properties.dtype.itemsize for t in tensors]
        self.thread_count = 1 + sum(sizes) // SHARD_FILE_BYTES
        return super().write_data(plan, planner)

    def _write_data(self, planner, file_queue):
        self.thread_count = 1
        return super()._write_data(planner, file_queue)

    def finish(self, metadata: types.Metadata, results: list[list]) -> None:
        """Write the index: what tensors and other values there are, and where their bytes are."""
        values = {}
        for name, value in metadata.state_dict_metadata.items():
            values[name] = None
            if isinstance(value, types.TensorStorageMetadata):
                chunks = [[*map(list, (chunk.offsets, chunk.sizes))] for chunk in value.chunks]
                values[name] = [str(value.properties.dtype), list(value.size), chunks]
        places = [
            [item.index.fqn, item.index.offset and list(item.index.offset)]
            + [item.storage_data.relative_path, item.storage_data.offset, item.storage_data.length]
            for rank_results in results
            for item in rank_results
        ]
        text = json.dumps({"values": values, "places": places})
        (Path(self.path) / INDEX_FILE).write_text(text, encoding="utf-8")


def read_index(folder: Path) -> types.Metadata:
    """Return what ShardWriter wrote, as DCP wants it, made anew of numbers and checked names.

    Raises ValueError where the file holds anything else.
    """
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        values = {str(name): _value(entry) for name, entry in index["values"].items()}
        places = dict(_place(*entry) for entry in index["places"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{INDEX_FILE} is not an index of shards: {error!r}") from error
    return types.Metadata(values, planner_data={}, storage_data=places)


def _value(entry: list | None) -> types.TensorStorageMetadata | types.BytesStorageMetadata:
    if entry is None:
        return types.BytesStorageMetadata()
    dtype, size, chunks = entry
    chunks = [types.ChunkStorageMetadata(*map(_size, chunk)) for chunk in chunks]
    return types.TensorStorageMetadata(types.TensorProperties(DTYPES[dtype]), _size(size), chunks)


def _place(name: str, offset: list | None, file: str, begin: int, length: int) -> tuple:
    if not SHARD_NAME.fullmatch(file):
        raise ValueError(f"{file!r} is no file of shards")
    info = _StorageInfo(file, *_size([begin, length]))
    return types.MetadataIndex(str(name), None if offset is None else _size(offset)), info


def _size(numbers: list) -> torch.Size:
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ValueError(f"{numbers!r:.80} are no sizes")
    return torch.Size(numbers)


class ShardReader(dcp.FileSystemReader):
    """Reads what ShardWriter wrote."""

    def read_metadata(self, *args, **kwargs) -> types.Metadata:
        """Return the index; torch's own would load a pickle."""
        return read_index(Path(self.path))


class ShardPlanner(dcp.DefaultLoadPlanner):
    """Puts values where they belong."""

    def load_bytes(self, read_item, value) -> None:
        """Load a value that is no tensor; torch's own would load any pickle."""
        name = read_item.dest_index.fqn
        target, *path = self.original_state_dict, *self.mappings[name]
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = torch.load(value, weights_only=True)
