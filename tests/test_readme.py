"""What the README says is so: commands run, flags exist, files are there."""

import dataclasses
import re

import pytest
from conftest import REPO
from test_end_to_end import run_script

from util.config import Config

README = (REPO / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line and not line.startswith("#")
]
# These run whole in test_end_to_end.py and in continuous integration.
RUN_ELSEWHERE = {"./finetune.sh", "./run_tests.sh"}
# Resuming, with real signals, is what test_faults.py does; here the flags are enough.
SHORTENED = "--max_steps 3 --save_steps 2".split()


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["./finetune.sh", "./run_tests.sh"]
    assert "./run_tests.sh" in (REPO / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in RUN_ELSEWHERE])
def test_every_other_command_runs(command, tmp_path):
    words = command.split()
    if words[0] == "./finetune_distributed.sh":
        return run_script(*words, "--max_steps", 2, "--output_dir", tmp_path / "out")
    if words[0] == "./finetune.sh":
        return check_launcher(words, tmp_path)
    assert words[0] == "python"
    if words[1] == "finetune.py":
        words += ["--output_dir", str(tmp_path / "out")]
    if words[1].startswith("test_on_trained"):
        # Some run is needed; what a trained one answers is tested in test_end_to_end.py.
        run_script("finetune.py", "--max_steps", 1, "--output_dir", tmp_path / "run")
        words += ["--model_dir", str(tmp_path / "run")]
    if "--save" in words:
        words[words.index("--save") + 1] = str(tmp_path / "answers.json")
    if words[1].startswith("test_on"):
        words += ["--max_new_tokens", "2"]
    if words[1] == "compare.py":
        for name in ("base.json", "trained.json"):
            options = ("--max_new_tokens", 2, "--save", tmp_path / name)
            run_script("test_on_official_model.py", "--model_name_or_path", "tiny", *options)
        words[2:4] = [str(tmp_path / "base.json"), str(tmp_path / "trained.json")]
        words[-1] = str(tmp_path / "compare.html")
    assert run_script(*words[1:])


def check_launcher(words, tmp_path):
    output_dir = tmp_path / "out"
    words[words.index("--output_dir") + 1] = str(output_dir)
    if "--resume_from" in words:
        first = [word for word in words if word not in ("--resume_from", "latest")]
        run_script(*first, *SHORTENED)
        (output_dir / "model.safetensors").unlink()
    run_script(*words, *SHORTENED)
    assert (output_dir / "checkpoint-2").is_dir() and (output_dir / "model.safetensors").is_file()


def test_the_table_of_flags_is_complete():
    table = re.findall(r"^\| `--(\w+)` \|", README, re.M)
    assert table == [field.name for field in dataclasses.fields(Config)]


def test_links_and_named_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    for link in links:
        path, _, heading = link.partition("#")
        assert (REPO / path).exists()
        if heading:
            assert re.search(rf"^#+ {heading.replace('-', ' ')}$", README, re.M | re.I)
    for path in re.findall(r"`((?:util|tests|benchmarks)/[\w.-]+)`", README):
        assert (REPO / path).exists(), path


def test_the_two_commands_work_in_an_empty_path(tmp_path):
    """The launchers find their folder, whatever the current one is."""
    printed = run_script(REPO / "finetune.sh", "--no_such_flag", cwd=tmp_path, code=2)
    assert "--no_such_flag" in printed


def test_an_active_environment_is_checked_and_not_changed(tmp_path):
    check = REPO / "util" / "check_requirements.py"
    (tmp_path / "r.txt").write_text("torch==2.14.1\nno-such-package==1.0  # a comment\n")
    printed = run_script(check, tmp_path / "r.txt", code=1)
    assert "lacks no-such-package" in printed and "pip install -r" in printed
    (tmp_path / "r.txt").write_text("-r more.txt\n")
    (tmp_path / "more.txt").write_text("numpy==0.1\n")
    printed = run_script(check, tmp_path / "r.txt")
    assert "not tested: numpy" in printed and "tested: 0.1" in printed
