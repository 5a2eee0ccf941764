"""What the documents say is so: commands run, flags exist, files are there, quotes are true."""

import dataclasses
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import REPO
from test_end_to_end import run_script

from benchmarks import bench_fit
from util import check_requirements
from util.config import Config

README = (REPO / "README.md").read_text(encoding="utf-8")
CHINESE = (REPO / "README.zh.md").read_text(encoding="utf-8")
LOOP_PAGES = ("docs/loop.md", "docs/loop.zh.md")
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


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Some run, stopped early; what a trained one answers is tested in test_end_to_end.py."""
    output_dir = tmp_path_factory.mktemp("readme") / "out"
    (command,) = [c for c in COMMANDS if c.startswith("./finetune.sh -") and "latest" not in c]
    words = command.split()
    words[words.index("--output_dir") + 1] = str(output_dir)
    run_script(*words, *SHORTENED)
    return output_dir


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory):
    """A run whose output is a LoRA adapter."""
    output_dir = tmp_path_factory.mktemp("adapter") / "out"
    run_script("finetune.py", "--lora_rank", 2, "--output_dir", output_dir, *SHORTENED)
    return output_dir


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in RUN_ELSEWHERE])
def test_every_other_command_runs(command, tmp_path, short_run, adapter_run):
    words = command.split()
    if words[0] == "./finetune_distributed.sh":
        words += ["--max_steps", "2", "--output_dir", str(tmp_path / "out")]
        assert run_script(*words)
        return
    if words[0] == "./finetune.sh":
        return check_launcher(words, tmp_path / "out", short_run)
    assert words[0] == "python"
    if words[1] == "finetune.py":
        words += ["--output_dir", str(tmp_path / "out")]
    if words[1].startswith("test_on_trained"):
        run = adapter_run if "adapter" in command else short_run
        words += ["--model_dir", str(run / "checkpoint-2" if "checkpoint-" in command else run)]
    if "util.merge_adapter" in words:
        words[-2:] = [str(adapter_run), str(tmp_path / "merged")]
    if "--save" in words:
        words[words.index("--save") + 1] = str(tmp_path / "answers.json")
    if words[1].startswith("test_on"):
        words += ["--max_new_tokens", "2"]
    if words[1] == "compare.py":
        options = ("--max_new_tokens", 2, "--save", tmp_path / "answers.json")
        run_script("test_on_official_model.py", "--model_name_or_path", "tiny", *options)
        words[2:4] = [str(tmp_path / "answers.json")] * 2
        words[-1] = str(tmp_path / "compare.html")
    # A model that is not on the machine is planned, not fetched.
    assert run_script(sys.executable, *words[1:], HF_HUB_OFFLINE="1")


def check_launcher(words, output_dir, short_run):
    if "--resume_from" in words:
        shutil.copytree(short_run, output_dir)
        (output_dir / "model.safetensors").unlink()
        words[words.index("--output_dir") + 1] = str(output_dir)
        run_script(*words, *SHORTENED)
    else:
        output_dir = short_run  # it is this command
    assert (output_dir / "checkpoint-2").is_dir() and (output_dir / "model.safetensors").is_file()


def test_the_table_of_flags_is_complete():
    table = re.findall(r"^\| `--(\w+)` \|", README, re.M)
    assert table == [field.name for field in dataclasses.fields(Config)]


def headings(text: str) -> list[tuple[int, str]]:
    """Return (level, title) of every heading; lines of code are none."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", text, re.M)]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md", *LOOP_PAGES])
def test_links_and_named_files_exist(name):
    text = (REPO / name).read_text(encoding="utf-8")
    # As GitHub makes anchors of titles.
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for _, title in headings(text)
    }
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        assert "://" in link or not path or os.path.exists(REPO / Path(name).parent / path), link
        assert path or anchor in anchors, link
    for path in re.findall(r"`((?:util|tests|benchmarks)/[\w.-]+)`", text):
        assert (REPO / path).exists(), path


def code_blocks(text: str) -> list[str]:
    return [
        textwrap.dedent(block) for block in re.findall(r"^( *```.*?^ *```)$", text, re.M | re.S)
    ]


FIGURE = re.compile(r"\d+(?:[.,]\d+)*(?:e-\d+)?")


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every table."""
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
        for table in re.findall(r"(?:^\|.*\n)+", text, re.M)
    ]


def test_the_chinese_readme_has_the_same_content():
    assert [level for level, _ in headings(CHINESE)] == [level for level, _ in headings(README)]
    # What commands do is a comment in the language of the page.
    mine, theirs = (
        [re.sub(r"#(?! *!)(?!SBATCH) .*", "#", block) for block in code_blocks(text)]
        for text in (README, CHINESE)
    )
    assert mine == theirs
    for mine, theirs in zip(tables(README), tables(CHINESE), strict=True):
        for row, other in zip(mine, theirs, strict=True):
            assert re.findall(r"`.*?`", row[0]) == re.findall(r"`.*?`", other[0])
            for cell, other_cell in zip(row, other, strict=True):
                assert FIGURE.findall(cell) == FIGURE.findall(other_cell), row


@pytest.mark.parametrize("name", LOOP_PAGES)
def test_the_page_on_the_loop_quotes_it_whole(name):
    script = (REPO / "finetune.py").read_text(encoding="utf-8")
    page = (REPO / name).read_text(encoding="utf-8")
    quotes = re.findall(r"```python\n(.*?)```", page, re.S)
    place = 0
    for quote in quotes:
        assert quote in script[place:], f"not in finetune.py, or not in this order:\n{quote}"
        place = script.index(quote, place) + len(quote)
    first, last = "    for step in data.plan", "        optimizer.zero_grad(set_to_none=True)\n"
    step = script[script.index(first) : script.index(last) + len(last)]
    quoted = {line for quote in quotes for line in quote.splitlines()}
    assert [line for line in step.splitlines() if line and line not in quoted] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_table_of_what_fits_is_the_planners(tmp_path):
    loaded = bench_fit.load_models()
    data_file = bench_fit.write_data(tmp_path, loaded[0][1])
    changes = {"gradient_checkpointing": "all", "precision": "bf16_lean"}
    assert bench_fit.table_row(loaded, data_file, changes) in README.splitlines()


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


def test_a_python_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    with pytest.raises(SystemExit, match=r"is Python 3\.10\.12, and 3\.11 or newer is needed"):
        check_requirements.main()
