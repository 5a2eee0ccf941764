"""Runs Python programs in processes that begin with PyTorch and transformers imported.

    python tests/zygote.py SOCKET, started by helpers.py and asked by Python, below
    tests/forking/torchrun ..., which launchers find before the other where FORKING is their PATH

To import them takes 5 s of a core, which tests did some hundred times. This process computes
nothing, and forks for each program: from its first line on that is what it would be alone, with its
own modules of this repo, session, arguments, folder, environment and streams. But what libraries
read from the environment while they are imported is what this process began with. Where the program
is torchrun, its ranks are forked too.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# Whose imports are wanted, and what they import late.
SCRIPTS = ("finetune", "finetune_distributed", "check_data", "compare", "test_on_official_model")
LATE = ("matplotlib.pyplot", "peft", "torch._dynamo", "torch.distributed.run")
LATE += ("transformers.models.qwen2_vl.modeling_qwen2_vl",)
LAUNCHER = ["-m", "torch.distributed.run"]
# Of a launcher that takes this environment, the ranks are forked.
FORKING = {
    "PATH": f"{REPO / 'tests' / 'forking'}:{os.environ['PATH']}",
    "VIRTUAL_ENV": sys.prefix,
    "VENV_DIR": "",  # or the launcher would put that one first
}


class Python(subprocess.Popen):
    """A Python program that is forked by a child of this process, which waits in fork_when_asked().

    zygote: the socket to that child.
    """

    zygote: socket.socket

    @classmethod
    def ask(cls, zygote: socket.socket) -> None:
        """Ask this one from now on, as the parent of what it orphans."""
        cls.zygote = zygote
        PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
        assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0

    def _execute_child(self, args, *options):
        """Do what Popen's own does (private, as of Python 3.11), but let the zygote fork."""
        cwd, environment, pipes = options[4], options[5], options[9:15]
        request = json.dumps([args[1:], cwd and str(cwd), environment]).encode()
        # -1 where it is this process's own.
        streams = [i if pipes[at] == -1 else pipes[at] for i, at in enumerate((0, 3, 5))]
        socket.send_fds(self.zygote, [request], streams)
        self.pid, self._child_created = int(self.zygote.recv(64)), True
        self._close_pipe_fds(*pipes)


def import_all() -> None:
    """Import what the scripts import, and forget the modules of this repo."""
    sys.path[0] = str(REPO)
    for name in (*SCRIPTS, *LATE):
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("util", *SCRIPTS)]:
        del sys.modules[name]
    gc.freeze()  # what is only looked through is not to be copied


def fork_when_asked(asked: socket.socket) -> list:
    """Fork for each program; return, in its process, what to run: command, folder, ..."""
    while True:
        request, streams, *_ = socket.recv_fds(asked, 1 << 20, 3)
        if not request:
            os._exit(0)
        read, write = os.pipe()
        if os.fork() == 0:
            # Orphaned by this process, the program becomes a child of who asked for it.
            if child := os.fork():
                os.write(write, str(child).encode())
                os._exit(0)
            asked.detach()  # become() closes all
            return [*json.loads(request), streams]
        os.wait()
        asked.send(os.read(read, 64))
        for descriptor in (read, write, *streams):
            os.close(descriptor)


def become(command: list[str], cwd: str, environment: dict, streams: list[int]) -> None:
    """Run a program, given by what stands behind `python`, as the main one of this process."""
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.setsid()
    os.chdir(cwd or ".")
    os.environ.clear()
    os.environ.update(environment)
    run(command)


def run(command: list[str]) -> None:
    """Run what stands behind `python` on a command line, and end the process as Python would.

    But nothing is taken apart at the end: that alone would copy all memory that is shared.
    """
    if command[0] == "-u":
        command = command[1:]
        sys.stdout.reconfigure(write_through=True)
    if command[:2] == LAUNCHER:
        fork_ranks()
    code = None
    try:
        if command[0] == "-m":
            sys.path[0], sys.argv = os.getcwd(), command[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = str(Path(command[0]).resolve().parent), command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def fork_ranks() -> None:
    """Have torchrun, which this process is to be, ask a fork of it for its ranks."""
    from torch.distributed.elastic.multiprocessing import subprocess_handler

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        os.setsid()
        become(*fork_when_asked(theirs))
    theirs.close()
    Python.ask(ours)
    subprocess_handler.subprocess_handler.Popen = Python


if __name__ == "__main__":
    import_all()
    if sys.argv[1] == "-m":
        run(sys.argv[1:])
    else:
        asked = socket.socket(fileno=int(sys.argv[1]))
        asked.send(b"ready")
        become(*fork_when_asked(asked))
