"""Start and end of a script: device, signals, errors, what only one rank does."""

import atexit
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from util.config import Config, UserError, logger, make_visible
from util.survive import release

# Of a run that a signal has stopped after a save: EX_TEMPFAIL of sysexits.h, "try again later".
EXIT_STOPPED = 75
SAME_SIGNAL_SECONDS = 5
# How long a failure that other ranks may share, or have caused, waits for theirs to be told first.
# The launcher ends all ranks of its machine as soon as one has failed.
SAME_FAILURE_SECONDS = 5
LOST_PEER_SECONDS = 15

# ---------------------------------------------------------------- what only one rank does


def world_size() -> int:
    """Return the number of ranks: of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Return whether this rank, the only one or the first, writes and speaks for all."""
    return rank() == 0


def shard_size(config: Config) -> int:
    """Return how many ranks share one copy of the model; left out: all ranks of one machine."""
    if not dist.is_initialized():
        return 1
    size = config.shard_size or min(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), world_size())
    if world_size() % size:
        raise UserError(f"--shard_size {size}: must divide the number of processes, {world_size()}")
    return size


def on_main_process(function, *args, **kwargs):
    """Return on every rank what `function` returns on the main one, where alone it runs.

    An OSError or UserError is raised on every rank too. On a single device, it is just called.
    """
    if not dist.is_initialized():
        return function(*args, **kwargs)
    result = [None]
    if is_main_process():
        try:
            result = [function(*args, **kwargs)]
        except (OSError, UserError) as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], (OSError, UserError)):
        raise result[0]
    return result[0]


# ---------------------------------------------------------------- start


def choose_device(name: str | None) -> torch.device:
    """Return the device to train on: `name`, else cuda, else cpu.

    Raises UserError where an NVIDIA device is there but torch cannot use it: a silent run on the
    CPU would be a toy run.
    """
    if name:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise UserError(f"--device {name}: must be cuda, cuda:1 (or another number), or cpu")
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {name}: {_why_no_cuda()}")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if Path("/dev/nvidia0").exists() and not hidden:
        raise UserError(f"this machine has an NVIDIA device, but {_why_no_cuda()}")
    return torch.device("cpu")


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} was built without CUDA: install the CUDA build "
            "(pip install -r requirements.txt), or use --device cpu"
        )
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable device: check "
        "that nvidia-smi works, that the driver is new enough for this CUDA, and that "
        f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r} names a device of "
        "this machine; or use --device cpu"
    )


# ---------------------------------------------------------------- signals


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGHUP, so that the loop can finish its step and save.

    `noted` changes at any time, and on one rank before others; once in a step `agree` makes it
    `name`, by which the loop acts. A second signal ends the process at once; but a terminal that
    is closed may send SIGHUP several times, and under nohup it goes unheard.
    """

    was_noted = False  # of this process

    def __init__(self):
        self.name = self.noted = None
        # To ranks, queues send one signal, and then their launcher sends it once more.
        self._once_more_until = SAME_SIGNAL_SECONDS if dist.is_initialized() else 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.noted is None:
            self.noted, StopSignal.was_noted = signal.Signals(number).name, True
            self._once_more_until += time.monotonic()
            logger.warning(f"{self.noted}: saving after this step; a second signal ends at once")
        elif number != signal.SIGHUP and time.monotonic() > self._once_more_until:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def agree(self) -> None:
        """Give all ranks the same `name`, so that they stop after the same step."""
        self.name = self.noted  # read once: it may change at any time
        if dist.is_initialized():
            # On the CPU: ranks wait for each other, and none for its device.
            is_stopping = torch.full((), float(self.name is not None))
            dist.all_reduce(is_stopping, dist.ReduceOp.MAX)
            if is_stopping.item():
                self.name = self.name or "a signal to another rank"

    def end_process(self, global_step: int, is_saved: bool, output_dir: str) -> None:
        """Say how to go on after `name` has stopped the run, and exit: only if saved with 75."""
        if not is_saved:
            logger.warning(f"{self.name}: stopped after step {global_step}, which is NOT saved")
            sys.exit(1)
        logger.warning(
            f"{self.name}: stopped after step {global_step}; go on with the same command and\n"
            f"  --output_dir {output_dir} --resume_from latest"
        )
        sys.exit(EXIT_STOPPED)


# ---------------------------------------------------------------- end


def explain_out_of_memory(error: Exception) -> UserError:
    """Return what to do about a torch.OutOfMemoryError."""
    return UserError(
        "the GPU's memory is full. In the order in which to try them: "
        "--gradient_checkpointing all; a lower --max_tokens (the longest sample must fit) or "
        "--max_pixels; --precision bf16_lean; --train llm; --lora_rank 64; with that, "
        "--precision bf16_4bit; more GPUs. What fits is "
        "told, without a GPU, by check_data.py with the flags of this run and --plan GIB. "
        f"PyTorch says: {' '.join(str(error).split())[:300]}"
    )


def _explain_full_memory(main) -> None:
    """Run main(); a full GPU is a UserError, raised, since the launcher tells what is handled."""
    try:
        main()
    except torch.OutOfMemoryError as error:
        raise explain_out_of_memory(error) from None


def run_main(main) -> None:
    """Run a script's main(); a UserError becomes one message and exit code 1."""
    transformers.logging.disable_progress_bar()
    # When this has returned, nothing holds what the frames of main() held: loaders have ended their
    # worker processes. One that is stuck takes no notice of that, and Python would wait for it.
    code = _exit_code(main)
    if isinstance(code, str):
        log_end(code)
    for stuck in multiprocessing.active_children():
        stuck.kill()
    if code:
        sys.exit(code)


def _exit_code(main) -> int | str | None:
    try:
        _explain_full_memory(main)
    except SystemExit as end:
        return end.code
    except UserError as error:
        return f"error: {make_visible(str(error))}"
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as with | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        log_end(traceback.format_exc())
        traceback.print_exc()
        return 1
    return None


def log_end(text: str) -> None:
    """Write into train.log, once there is one, what has stopped the run."""
    if logger.handlers:  # critical, since ranks but the first log nothing else
        logger.critical(text, extra={"is_printed": True})


def run_rank(main) -> None:
    """Run a script's main() as one rank of several, and end the process.

    Where it fails, the launcher ends the other ranks, and the last that it prints is what the
    first rank to fail has recorded here.
    """
    transformers.logging.disable_progress_bar()
    exit_code = 1
    try:
        _explain_full_memory(main)
        PartialState().destroy_process_group()
        exit_code = 0
    except SystemExit as end:
        exit_code = end.code or 0
        if exit_code == EXIT_STOPPED and "STOPPED_FILE" in os.environ:
            Path(os.environ["STOPPED_FILE"]).touch()  # the launcher's own exit code would be 1
    except KeyboardInterrupt:
        pass
    except Exception as error:
        _wait_for_the_first_to_fail(error)
        record_failure(error)
    if exit_code in (0, EXIT_STOPPED):
        atexit._run_exitfuncs()  # wandb and trackio send the last of their data here
    end_rank(exit_code)


def record_failure(error: Exception) -> None:
    """Write into train.log, and where the launcher looks for it, what ends this rank."""
    is_explained = isinstance(error, UserError)
    log_end(f"error: {error}" if is_explained else "".join(traceback.format_exception(error)))
    if is_explained:
        # The message alone, without how the program came there.
        error.args = (make_visible(str(error)),)
        error.__cause__, error.__suppress_context__ = None, True
        error.__traceback__ = None
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
    else:
        sys.excepthook(type(error), error, error.__traceback__)


def end_rank(exit_code: int) -> None:
    """End this process, from any of its threads."""
    release()
    for loader_worker in multiprocessing.active_children():
        loader_worker.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it may be gone, before there was a run
            stream.flush()
    # sys.exit would wait for what a failed rank has still to do with others; and with torch 2.14.1
    # the threads of gloo abort some interpreters as they close ("terminate called without an
    # active exception"), after all has gone well.
    os._exit(exit_code)


def _wait_for_the_first_to_fail(error: Exception) -> None:
    """Return after the rank that has more to say about this failure had time to say it."""
    was_noted = StopSignal.was_noted
    # From here on the launcher's signal ends this rank at once; there is no step to finish.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A connection that breaks is the trace of another rank's end. gloo raises plain RuntimeErrors.
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    ):
        if was_noted:
            os._exit(1)  # the launcher is ending this rank: another one has failed
        time.sleep(LOST_PEER_SECONDS)
    elif int(os.environ.get("LOCAL_RANK", 0)) > 0:
        # A wrong flag is wrong on every rank.
        time.sleep(SAME_FAILURE_SECONDS)
