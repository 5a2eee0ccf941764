"""The recipes of CONTRIBUTING.md, applied to a copy of the repo and trained for some steps."""

import json
import re
import shutil
import subprocess

import pytest

from helpers import REPO, run_script

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


def train(folder, output_dir, *command):
    """Train three steps with a script of the copy, save twice, and return the losses."""
    flags = ("--device", "cpu", "--max_steps", 3, "--save_steps", 2, "--output_dir", output_dir)
    run_script(*command, *flags, cwd=folder)
    assert (output_dir / "checkpoint-2").is_dir() and (output_dir / "checkpoint-3").is_dir()
    rows = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


@pytest.mark.parametrize(("title", "recipe"), RECIPES, ids=[title for title, _ in RECIPES])
def test_a_recipe_trains_alike_on_one_rank_and_two(title, recipe, copy, tmp_path):
    before = train(copy, tmp_path / "before", "finetune.py")
    apply(recipe, copy)
    alone = train(copy, tmp_path / "alone", "finetune.py")
    launcher = ("torchrun", "--standalone", "--nproc_per_node", 2, "finetune_distributed.py")
    assert train(copy, tmp_path / "two", *launcher) == pytest.approx(alone, rel=1e-5)
    assert alone != pytest.approx(before, rel=1e-5)
    # Tests that guard the two scripts and the plan do not mind, and notice what it takes.
    tests = (
        "tests/model/test_loss.py::test_the_planner_computes_the_loss_of_the_loop",
        "tests/test_distributed.py::test_the_distributed_script_differs_only_in_marked_lines",
        "tests/tools/test_planner.py::test_the_planned_peak_is_the_real_one[flags5]",
    )
    run_script("python", "-m", "pytest", "-q", *tests, cwd=copy)


def test_there_are_two_recipes_with_code():
    assert len(RECIPES) == 2
