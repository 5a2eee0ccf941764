"""Runs Python programs in processes that begin with PyTorch and transformers imported.

    python tests/zygote.py SOCKET, started and asked by helpers.Python

To import them takes 5 s of a core, which tests did some hundred times. This process computes
nothing, and forks for each program: from its first line on that is what it would be alone, with its
own modules of this repo, session, arguments, folder, environment and streams. But what libraries
read from the environment while they are imported is what this process began with.
"""

import gc
import importlib
import json
import os
import runpy
import socket
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# Whose imports are wanted, and what they import late.
SCRIPTS = ("finetune", "finetune_distributed", "check_data", "compare", "test_on_official_model")
LATE = ("matplotlib.pyplot", "peft", "torch._dynamo", "torch.distributed.run")
LATE += ("transformers.models.qwen2_vl.modeling_qwen2_vl",)


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
            sys.exit()
        read, write = os.pipe()
        if os.fork() == 0:
            # Orphaned by this process, the program becomes a child of who asked for it.
            if child := os.fork():
                os.write(write, str(child).encode())
                os._exit(0)
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
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if command[0] == "-m":
        sys.path[0], sys.argv = cwd, command[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(command[0]).resolve().parent), command
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    import_all()
    asked = socket.socket(fileno=int(sys.argv[1]))
    asked.send(b"ready")
    job = fork_when_asked(asked)
    asked.detach()
    become(*job)
