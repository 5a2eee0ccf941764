"""Real signals and real files: whatever happens to a run, what was finished is not lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPO, assistant, image, make_image, user, write_data
from safetensors.torch import load_file
from test_end_to_end import ENVIRONMENT, run_script

from util.checkpoint import damage, list_checkpoints
from util.run import EXIT_STOPPED

NUM_STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    picture = make_image(folder / "a.png", 60, 60)
    conversations = [[user(f"Question {i}"), assistant(f"Answer {i}")] for i in range(20)]
    conversations += [[user(image(picture)), assistant(f"Picture {i}")] for i in range(4)]
    return write_data(folder / "data.json", conversations)


def flags(data, output_dir, *more):
    return [
        *("--model_name_or_path", "tiny", "--train_data", data, "--max_steps", NUM_STEPS),
        *("--output_dir", output_dir, "--save_steps", 3, "--num_workers", 1, *more),
    ]


def start(*arguments):
    """Start finetune.py in a process group of its own."""
    command = [sys.executable, "finetune.py", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=REPO,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(condition, process, seconds=120):
    """Wait until `condition` holds, or the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def logged_steps(output_dir):
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    try:
        return [json.loads(line)["global_step"] for line in lines]
    except json.JSONDecodeError:  # a line that is being written
        return [json.loads(line)["global_step"] for line in lines[:-1]]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    run_script("finetune.py", *flags(data, output_dir), OMP_NUM_THREADS="1")
    return load_file(output_dir / "model.safetensors")


def resume_flags(output_dir):
    return ("--resume_from", "latest") if list_checkpoints(output_dir) else ()


def clear_before_the_first_checkpoint(output_dir):
    if output_dir.exists() and not list_checkpoints(output_dir):
        shutil.rmtree(output_dir)


def assert_same_end(output_dir, undisturbed):
    assert logged_steps(output_dir) == list(range(1, NUM_STEPS + 1))
    final = load_file(output_dir / "model.safetensors")
    assert final.keys() == undisturbed.keys()
    assert all(torch.equal(final[name], undisturbed[name]) for name in final)


def kill_and_resume(data, output_dir, undisturbed, num_kills, seed):
    """Kill a run again and again, at a random moment after a random step or during a save."""
    generator = random.Random(seed)
    for number in range(num_kills):
        clear_before_the_first_checkpoint(output_dir)
        done = max([int(p.name.split("-")[1]) for p in list_checkpoints(output_dir)], default=0)
        if done >= NUM_STEPS - 3:
            shutil.rmtree(output_dir)
            done = 0
        process = start(*flags(data, output_dir), *resume_flags(output_dir))
        if number % 2:
            wait_for(lambda: list(output_dir.glob(".checkpoint-*.partial")), process)
            time.sleep(generator.uniform(0, 0.05))
        else:
            target = generator.randint(done + 1, min(done + 8, NUM_STEPS - 1))
            wait_for(lambda step=target: step in logged_steps(output_dir), process)
            time.sleep(generator.uniform(0, 0.1))
        assert process.poll() is None, process.stdout.read()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for checkpoint in list_checkpoints(output_dir):
            assert damage(checkpoint) is None
        # No finished one is lost: at most three steps have to be done again.
        kept = max([int(p.name.split("-")[1]) for p in list_checkpoints(output_dir)], default=0)
        assert kept >= max(done, (max(logged_steps(output_dir), default=0) - 1) // 3 * 3)
    clear_before_the_first_checkpoint(output_dir)
    run_script(
        "finetune.py", *flags(data, output_dir), *resume_flags(output_dir), OMP_NUM_THREADS="1"
    )
    assert_same_end(output_dir, undisturbed)


def test_killed_five_times(data, undisturbed, tmp_path):
    kill_and_resume(data, tmp_path / "out", undisturbed, 5, seed=0)


@pytest.mark.slow
def test_killed_thirty_times(data, undisturbed, tmp_path):
    kill_and_resume(data, tmp_path / "out", undisturbed, 30, seed=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_stops(number, data, undisturbed, tmp_path):
    output_dir = tmp_path / "out"
    process = start(*flags(data, output_dir), "--save_steps", 1000)
    wait_for(lambda: len(logged_steps(output_dir)) >= 2, process)
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, printed
    assert number.name in printed and "--resume_from latest" in printed
    assert "Traceback" not in printed
    (checkpoint,) = list_checkpoints(output_dir)
    assert checkpoint.name == f"checkpoint-{logged_steps(output_dir)[-1]}"
    if number == signal.SIGINT:
        return  # the other signal's checkpoint is resumed
    run_script(
        "finetune.py",
        *(*flags(data, output_dir), "--save_steps", 1000, "--resume_from", "latest"),
        OMP_NUM_THREADS="1",
    )
    assert_same_end(output_dir, undisturbed)


@pytest.mark.parametrize("when", ["loading", "saving"])
def test_a_signal_while_data_are_read_or_a_checkpoint_is_written(when, data, tmp_path):
    output_dir = tmp_path / "out"
    if when == "loading":  # every picture takes its time, and there are no workers to read ahead
        slow = [str(make_image(tmp_path / f"{i}.png", 2400, 2400, i)) for i in range(4)]
        samples = [[user(*map(image, slow)), assistant("x")] for _ in range(8)]
        data = write_data(tmp_path / "slow.json", samples)
    more = ("--save_steps", 1 if when == "saving" else 1000, "--num_workers", 0)
    process = start(*flags(data, output_dir, *more))
    if when == "saving":
        wait_for(lambda: len(logged_steps(output_dir)) >= 2, process)
        wait_for(lambda: list(output_dir.glob(".checkpoint-*.partial")), process)
    else:
        wait_for(lambda: len(logged_steps(output_dir)) >= 1, process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, printed
    newest = list_checkpoints(output_dir)[0]
    assert newest.name == f"checkpoint-{logged_steps(output_dir)[-1]}" and damage(newest) is None
    assert not list(output_dir.glob(".checkpoint-*"))


def test_a_second_signal_ends_at_once(data, tmp_path):
    # Each save takes its time here, as those of real models do.
    process = start(*flags(data, tmp_path / "out", "--save_steps", 1))
    wait_for(lambda: len(logged_steps(tmp_path / "out")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    log = tmp_path / "out" / "train.log"
    wait_for(lambda: "a second signal ends at once" in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode in (-signal.SIGTERM, -signal.SIGINT)
    for checkpoint in list_checkpoints(tmp_path / "out"):
        assert damage(checkpoint) is None


def test_a_file_system_that_fills_up(data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        # One checkpoint fits, a second does not until the ballast is gone.
        (disk / "ballast").write_bytes(bytes(60 * 2**20))
        output_dir = disk / "out"
        process = start(*flags(data, output_dir, "--keep_checkpoints", 1))
        wait_for(lambda: len(logged_steps(output_dir)) >= 20, process)
        assert [p.name for p in list_checkpoints(output_dir)] == ["checkpoint-3"]
        (disk / "ballast").unlink()
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
        assert "checkpoint-6 could not be written" in printed and "are free" in printed
        (newest,) = list_checkpoints(output_dir)
        assert newest.name == f"checkpoint-{NUM_STEPS}" and damage(newest) is None
        assert logged_steps(output_dir) == list(range(1, NUM_STEPS + 1))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
