"""Terminals and pipes that go away in the middle of a run cost it nothing."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from helpers import ENVIRONMENT, REPO, read_metrics, undamaged_steps, wait_for
from util.run import EXIT_STOPPED

FLAGS = ("--model_name_or_path", "tiny", "--device", "cpu", "--num_workers", "1")
SCRIPT = (sys.executable, "finetune.py", *FLAGS)


def begin(*command, output_dir, max_steps=500, **options):
    """Start a run in a session of its own, and wait until two steps are done."""
    process = subprocess.Popen(
        [*command, "--max_steps", str(max_steps), "--output_dir", str(output_dir)],
        cwd=REPO,
        env=ENVIRONMENT,
        start_new_session=True,
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options,
    )
    metrics = output_dir / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 1, process)
    return process


def check_saved(process, output_dir):
    """The run has ended with 75, and all its steps are in a checkpoint and in the log."""
    assert process.wait(timeout=120) == EXIT_STOPPED
    (last,) = undamaged_steps(output_dir)
    assert [row["global_step"] for row in read_metrics(output_dir)] == list(range(1, last + 1))
    assert f"stopped after step {last}" in (output_dir / "train.log").read_text()


@pytest.mark.parametrize("command", [SCRIPT, ("./finetune_distributed.sh", *FLAGS)])
def test_a_closed_terminal_saves_as_sigterm_does(command, tmp_path):
    """It may send its signal more than once."""
    process = begin(*command, output_dir=tmp_path / "out")
    for _ in range(2):
        os.killpg(process.pid, signal.SIGHUP)
    check_saved(process, tmp_path / "out")


def test_under_nohup_a_run_goes_on(tmp_path):
    process = begin("nohup", *SCRIPT, output_dir=tmp_path / "out", max_steps=40)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    assert undamaged_steps(tmp_path / "out") == [40]


@pytest.mark.parametrize("command", [SCRIPT, ("./finetune_distributed.sh", *FLAGS)])
def test_ctrl_c_saves_also_where_tee_is_gone_first(command, tmp_path):
    read, write = os.pipe()
    process = begin(*command, output_dir=tmp_path / "out", stdout=write, stderr=write)
    os.close(write)
    os.close(read)
    os.killpg(process.pid, signal.SIGINT)
    check_saved(process, tmp_path / "out")


def test_a_run_goes_on_without_its_terminal(tmp_path):
    terminal, end = pty.openpty()
    streams = {"stdin": end, "stdout": end, "stderr": end}
    process = begin(*SCRIPT, output_dir=tmp_path / "out", max_steps=40, **streams)
    os.close(end)
    os.close(terminal)
    assert process.wait(timeout=120) == 0
    assert len(read_metrics(tmp_path / "out")) == 40
    assert "done" in (tmp_path / "out" / "train.log").read_text()
