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
from safetensors.torch import load_file

from helpers import (
    assistant,
    finish,
    image,
    make_image,
    run_script,
    start,
    undamaged_steps,
    user,
    wait_for,
    write_data,
)
from util.run import EXIT_STOPPED

NUM_STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    picture = make_image(folder / "a.png", 60, 60)
    conversations = [[user(f"Question {i}"), assistant(f"Answer {i}")] for i in range(20)]
    conversations += [[user(image(picture)), assistant(f"Picture {i}")] for i in range(4)]
    return write_data(folder / "data.json", conversations)


@pytest.fixture(scope="module")
def command(small_folder):
    """Return a function: the command of a run, which goes on where there is a checkpoint."""

    def command(data, output_dir, *more):
        resume = ("--resume_from", "latest") if undamaged_steps(output_dir) else ()
        return [
            *(sys.executable, "finetune.py", "--model_name_or_path", small_folder),
            *("--learning_rate", 1e-3, "--num_epochs", 60, "--max_pixels", 50176),
            *("--train_data", data, "--max_steps", NUM_STEPS),
            *("--output_dir", output_dir, "--num_workers", 1, "--save_steps", 3, *resume, *more),
        ]

    return command


def logged_steps(output_dir):
    path = output_dir / "metrics.jsonl"
    # A line that is being written does not end yet.
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line)["global_step"] for line in lines]


@pytest.fixture(scope="module")
def undisturbed(command, data, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    run_script(*command(data, output_dir))
    return load_file(output_dir / "model.safetensors")


def assert_same_end(output_dir, undisturbed):
    assert logged_steps(output_dir) == list(range(1, NUM_STEPS + 1))
    final = load_file(output_dir / "model.safetensors")
    assert final.keys() == undisturbed.keys()
    assert all(torch.equal(final[name], undisturbed[name]) for name in final)


KILL, OTHERS = [signal.SIGKILL], [signal.SIGHUP, signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize(
    "numbers, num_times, save_steps",
    [
        (KILL, 4, 3),
        pytest.param(KILL, 30, 1, marks=pytest.mark.slow),
        pytest.param(OTHERS, 30, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_ended_again_and_again(
    numbers, num_times, save_steps, command, data, undisturbed, tmp_path
):
    """At a random moment after a random step, or during a save, its output a pipe, broken or not.

    Killed, it loses no finished save; told to stop, no step.
    """
    dice, output_dir = random.Random(num_times), tmp_path / "out"
    more = ("--save_steps", save_steps, "--keep_checkpoints", 3)
    for i in range(num_times):
        done = max(undamaged_steps(output_dir), default=0)
        if done == 0 or done >= NUM_STEPS - 10:
            shutil.rmtree(output_dir, ignore_errors=True)
            done = 0
        process = start(*command(data, output_dir, *more))
        if i % 2:
            wait_for(lambda: list(output_dir.glob(".checkpoint-*.partial")), process)
            time.sleep(dice.uniform(0, 0.05))
        else:
            target = dice.randint(done + 1, min(done + 8, NUM_STEPS - 10))
            wait_for(lambda step=target: step in logged_steps(output_dir), process)
            time.sleep(dice.uniform(0, 0.1))
        assert process.poll() is None, process.stdout.read()
        if i % 3 == 0:
            process.stdout.close()
        os.killpg(process.pid, dice.choice(numbers))
        # One that has reached its end meanwhile was not stopped.
        assert process.wait() in ((-signal.SIGKILL,) if numbers is KILL else (EXIT_STOPPED, 0))
        kept, last = (
            max(steps(output_dir), default=0) for steps in (undamaged_steps, logged_steps)
        )
        assert kept >= max(
            done, last if numbers is OTHERS else (last - 1) // save_steps * save_steps
        )
    if not kept:
        shutil.rmtree(output_dir)
    run_script(*command(data, output_dir, *more))
    assert_same_end(output_dir, undisturbed)


@pytest.mark.parametrize(
    "number, when",
    [
        *((signal.SIGTERM, when) for when in ("training", "loading", "saving")),
        (signal.SIGINT, "training"),
    ],
)
def test_a_signal_to_the_whole_group_saves_and_stops(
    number, when, command, data, undisturbed, tmp_path
):
    output_dir, num_steps = tmp_path / "out", 1 if when == "loading" else 2
    if when == "loading":  # every picture takes its time, and there are no workers to read ahead
        slow = [str(make_image(tmp_path / f"{i}.png", 1600, 1600, i)) for i in range(4)]
        samples = [[user(*map(image, slow)), assistant("x")] for _ in range(8)]
        data = write_data(tmp_path / "slow.json", samples)
    more = ("--save_steps", 1 if when == "saving" else 1000)
    workers = ("--num_workers", 1 if when == "training" else 0)
    process = start(*command(data, output_dir, *more, *workers))
    wait_for(lambda: len(logged_steps(output_dir)) >= num_steps, process)
    if when == "saving":
        wait_for(lambda: list(output_dir.glob(".checkpoint-*.partial")), process)
    os.killpg(process.pid, number)
    printed = finish(process, code=EXIT_STOPPED)
    assert number.name in printed and "--resume_from latest" in printed
    assert "Traceback" not in printed
    assert undamaged_steps(output_dir)[0] == logged_steps(output_dir)[-1]
    assert when == "saving" or len(undamaged_steps(output_dir)) == 1
    assert not list(output_dir.glob(".checkpoint-*"))
    if (number, when) == (signal.SIGTERM, "training"):  # the others are resumed likewise
        run_script(*command(data, output_dir, *more))
        assert_same_end(output_dir, undisturbed)


def test_a_second_signal_ends_at_once(command, data, tmp_path):
    # Each save takes its time here, as those of real models do.
    tiny = ("--model_name_or_path", "tiny")
    process = start(*command(data, tmp_path / "out", "--save_steps", 1, *tiny))
    wait_for(lambda: len(logged_steps(tmp_path / "out")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    log = tmp_path / "out" / "train.log"
    wait_for(lambda: "a second signal ends at once" in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode in (-signal.SIGTERM, -signal.SIGINT)
    assert undamaged_steps(tmp_path / "out")


def test_a_file_system_that_fills_up(command, data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=26m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        # One checkpoint fits, a second does not until the ballast is gone.
        (disk / "ballast").write_bytes(bytes(10 * 2**20))
        output_dir = disk / "out"
        process = start(*command(data, output_dir, "--keep_checkpoints", 1))
        wait_for(lambda: len(logged_steps(output_dir)) >= 20, process)
        assert undamaged_steps(output_dir) == [3]
        (disk / "ballast").unlink()
        printed = finish(process)
        assert "checkpoint-6 could not be written" in printed and "are free" in printed
        assert undamaged_steps(output_dir) == [NUM_STEPS]
        assert logged_steps(output_dir) == list(range(1, NUM_STEPS + 1))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
