"""What a run lives on without: whoever reads what it prints; and what it shares with no other."""

import atexit
import fcntl
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from util.config import UserError, logger

# In the output folder while a run goes on, which touches it so often; where nobody does for so
# long, it was left behind.
CLAIM_FILE = ".claimed"
CLAIM_BEAT_SECONDS = 15
CLAIM_DEAD_SECONDS = 75  # network disks remember times for a minute
_claims = {}  # by folder: its file, and the folder as it was then


class _Outlet(io.FileIO):
    """A terminal, pipe or file that takes what it is given, also once it is gone."""

    def write(self, data) -> int:
        """Write all of `data`, or what can be."""
        rest = memoryview(data).cast("B")
        try:
            while rest:
                rest = rest[super().write(rest) or len(rest) :]  # None: it would have to wait
        except OSError:
            pass
        return len(data)


def outlive_the_terminal() -> None:
    """Let nothing that is printed end the run: a closed pipe or terminal, a full disk.

    Without a buffer, as Python will not have a signal handler print while one is being written.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            with suppress(OSError):
                stream.flush()
            outlet = _Outlet(stream.fileno(), "wb", closefd=False)
            options = {"errors": "backslashreplace", "write_through": True}
            setattr(sys, name, io.TextIOWrapper(outlet, stream.encoding, **options))


@contextmanager
def time_limit(seconds: float, problem: Callable[[], str]):
    """Raise UserError(problem()) where Python code takes longer; only in a main thread."""

    def end(number, frame):
        raise UserError(problem())

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def claim(output_dir: Path) -> None:
    """Hold `output_dir` until this process ends; raise UserError where another one does.

    By a lock that the system drops with the process: lockf's, as one of flock would live on in the
    loader's workers. On network disks without locks, or with locks that each machine keeps for
    itself, the file's time tells.
    """
    folder, host = output_dir.absolute(), socket.gethostname()
    path = folder / CLAIM_FILE
    while True:
        file = path.open("a+", encoding="utf-8")
        is_locked = is_held = False
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except (BlockingIOError, PermissionError):
            is_held = True
        except OSError:
            pass  # no locks on this disk
        file.seek(0)
        holder = file.read()
        if is_held or (holder and not (is_locked and f" {host} " in holder) and _beats(path)):
            raise UserError(
                f"--output_dir {output_dir}: belongs to a run that goes on{holder}: choose another "
                f"folder, or wait for its end. If there is no such process, delete {path}"
            )
        with suppress(FileNotFoundError):  # whoever held it may have deleted it just now
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    file.truncate(0)
    file.write(f", process {os.getpid()} on {host} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    # Open, so that no folder made later is given its number.
    _claims[folder] = file, os.fstat(os.open(folder, os.O_RDONLY))

    def beat():
        while True:
            time.sleep(CLAIM_BEAT_SECONDS)
            with suppress(OSError):
                os.utime(file.fileno())

    threading.Thread(target=beat, daemon=True).start()


def check_claim(output_dir: Path) -> None:
    """Raise OSError where `output_dir` is gone, or another folder than was claimed.

    A new and empty one is claimed in its place. What nobody has claimed is not looked at.
    """
    folder = output_dir.absolute()
    if folder not in _claims or os.path.samestat(_claims[folder][1], folder.stat()):
        return
    if any(folder.iterdir()):
        raise OSError(f"{output_dir} is another folder by now, and not this run's")
    try:
        claim(output_dir)
    except UserError as error:  # another run was faster
        raise OSError(str(error)) from None
    logger.warning(f"{output_dir}: the folder is gone, the run goes on in a new one of that name")


@atexit.register
def release() -> None:
    """Give back what this process has claimed, unless it is another one's by now.

    A folder in which nothing was written, as of a run whose data are wrong, goes too.
    """
    while _claims:
        folder, (file, _) = _claims.popitem()
        path = folder / CLAIM_FILE
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                path.unlink()
                folder.rmdir()  # fails where it holds anything


def _beats(path: Path) -> bool:
    """Return whether another machine touches a file; it is watched for that."""
    logger.warning(f"{path}: left behind, or of another machine? {CLAIM_DEAD_SECONDS} s will tell")
    before, deadline = path.stat().st_mtime_ns, time.monotonic() + CLAIM_DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1)
        with suppress(FileNotFoundError):
            # Not opened: closing it would drop the lock.
            if path.stat().st_mtime_ns != before:
                return True
    return False
