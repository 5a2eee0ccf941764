"""Terminals, pipes, disks and other runs that get in the way of a run cost it nothing."""

import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from helpers import (
    CPU,
    HANG_SECONDS,
    REPO,
    read_metrics,
    start,
    tiny_config,
    undamaged_steps,
    wait_for,
)
from util import survive
from util.config import UserError, parse_config
from util.output_dir import open_output_dir
from util.run import EXIT_STOPPED
from zygote import forking

FLAGS = ("--device", "cpu", "--num_workers", "1")
SCRIPT = (sys.executable, "finetune.py", *FLAGS)


@pytest.fixture
def begin(small_folder):
    """Return a function that starts a run in a session of its own and waits for two steps."""

    def begin(*command, output_dir, max_steps=500, **streams):
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | streams
        command += ("--model_name_or_path", small_folder, "--max_steps", max_steps)
        environment = {} if command[0] == sys.executable else forking()
        process = start(*command, "--output_dir", output_dir, streams=streams, **environment)
        metrics = output_dir / "metrics.jsonl"
        wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 1, process)
        return process

    return begin


def check_saved(process, output_dir):
    """The run has ended with 75, and all its steps are in a checkpoint and in the log."""
    assert process.wait(timeout=HANG_SECONDS) == EXIT_STOPPED
    (last,) = undamaged_steps(output_dir)
    assert [row["global_step"] for row in read_metrics(output_dir)] == list(range(1, last + 1))
    assert f"stopped after step {last}" in (output_dir / "train.log").read_text()


@pytest.mark.parametrize("command", [SCRIPT, ("./finetune_distributed.sh", *FLAGS)])
def test_a_closed_terminal_saves_as_sigterm_does(command, tmp_path, begin):
    """It may send its signal more than once."""
    process = begin(*command, output_dir=tmp_path / "out")
    for _ in range(2):
        os.killpg(process.pid, signal.SIGHUP)
    check_saved(process, tmp_path / "out")


def test_under_nohup_a_run_goes_on(tmp_path, begin):
    process = begin("nohup", "python", *SCRIPT[1:], output_dir=tmp_path / "out", max_steps=8)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=HANG_SECONDS) == 0
    assert undamaged_steps(tmp_path / "out") == [8]


@pytest.mark.parametrize("command", [SCRIPT, ("./finetune_distributed.sh", *FLAGS)])
def test_ctrl_c_saves_also_where_tee_is_gone_first(command, tmp_path, begin):
    read, write = os.pipe()
    process = begin(*command, output_dir=tmp_path / "out", stdout=write, stderr=write)
    os.close(write)
    os.close(read)
    os.killpg(process.pid, signal.SIGINT)
    check_saved(process, tmp_path / "out")


def test_a_run_goes_on_without_its_terminal(tmp_path, begin):
    terminal, end = pty.openpty()
    streams = {"stdin": end, "stdout": end, "stderr": end}
    process = begin(*SCRIPT, output_dir=tmp_path / "out", max_steps=8, **streams)
    os.close(end)
    os.close(terminal)
    assert process.wait(timeout=HANG_SECONDS) == 0
    assert len(read_metrics(tmp_path / "out")) == 8
    assert "done" in (tmp_path / "out" / "train.log").read_text()


def test_no_way_of_printing_fails_where_nobody_reads():
    """All of them in a second: the training scripts begin with outlive_the_terminal()."""
    program = (
        "import logging, sys, traceback, warnings\n"
        "from tqdm import tqdm\nfrom util.survive import outlive_the_terminal\n"
        "outlive_the_terminal()\n"
        "for i in tqdm(range(9), mininterval=0):\n"
        "    print(i, flush=True)\n    tqdm.write('x')\n    sys.stderr.write('y' * 10**6)\n"
        "logging.warning('z')\nwarnings.warn('w')\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    traceback.print_exc()\n"
        "print('end', file=sys.stderr)\nsys.exit(7)\n"
    )
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        for stream in (write, full):
            streams = {"stdout": stream, "stderr": stream}
            process = subprocess.run([sys.executable, "-c", program], cwd=REPO, **streams)
            assert process.returncode == 7
    os.close(write)


def test_what_stops_a_run_is_in_its_log_and_ends_it_also_where_nobody_reads(tmp_path):
    """A traceback that could not be printed left the workers, and Python waiting for them."""
    (tmp_path / "crash.py").write_text(
        f"import sys\nsys.path.insert(0, {str(REPO)!r})\n"
        "import finetune\nfrom util.run import run_main\n"
        "def crash(*args):\n    raise RuntimeError('boom')\n"
        "finetune.cross_entropy_sum = crash\nrun_main(finetune.main)\n"
    )
    read, write = os.pipe()
    os.close(read)
    command = (tmp_path / "crash.py", *FLAGS, "--model_name_or_path", "tiny")
    command += ("--output_dir", tmp_path / "out")
    process = start(*command, streams={"stdout": write, "stderr": write})
    os.close(write)
    assert process.wait(timeout=HANG_SECONDS) == 1
    log = (tmp_path / "out" / "train.log").read_text()
    assert log.count("RuntimeError: boom") == 1


# ------------------------------------------------------------------ other runs


def open_in_another_process(output_dir):
    """Return a process that holds `output_dir`; a line to it ends it."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom util.survive import claim\n"
        f"claim(Path({str(output_dir)!r}))\nprint(flush=True)\nsys.stdin.readline()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPO, text=True, **pipes)
    assert process.stdout.readline() == "\n"
    return process


def test_a_folder_belongs_to_one_run_as_long_as_that_goes_on(tmp_path):
    config = tiny_config(output_dir=str(tmp_path / "out"))
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    process = open_in_another_process(tmp_path / "out")
    for checkpoint in (None, tmp_path / "out" / "checkpoint-1"):  # a new run, a resumed one
        with pytest.raises(UserError) as info:
            open_output_dir(config, CPU, checkpoint)
        said = f"process {process.pid} on {socket.gethostname()} since {time.strftime('%Y-')}"
        assert said in str(info.value)
    process.communicate("\n")
    assert not (tmp_path / "out" / survive.CLAIM_FILE).exists()
    # One that is killed cannot delete its file, and holds nothing all the same.
    process = open_in_another_process(tmp_path / "out")
    process.kill()
    process.communicate()
    assert (tmp_path / "out" / survive.CLAIM_FILE).exists()
    open_output_dir(config, CPU, tmp_path / "out" / "checkpoint-1")
    shutil.rmtree(tmp_path / "out")
    # Where nothing was written, as where the data are wrong, nothing is left.
    (tmp_path / "out").mkdir()
    open_in_another_process(tmp_path / "out").communicate("\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_alive", [True, False])
@pytest.mark.parametrize("has_locks", [True, False])
def test_on_a_disk_without_true_locks_the_files_time_tells(
    is_alive, has_locks, tmp_path, monkeypatch
):
    path = tmp_path / survive.CLAIM_FILE
    path.write_text(", process 1 on elsewhere since 2026-01-01 00:00:00")
    monkeypatch.setattr(survive, "CLAIM_DEAD_SECONDS", 2)
    if not has_locks:

        def lockf(*_):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(survive.fcntl, "lockf", lockf)
    if is_alive:
        threading.Timer(0.5, os.utime, [path]).start()
        with pytest.raises(UserError, match="process 1 on elsewhere since 2026"):
            survive.claim(tmp_path)
    else:
        survive.claim(tmp_path)
        assert f"process {os.getpid()} on " in path.read_text()


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    folders = [open_output_dir(parse_config([]), CPU, None).output_dir for _ in range(3)]
    assert folders == [f"train_output/now{end}" for end in ("", "-2", "-3")]
