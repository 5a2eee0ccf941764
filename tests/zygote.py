"""Runs Python programs in processes that begin with PyTorch and transformers imported.

To import them takes 5 s of a core, which tests did some hundred times. So each process that runs
tests imports them first and then, before it does anything else, forks: begin(). The fork, which
computes nothing, listens, and forks again for each program: from its first line on that is what it
would be alone, with its own modules of this repo, session, arguments, folder, environment and
streams. But what libraries read from the environment while they are imported is what the tests
began with. Where the program is torchrun, its ranks are forked too.

Who asks is Python, below, or a launcher that is given forking() as its environment. For what has to
be imported with another environment, `python tests/zygote.py` prints the address where its own fork
listens, as long as its input is open.
"""

import atexit
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import uuid
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# Whose imports are wanted, and what they import late.
SCRIPTS = ("finetune", "finetune_distributed", "check_data", "compare", "test_on_official_model")
LATE = ("matplotlib.pyplot", "torch._dynamo", "torch.distributed.run")
LATE += ("transformers.models.qwen2_vl.modeling_qwen2_vl",)
# What libraries have read while they were imported, and is set again.
READ_BY_FORKS = {"HF_HUB_OFFLINE"}
# Programs whose ranks are forked.
LAUNCHERS = ("torch.distributed.run", "accelerate.commands.accelerate_cli")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h


class Python(subprocess.Popen):
    """A Python program that is forked.

    address: of the socket where the fork of this process listens.
    """

    address: str

    def _execute_child(self, args, *options):
        """Do what Popen's own does (private, as of Python 3.11), but have it forked."""
        cwd, environment, pipes = options[4], options[5], options[9:15]
        # -1 where it is this process's own.
        streams = [i if pipes[at] == -1 else pipes[at] for i, at in enumerate((0, 3, 5))]
        request = {"command": args[1:], "cwd": cwd and str(cwd), "environment": environment}
        with ask(self.address, request, streams) as asked:
            self.pid, self._child_created = int(asked.recv(64)), True
            asked.recv(64)  # it is a child of this process now
        self._close_pipe_fds(*pipes)


def ask(address: str, request: dict, streams: list[int]) -> socket.socket:
    """Send a request to where a fork listens, and return the socket for its answer."""
    asked = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asked.connect(address)
    socket.send_fds(asked, [json.dumps(request).encode()], streams)
    return asked


def forking(address: str | None = None) -> dict:
    """Return the environment of a launcher whose Python programs are to be forked.

    address: of another process that listens.
    """
    return {
        "PATH": f"{REPO / 'tests' / 'forking'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "VENV_DIR": "",  # or the launcher would put that one first
        "FORKING": address or Python.address[1:],
    }


def begin() -> None:
    """Import what scripts import, and fork this process for those of Python and forking()."""
    # Test processes share two cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    import_all()
    if not Path("/dev/nvidia0").exists():
        importlib.import_module("peft")  # and bitsandbytes, which looks at all GPUs
    listen_in_a_fork()


def import_all() -> None:
    """Import what the scripts import."""
    for name in (*SCRIPTS, *LATE):
        importlib.import_module(name)


def forget_repo() -> None:
    """Forget the modules of this repo, and where to find them."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("util", *SCRIPTS)]:
        del sys.modules[name]
    places = ("", str(REPO), str(REPO / "tests"))
    sys.path[:] = [path for path in sys.path if path not in places]


def listen_in_a_fork() -> None:
    """Fork this process, and have Python's programs forked by that fork."""
    Python.address = f"\0{uuid.uuid4()}"
    # Orphaned by the fork, a program becomes a child of this process.
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(Python.address)
    listener.listen()
    if os.fork() == 0:
        assert ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) == 0
        os.setsid()
        os.dup2(listener.fileno(), 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        listener.detach()
        faulthandler.disable()  # of pytest, into a file that is closed
        forget_repo()
        gc.freeze()  # what is only looked through is not to be copied
        try:
            become(**fork_when_asked(socket.socket(fileno=3)))
        finally:
            os._exit(1)  # what called this goes on in the other process alone
    listener.close()


def fork_when_asked(listener: socket.socket) -> dict:
    """Fork for each request; return, in the process that is to be the program, what it says.

    The answer is the program's number and, where that is asked for, how it has ended.
    """
    while True:
        asked, _ = listener.accept()
        credentials = asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("iII", credentials)[1] != os.getuid():  # anybody can connect
            asked.close()
            continue
        request, streams, *_ = socket.recv_fds(asked, 1 << 20, 3)
        request = json.loads(request)
        is_waited_for = request.pop("is_waited_for", False)
        if (between := os.fork()) == 0:
            if child := os.fork():
                asked.send(str(child).encode())
                if is_waited_for:
                    asked.send(str(os.waitpid(child, 0)[1]).encode())
                os._exit(0)
            return request | {"streams": streams}
        if not is_waited_for:
            os.waitpid(between, 0)
        asked.close()
        for descriptor in streams:
            os.close(descriptor)


def become(command: list[str], cwd: str, environment: dict, streams: list[int], ignored=()) -> None:
    """Run a program, given by what stands behind `python`, as the main one of this process.

    ignored: numbers of signals.
    """
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    os.chdir(cwd or ".")
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = "HF_HUB_OFFLINE" in environment
    # First of all, where the program is.
    sys.path[:0] = ["", *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    run(command)


def run(command: list[str]) -> None:
    """Run what stands behind `python` on a command line, and end the process as Python would.

    But nothing is taken apart at the end: that alone would copy all memory that is shared.
    """
    code = 1
    try:
        if command[0] == "-u":
            command = command[1:]
            sys.stdout.reconfigure(write_through=True)
        if command[0] == "-m" and command[1] in LAUNCHERS:
            from torch.distributed.elastic.multiprocessing import subprocess_handler

            listen_in_a_fork()
            subprocess_handler.subprocess_handler.Popen = Python  # which starts its ranks
        code = run_main(command)
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError:  # nobody reads what it printed
        code = 120
    finally:
        os._exit(code)


def run_main(command: list[str]) -> int:
    """Run a module or script as the main program, and return its exit code."""
    try:
        if command[0] == "-m":
            sys.path[0], sys.argv = os.getcwd(), command[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = str(Path(command[0]).resolve().parent), command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, str):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    sys.path[0] = str(REPO)
    import_all()
    listen_in_a_fork()
    print(Python.address[1:], flush=True)
    sys.stdin.read()  # until who has started this is gone
