"""Checkpoints: whole or not at all, checked when they are read, and resumed exactly.

`output_dir`/checkpoint-<step>/ is a model folder as the end of a run leaves it, and in resume/:
the fp32 weights and AdamW's state (torch.distributed.checkpoint: one layout for any number of
ranks), and state.json: position, flags, random states, versions, and a checksum of every file.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule

from util.config import Config, UserError, logger
from util.data.batch import PlannedData
from util.logutil import setup_logging, tell_the_end, versions
from util.model.load import export_model
from util.optim import moment_bytes
from util.output_dir import open_output_dir
from util.run import is_main_process, on_main_process
from util.shards import ShardPlanner, ShardReader, ShardWriter, read_index
from util.survive import check_claim, release

# That a single process is a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# Flags that a resumed run may change; all others set the mathematics.
MACHINE_SETTINGS = {
    *("output_dir", "num_epochs", "max_steps", "max_tokens", "num_workers", "device"),
    *("save_steps", "keep_checkpoints", "resume_from", "skip_bad_steps", "eval_steps", "eval_data"),
    *("shard_size", "report_to", "gradient_checkpointing", "eval_generate", "metric"),
    *("early_stopping", "compile"),
    "on_bad_sample",  # the data's digest tells which samples are left out
}
# Only what is trained; the rest is in the model that the run began with.
OPTIONS = states.StateDictOptions(
    flatten_optimizer_state_dict=True, ignore_frozen_params=True, strict=False
)
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
RESUME_DIR = "resume"
STATE_FILE = Path(RESUME_DIR) / "state.json"
# Cut back on resume, so that every step is in them once.
REWOUND_FILES = ("metrics.jsonl", "train.log")
# What state.json holds; of a checkpoint from elsewhere, nothing is believed before it is checked.
STATE_TYPES = {"global_step": int, "config": dict, "data_digest": str, "random_states": dict} | {
    "eval_loss": (int, float, type(None)),
    "versions": dict,
    "sizes": dict,
    "files": dict,
}


# ---------------------------------------------------------------- save


def save_checkpoint(
    global_step: int, model, optimizer, processor, config: Config, data: PlannedData, eval_loss
) -> bool:
    """Write checkpoint-<global_step> of a run and say whether it is there; old ones are deleted.

    Before the first step there is nothing to save. `eval_loss`: of these weights, or None; one that
    is there without gets it. Called by all ranks. Where it fails (a full disk, a vanished folder),
    that is logged, nothing is left of it, and earlier ones are untouched.
    """
    output_dir = Path(config.output_dir)
    final = output_dir / f"checkpoint-{global_step}"
    partial = output_dir / f".checkpoint-{global_step}.partial"
    if global_step == 0:
        return False
    state = {
        "global_step": global_step,
        "config": dataclasses.asdict(config),
        "data_digest": data.digest,
        "eval_loss": eval_loss,
    }
    try:
        if on_main_process(_is_there, final, eval_loss):
            return True
        on_main_process(_start_writing, partial, model, config)
        tensors = _state_dict(model, optimizer, has_moments=bool(optimizer.state))
        writer = ShardWriter(partial / RESUME_DIR)
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
        _export(model, processor, partial)
        on_main_process(config.save, partial / "config_used.json")
        on_main_process(_finish_writing, partial, final, state)
    except (OSError, CheckpointException) as error:
        if isinstance(error, CheckpointException):  # its own text is tracebacks
            error = next(iter(error.failures.values()))[0]
        logger.error(
            f"{final} could not be written (earlier ones are untouched): "
            f"{' '.join(str(error).split())[:300]}"
        )
        on_main_process(_discard, partial)
        return False
    logger.info(f"saved      {final}")
    try:
        on_main_process(_prune, output_dir, config)
    except OSError as error:
        logger.warning(f"{output_dir}: old checkpoints could not be deleted: {error}")
    return True


def finish_run(model, processor, config: Config, started: float, lost=()) -> None:
    """Write the model folder and the plot at the end of a run, and say what one does next.

    With --early_stopping, the model is that of the best checkpoint. `started`: in seconds of
    time.perf_counter. Raises UserError where the model cannot be written, or, as train() has found,
    something else is `lost`.
    """
    output_dir, best = Path(config.output_dir), None
    if config.early_stopping:
        best, lowest = on_main_process(_best_checkpoint, output_dir, config)
    try:
        on_main_process(check_claim, output_dir)
        if best:
            ignored = shutil.ignore_patterns(RESUME_DIR, "config_used.json")
            on_main_process(shutil.copytree, best, output_dir, ignore=ignored, dirs_exist_ok=True)
            logger.info(f"best       {best}, held-out loss {lowest:.4f}: {output_dir} holds it")
        else:
            _export(model, processor, output_dir)
    except OSError as error:
        raise UserError(
            f"{output_dir}: the model could not be written: {' '.join(str(error).split())}. The "
            "newest checkpoint in that folder is a model folder too"
            + "".join(f". Lost as well: {what}" for what in lost)
        ) from error
    on_main_process(tell_the_end, output_dir)
    if lost:
        raise UserError(
            f"{output_dir}: the model is there, but the disk has refused {' and '.join(lost)}: lost"
        )
    release()  # nothing is written any more
    logger.info(
        f"done       in {time.perf_counter() - started:.0f} s. Compare: "
        f"python test_on_trained_model_by_us.py --model_dir {output_dir}"
    )


def _export(model, processor, folder: Path) -> None:
    """Write the model folder; where the main process cannot, all ranks raise its OSError."""
    _reshard(model)
    failure = None
    try:
        export_model(model, processor, folder)
    except OSError as error:
        failure = error

    def tell():
        if failure:
            raise failure

    on_main_process(tell)


def _reshard(model) -> None:
    """Let go of the root's weights that an evaluation, without a backward pass, left gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _state_dict(model, optimizer, has_moments: bool) -> dict:
    """Return weights and optimizer state under names that do not depend on the ranks.

    The state of an optimizer that has none is left out, be it plain SGD or AdamW all of whose steps
    were skipped: torch would make it up, by a step of its own.
    """
    _reshard(model)
    tensors = {"model": states.get_model_state_dict(model, options=OPTIONS)}
    if has_moments:
        tensors["optimizer"] = states.get_optimizer_state_dict(model, optimizer, options=OPTIONS)
    return tensors


def _is_there(final: Path, eval_loss: float | None) -> bool:
    """Return whether a checkpoint is written, and note the held-out loss where it lacks one.

    Raises OSError where the run has lost its folder.
    """
    check_claim(final.parent)
    if final.exists() and eval_loss is not None:
        with suppress(ValueError):  # damaged: resuming will say so
            state = _read_state(final)
            if state["eval_loss"] is None:
                _write_state(final, state | {"eval_loss": eval_loss})
    return final.exists()


def _discard(partial: Path) -> None:
    with suppress(OSError):
        check_claim(partial.parent)  # another run may be writing there now
        shutil.rmtree(partial, ignore_errors=True)


def _start_writing(partial: Path, model, config: Config) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    needed = sum(p.numel() * p.itemsize + moment_bytes(p, config) for p in trained)
    if not config.lora_rank:  # of an adapter, the model folder is small
        needed += 2 * sum(p.numel() for p in model.parameters())  # in bf16
    free = shutil.disk_usage(partial.parent).free
    if free < needed:
        message = f"it needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
        raise OSError(errno.ENOSPC, message, str(partial.parent))
    partial.mkdir()


def _finish_writing(partial: Path, final: Path, state: dict) -> None:
    files = (final.parent / name for name in REWOUND_FILES)
    sizes = {file.name: file.stat().st_size for file in files if file.is_file()}
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    places = read_index(partial / RESUME_DIR).storage_data.values()
    if missing := {partial / RESUME_DIR / place.relative_path for place in places} - set(paths):
        raise OSError(f"{min(missing)}, which another rank has written, is not there")
    checksums = _checksums(paths)
    written = {
        str(path.relative_to(partial)): [path.stat().st_size, checksum]
        for path, checksum in zip(paths, checksums)
    }
    state = {**state, "random_states": _random_states(), "versions": versions()}
    state |= {"sizes": sizes, "files": written}
    _write_state(partial, state)
    for path in (*paths, partial / RESUME_DIR, partial):
        _flush(path)
    os.rename(partial, final)
    _flush(final.parent)


def _write_state(folder: Path, state: dict) -> None:
    """Write state.json whole or not at all."""
    text = json.dumps({"state": state, "sha256": _digest(state)}, indent=1)
    new = folder / f".{STATE_FILE.name}"
    new.write_text(text, encoding="utf-8")
    _flush(new)
    os.replace(new, folder / STATE_FILE)


def _flush(path: Path) -> None:
    """Make the system write a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksums(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter lock
        return list(pool.map(_checksum, paths))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _prune(output_dir: Path, config: Config) -> None:
    """Keep the newest --keep_checkpoints, and the best by the loss on --eval_data."""
    best, _ = _best_checkpoint(output_dir, config)
    for path in list_checkpoints(output_dir)[config.keep_checkpoints :]:
        if path != best:
            _remove(path)


def _best_checkpoint(output_dir: Path, config: Config) -> tuple[Path | None, float]:
    """Return the first checkpoint with the lowest loss on --eval_data, and that loss."""
    losses = {}
    for path in reversed(list_checkpoints(output_dir)):
        try:
            state = _read_state(path)
        except (OSError, ValueError):
            continue  # damaged: resuming will say so
        loss = math.nan if state["eval_loss"] is None else state["eval_loss"]
        if math.isfinite(loss) and state["config"]["eval_data"] == config.eval_data:
            losses[path] = loss
    best = min(losses, key=losses.get, default=None)
    return best, losses.get(best, math.inf)


def compare_with_best(
    global_step: int, eval_loss: float | None, config: Config
) -> tuple[bool, bool]:
    """Return whether these weights are the best so far, and whether --early_stopping ends the run.

    Called by all ranks. The best stand in a checkpoint, so a resumed run goes by them too.
    """
    if not config.early_stopping or eval_loss is None:
        return False, False
    best, lowest = on_main_process(_best_checkpoint, Path(config.output_dir), config)
    if eval_loss < lowest:
        return True, False
    best_step = int(CHECKPOINT_NAME.fullmatch(best.name)[1]) if best else 0
    num_worse = global_step // config.eval_steps - best_step // config.eval_steps
    is_over = num_worse >= config.early_stopping
    if is_over:
        logger.info(f"stopped    early: the held-out loss has not fallen since step {best_step:,}")
    return False, is_over


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that no half of it ever looks like one."""
    doomed = folder.with_name(f".{folder.name}.removed")
    try:
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning(f"{folder} could not be deleted: {error}")


# ---------------------------------------------------------------- resume


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    found = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := CHECKPOINT_NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def find_checkpoint(config: Config) -> Path | None:
    """Return the undamaged checkpoint that --resume_from names, None without the flag.

    Raises UserError where there is none. A damaged one is named, and "latest" goes on to the one
    before.
    """
    if not config.resume_from:
        return None
    if config.resume_from != "latest":
        folder = Path(config.resume_from)
        if not CHECKPOINT_NAME.fullmatch(folder.resolve().name):
            raise UserError(f"--resume_from {folder}: must be latest or a folder checkpoint-STEP")
        if problem := damage(folder):
            raise UserError(f"--resume_from {folder}: {problem}")
        return folder
    output_dir = config.output_dir
    if not output_dir:
        found = Path("train_output").glob(f"*/checkpoint-*/{STATE_FILE}")
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            raise UserError("--resume_from latest: no run under train_output has a checkpoint")
        output_dir = newest.parents[2]
    for folder in list_checkpoints(Path(output_dir)):
        if not (problem := damage(folder)):
            return folder
        logger.warning(f"{folder} is damaged ({problem}): going back to the one before")
    raise UserError(
        f"--resume_from latest: {output_dir} holds no usable checkpoint: start anew, with another "
        "--output_dir"
    )


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None."""
    try:
        files = _read_state(folder)["files"]
        for path in folder.rglob("*"):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                return f"{path.relative_to(folder)} is a link, or no regular file"
        resume = {path.relative_to(folder) for path in (folder / RESUME_DIR).iterdir()}
        if strays := resume - {STATE_FILE, *map(Path, files)}:
            return f"{min(strays)} was not written with it"
        for name, (size, _) in files.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes, not {size}"
        checksums = _checksums([folder / name for name in files])
        for (name, (_, expected)), checksum in zip(files.items(), checksums):
            if checksum != expected:
                return f"{name} does not have the checksum that it was written with"
        read_index(folder / RESUME_DIR)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _read_state(folder: Path) -> dict:
    """Return what state.json holds. Raises ValueError where that is not what was written."""
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        state = content["state"]
        is_whole = content["sha256"] == _digest(state)
        for name, kind in STATE_TYPES.items():
            if not isinstance(state[name], kind):
                raise ValueError(f"{name} is {state[name]!r:.80}")
        for name, (size, checksum) in state["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r:.80} is outside of the checkpoint")
            if not (isinstance(size, int) and isinstance(checksum, str)):
                raise ValueError(f"{name!r:.80} has size {size!r:.80}")
        for name, size in state["sizes"].items():
            if name not in REWOUND_FILES or not isinstance(size, int) or size < 0:
                raise ValueError(f"{name!r:.80} is not to be cut to {size!r:.80} bytes")
        if len(bytes.fromhex(state["random_states"]["cpu"])) != len(torch.get_rng_state()):
            raise ValueError("the random state is of another length")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{STATE_FILE} cannot be read: {error!r:.200}") from error
    if not is_whole:
        raise ValueError(f"{STATE_FILE} does not have the checksum that it was written with")
    return state


def open_run(config: Config, device: torch.device) -> tuple[Config, Path | None]:
    """Return the flags, what was left out filled in, and the checkpoint to go on from, or None.

    The output folder is made. The same on all ranks.
    """
    checkpoint = on_main_process(find_checkpoint, config)
    return open_output_dir(config, device, checkpoint), checkpoint


def begin_or_resume(
    config: Config, checkpoint: Path | None, data: PlannedData, num_steps: int
) -> None:
    """Check that a checkpoint is of this run, and cut log and metrics back to it; begin the log."""
    if checkpoint:
        check_same_run(checkpoint, config, data.digest, num_steps)
        on_main_process(rewind_files, checkpoint)
    setup_logging(Path(config.output_dir))
    if is_main_process():
        config.save(Path(config.output_dir) / "config_used.json")
    if checkpoint:
        logger.info(f"resumed    from {checkpoint}")


def check_same_run(folder: Path, config: Config, data_digest: str, num_steps: int) -> None:
    """Raise UserError naming every hyper-parameter, and the data, that differ from a checkpoint.

    Also where it is beyond the `num_steps` of this run.
    """
    state = _read_state(folder)
    present = dataclasses.asdict(config)
    differences = [
        f"  --{name}: was {state['config'].get(name)}, is {value}"
        for name, value in present.items()
        if name not in MACHINE_SETTINGS and state["config"].get(name) != value
    ]
    if state["data_digest"] != data_digest:
        differences.append(
            "  --train_data: the data have changed: files, media, or which samples are left out"
        )
    if differences:
        raise UserError(
            f"{folder} belongs to another run:\n" + "\n".join(differences) + "\nGive the flags "
            "that it was started with, or start a new run from its weights: "
            f"--model_name_or_path {folder}"
        )
    if state["global_step"] > num_steps:
        raise UserError(
            f"{folder}: has done more than the {num_steps} steps that --num_epochs and --max_steps "
            "make: raise them"
        )
    for name in ("num_epochs", "max_steps"):
        before, now = state["config"][name], getattr(config, name)
        if before != now:
            logger.warning(
                f"--{name}: was {before}, is {now}: the learning rate follows the new number of "
                "steps from here on"
            )


def rewind_files(folder: Path) -> None:
    """Cut log and metrics back to where they were when a checkpoint was written.

    Later checkpoints, damaged or given up, get another name: they are not of this run any more.
    What an interrupted save or removal has left is deleted.
    """
    for leftover in folder.parent.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for later in list_checkpoints(folder.parent):
        if later.resolve() == folder.resolve():
            break
        abandoned = later.with_name(f"abandoned-{later.name}")
        number = 1
        while abandoned.exists():  # that of another attempt
            number += 1
            abandoned = later.with_name(f"abandoned-{later.name}-{number}")
        os.rename(later, abandoned)
        logger.warning(f"{later} is not of the run that goes on: it is {abandoned.name} now")
    for name, size in _read_state(folder)["sizes"].items():
        path = folder.parent / name
        if path.is_file() and path.stat().st_size > size:
            os.truncate(path, size)


def load_checkpoint(folder: Path, model, optimizer) -> tuple[int, float | None]:
    """Put a checkpoint into `model` and `optimizer`; return the steps done and the held-out loss.

    The loss is None where it was not measured. Called by all ranks, of which there may be another
    number than when it was written.
    """
    names = read_index(folder / RESUME_DIR).state_dict_metadata
    tensors = _state_dict(model, optimizer, any(name.startswith("optimizer.") for name in names))
    reader, planner = ShardReader(folder / RESUME_DIR), ShardPlanner()
    no_dist = not dist.is_initialized()
    try:
        dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=no_dist)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder}: cannot be loaded: {reason!r:.300}") from None
    states.set_model_state_dict(model, tensors["model"], options=OPTIONS)
    if "optimizer" in tensors:
        states.set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=OPTIONS)
    state = _read_state(folder)
    _restore_random_states(state["random_states"])
    return state["global_step"], state["eval_loss"]


def _random_states() -> dict[str, str]:
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    return {device: bytes(state.tolist()).hex() for device, state in random_states.items()}


def _restore_random_states(random_states: dict[str, str]) -> None:
    for device, text in random_states.items():
        state = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif device == "cuda" and torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
