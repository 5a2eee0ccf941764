"""The recipes of CONTRIBUTING.md, applied to a copy of the repo and trained for some steps."""

import re
import shutil
import subprocess
import sys

import pytest

import finetune
from helpers import REPO, call, read_metrics, run_script

RECIPES = re.findall(
    r"^## Recipe: (.+?)\n.*?^```diff\n(.*?)^```",
    (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    re.M | re.S,
)


def apply(recipe, folder):
    """Put a recipe into the files that it names: lines with + in place of those with -, or below.

    Lines with neither mark are there already.
    """
    hunks = re.findall(r"^(\S+\.py.*)\n((?:^[ +-].*\n)+)", recipe, re.M)
    for name, hunk in ((name, hunk) for names, hunk in hunks for name in names.split()):
        text = (folder / name).read_text(encoding="utf-8")
        # Each change begins with a line that is there, once, and ends before the next such line.
        for first, added in re.findall(r"^([ -].*\n)((?:^\+.*\n)+)", hunk, re.M):
            assert text.count(first[1:]) == 1, f"{name}: {first}"
            kept = first[1:] if first[0] == " " else ""
            text = text.replace(first[1:], kept + re.sub(r"^\+", "", added, flags=re.M))
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def copy(tmp_path):
    """A copy of the repo as git sees it, with the models that are built already."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    folder = tmp_path / "repo"
    for name in names:
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / name)
    (folder / ".cache").symlink_to(REPO / ".cache")
    return folder


FLAGS = ("--device", "cpu", "--num_workers", 0, "--max_steps", 3, "--save_steps", 2)


def train(folder, output_dir, *command):
    """Train three steps with a script of the copy, save twice, and return the losses."""
    run_script(*command, *FLAGS, "--output_dir", output_dir, cwd=folder)
    assert (output_dir / "checkpoint-2").is_dir() and (output_dir / "checkpoint-3").is_dir()
    return [row["loss"] for row in read_metrics(output_dir)]


def test_the_recipes_train_alike_on_one_rank_and_two(copy, tmp_path):
    assert len(RECIPES) == 2
    call(finetune, *FLAGS, "--output_dir", tmp_path / "before")
    losses = [[row["loss"] for row in read_metrics(tmp_path / "before")]]
    for title, recipe in RECIPES:
        apply(recipe, copy)
        losses.append(train(copy, tmp_path / title, "finetune.py"))
        assert losses[-1] != pytest.approx(losses[-2], rel=1e-5)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
    two = train(copy, tmp_path / "two", *launcher, 2, "finetune_distributed.py")
    assert two == pytest.approx(losses[-1], rel=1e-5)
    # Tests that guard the two scripts and the plan do not mind, and notice what it takes.
    tests = (
        "tests/model/test_loss.py::test_the_planner_computes_the_loss_of_the_loop",
        "tests/test_distributed.py::test_the_distributed_script_differs_only_in_marked_lines",
        "tests/tools/test_planner.py::test_the_planned_peak_is_the_real_one[flags5]",
    )
    run_script(sys.executable, "-m", "pytest", "-q", *tests, cwd=copy)
