"""The folder of a run: made, or that of the run to resume; its own, and seen by all ranks."""

import os
import socket
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from tqdm import tqdm

from util.config import TINY_NOTICE, Config, UserError, fill_defaults
from util.run import is_main_process, on_main_process
from util.survive import CLAIM_FILE, claim, outlive_the_terminal

SHARED_FOLDER_SECONDS = 10


def open_output_dir(config: Config, device: torch.device, checkpoint: Path | None) -> Config:
    """Return the flags, the same on all ranks, with what was left out filled in.

    The output folder is made: new or empty, or that of the run to resume. Raises UserError where
    it is neither, cannot be written, or is not seen by all ranks.
    """
    outlive_the_terminal()
    if config.model_name_or_path is None and device.type == "cpu" and is_main_process():
        tqdm.write(TINY_NOTICE)
    is_named = bool(config.output_dir or checkpoint)
    config = fill_defaults(config, device.type, checkpoint and checkpoint.parent)
    # All ranks write into the main one's folder: their clocks need not agree.
    config = on_main_process(_make_output_dir, config, checkpoint, is_named)
    if dist.is_initialized():
        _check_shared(Path(config.output_dir))
    return config


def _make_output_dir(config: Config, checkpoint: Path | None, is_named: bool) -> Config:
    output_dir, number = Path(config.output_dir), 1
    if checkpoint and output_dir.resolve() != checkpoint.resolve().parent:
        raise UserError(
            f"--output_dir {output_dir}: a resumed run goes on in its own folder, "
            f"{checkpoint.parent}"
        )
    if is_named and not checkpoint and not (output_dir / CLAIM_FILE).exists():
        _refuse_used(output_dir)  # and nothing is touched
    try:
        while not is_named and output_dir.exists():  # another run has started in this second
            number += 1
            output_dir = Path(f"{config.output_dir}-{number}")
        output_dir.mkdir(parents=True, exist_ok=is_named)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
        claim(output_dir)
    except FileExistsError:
        if is_named:
            raise UserError(f"--output_dir {output_dir}: is not a folder") from None
        return _make_output_dir(config, checkpoint, is_named)  # one has started just now
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written: {error}") from error
    if not checkpoint:
        _refuse_used(output_dir)
    return replace(config, output_dir=str(output_dir))


def _refuse_used(output_dir: Path) -> None:
    if not output_dir.exists():
        return
    if not output_dir.is_dir() or {path.name for path in output_dir.iterdir()} - {CLAIM_FILE}:
        is_run = output_dir.is_dir() and any(output_dir.glob("checkpoint-*"))
        hint = "--resume_from latest goes on with it, or " if is_run else ""
        raise UserError(
            f"--output_dir {output_dir}: exists and is not an empty folder: {hint}choose another "
            "one, or delete it"
        )


def _check_shared(output_dir: Path) -> None:
    """Raise UserError where ranks do not all see what the main one writes into `output_dir`.

    Every rank writes its shards of checkpoints there.
    """
    token = output_dir / f".shared-{on_main_process(uuid.uuid4).hex}"
    if is_main_process():
        token.touch()
    dist.barrier()
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not (is_seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
        with suppress(OSError):  # network file systems may remember that it was not there
            os.listdir(output_dir.parent)
    blind = [] if is_seen else [socket.gethostname()]
    blind = gather_object(blind)
    if is_main_process():
        token.unlink()
    if blind:
        raise UserError(
            f"--output_dir {output_dir}: must be on a disk that all machines share, as each writes "
            f"its part of the checkpoints there; not seen by {', '.join(sorted(set(blind)))}"
        )
