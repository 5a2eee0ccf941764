"""What the documents say is so: commands run, flags exist, files are there."""

import dataclasses
import json
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

from helpers import REPO, run_script
from util import check_requirements
from util.config import TINY_NOTICE, Config, UserError
from util.data.conversation import parse_conversation
from util.tools import flags
from zygote import forking

TOPICS = "data distributed faq flags from-zero loop measured memory publish".split()
ENGLISH = ["README.md", *(f"docs/{topic}.md" for topic in TOPICS)]
PAIRS = [(name, name.replace(".md", ".zh.md")) for name in ENGLISH]
PAGES = [name for pair in PAIRS for name in pair] + ["CONTRIBUTING.md"]
MOST_LINES = {"README.md": 220, "CONTRIBUTING.md": 80}
TEXTS = {name: (REPO / name).read_text(encoding="utf-8") for name in PAGES}
README = TEXTS["README.md"]
DOCS = REPO / "docs"


def code_blocks(text: str, language: str = "[a-z]*") -> list[str]:
    """Return what stands in the code blocks of a page."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.M | re.S)
    return [textwrap.dedent(block) for _, block in found]


def without_code(text: str) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)


def commands(text: str, language: str) -> list[str]:
    """Return the commands in the blocks of a language; one that goes on in a next line is one."""
    blocks = code_blocks(text, language)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line and not line.startswith("#")]


# Each once, wherever it stands. What needs a GPU or the network is in blocks of "sh".
COMMANDS = list(dict.fromkeys(c for name in ENGLISH for c in commands(TEXTS[name], "bash")))
# These run in test_end_to_end.py, test_distributed.py and continuous integration.
RUN_ELSEWHERE = {"./finetune.sh", "./finetune_distributed.sh --max_steps 20", "./run_tests.sh"}
# Resuming, with real signals, is what test_faults.py does; here the flags are enough.
SHORTENED = "--max_steps 3 --save_steps 2".split()
SHORT_RUN = "./finetune.sh --output_dir train_output/mine --save_steps 50"


def test_no_page_is_missing_here_and_none_is_too_long():
    pages = {path.relative_to(REPO).as_posix() for path in [*REPO.glob("*.md"), *DOCS.glob("*.md")]}
    assert pages == set(PAGES)
    for name, most in MOST_LINES.items():
        assert len(TEXTS[name].splitlines()) <= most
    for name in (*ENGLISH, "CONTRIBUTING.md"):
        prose = [line for line in without_code(TEXTS[name]).splitlines() if line[:1] != "|"]
        assert [line for line in prose if len(line) > 100] == []


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["./finetune.sh", "./run_tests.sh"]
    assert SHORT_RUN in COMMANDS
    assert "./run_tests.sh" in (REPO / ".ci" / "run").read_text()


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Some run, stopped early; what a trained one answers is tested in test_end_to_end.py."""
    output_dir = tmp_path_factory.mktemp("readme") / "out"
    words = SHORT_RUN.split()
    words[words.index("--output_dir") + 1] = str(output_dir)
    run_script(*words, *SHORTENED, **forking())
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
    if words[0] == "./finetune.sh":
        return check_launcher(command, tmp_path / "out", short_run)
    assert words[0] == "python"
    if words[1] == "finetune.py":
        words += [*SHORTENED, "--output_dir", str(tmp_path / "out")]
    if words[1].startswith("test_on_trained"):
        run = adapter_run if "adapter" in command else short_run
        words += ["--model_dir", str(run / "checkpoint-2" if "checkpoint-" in command else run)]
    if "util.tools.merge_adapter" in words:
        words[-2:] = [str(adapter_run), str(tmp_path / "merged")]
    if "--save" in words:
        words[words.index("--save") + 1] = str(tmp_path / "answers.json")
    if words[1].startswith("test_on"):
        words += ["--max_new_tokens", "2"]
    if "--page" in words:
        words[words.index("--page") + 1] = str(tmp_path / "data.html")
    if words[1] == "compare.py":
        options = ("--max_new_tokens", 2, "--save", tmp_path / "answers.json")
        run_script("test_on_official_model.py", "--model_name_or_path", "tiny", *options)
        words[2:4] = [str(tmp_path / "answers.json")] * 2
        words[-1] = str(tmp_path / "compare.html")
    # A model that is not on the machine is planned, not fetched.
    offline = {"HF_HUB_OFFLINE": "1"} if "Qwen/" in command else {}
    assert run_script(sys.executable, *words[1:], **offline)


def check_launcher(command, output_dir, short_run):
    if command == SHORT_RUN:
        output_dir = short_run
    else:
        if "--resume_from" in command:
            shutil.copytree(short_run, output_dir)
            (output_dir / "model.safetensors").unlink()
        run_script(*command.split(), *SHORTENED, "--output_dir", output_dir, **forking())
    assert (output_dir / "checkpoint-2").is_dir() and (output_dir / "model.safetensors").is_file()


def test_the_tables_of_flags_are_those_that_config_py_makes():
    """If not: python -m util.tools.flags."""
    for path, page in flags.make_pages().items():
        assert page == path.read_text(encoding="utf-8")
        table = re.findall(r"^\| `--(\w+)`", page, re.M)
        assert table == [field.name for field in dataclasses.fields(Config)]


def test_flags_whose_help_has_changed_since_its_translation_are_named(tmp_path, monkeypatch):
    pairs = json.loads((flags.DOCS / "flags.zh.json").read_text(encoding="utf-8"))
    pairs["seed"][0], pairs["gone"] = "another help", pairs.pop("device")
    (tmp_path / "flags.zh.json").write_text(json.dumps(pairs))
    monkeypatch.setattr(flags, "DOCS", tmp_path)
    with pytest.raises(UserError, match=r"has changed of seed, device, gone$"):
        flags.make_pages()


# Of hf, vllm, pip, docker, Slurm, tensorboard and run_tests.sh; and one that is said not to exist.
OTHER_FLAGS = {
    *("exclude", "served-model-name", "enable-lora", "max-lora-rank", "lora-modules"),
    *("enable-tower-connector-lora", "outfile", "mmproj", "image", "build", "config"),
    *("no-build-isolation", "shm-size", "nodes", "ntasks-per-node", "gpus-per-node"),
    *("cpus-per-task", "logdir", "all", "help", "compile"),
}


@pytest.mark.parametrize("name", PAGES)
def test_flags_that_are_named_exist(name):
    known = {field.name for field in dataclasses.fields(Config)} | OTHER_FLAGS
    for script in ("check_data.py", "compare.py", "util/tools/generate.py"):
        source = (REPO / script).read_text(encoding="utf-8")
        known |= set(re.findall(r"add_argument\(\s*\"--(\w+)\"", source))
    assert set(re.findall(r"(?<![\w-])--(\w[\w-]*)", TEXTS[name])) - known == set()


def headings(text: str) -> list[tuple[int, str]]:
    """Return (level, title) of every heading; lines of code are none."""
    found = re.findall(r"^(#+) (.+)$", without_code(text), re.M)
    return [(len(marks), title) for marks, title in found]


def anchors(text: str) -> set[str]:
    """Return what GitHub makes of the titles of a page."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for _, title in headings(text)}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_named_files_exist(name):
    text, folder = TEXTS[name], (REPO / name).parent
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else REPO / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
        # A page in Chinese links to what there is in Chinese, and to English once: at its top.
        translated = target.with_suffix(f".zh{target.suffix}")
        if ".zh." in name and translated.exists():
            assert text.splitlines()[2].startswith(f"[English]({link})"), link
    for path in re.findall(r"(?<![\w/.])((?:util|tests|benchmarks)/[\w.-]+\w)", text):
        assert (REPO / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert (REPO / module.replace(".", "/")).with_suffix(".py").is_file(), module
    for script in re.findall(r"python ([\w/]+\.py)", text):
        assert (REPO / script).is_file(), script


def test_the_tree_of_files_has_every_file_once():
    (tree,) = [block for block in code_blocks(README) if block.startswith("finetune.py ")]
    files, folders, path = [], [], []  # the last: folders above a line, and its name
    for line in tree.splitlines():
        name, _, meaning = line.partition(" # ")
        path[len(name) - len(name.lstrip()) >> 1 :] = [name.strip()]
        is_folder = path[-1].endswith("/")
        (folders if is_folder else files).append("".join(path))
        assert meaning or is_folder, line
    scripts = [p.name for ending in ("py", "sh", "ipynb") for p in REPO.glob(f"*.{ending}")]
    found = [p.relative_to(REPO) for p in (REPO / "util").rglob("*.*") if p.is_file()]
    modules = [
        p.as_posix()
        for p in found
        if p.name != "__init__.py" and not {"tiny", "__pycache__"} & set(p.parts)
    ]
    assert sorted(files) == sorted(scripts + modules)
    # tiny/ comes with a change of its own.
    assert [f for f in folders if not (REPO / f).is_dir()] in ([], ["util/model/tiny/"])


def test_what_checks_a_commit_is_the_pinned_ruff():
    pins = (REPO / "requirements-dev.txt").read_text()
    hooks = (REPO / ".pre-commit-config.yaml").read_text()
    assert re.search(r"ruff==(\S+)", pins)[1] == re.search(r"rev: v(\S+)", hooks)[1]
    assert "bash .ci/run" in (REPO / ".github" / "workflows" / "ci.yml").read_text()


FIGURE = re.compile(r"\d+(?:[.,]\d+)*(?:e-\d+)?")


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every table."""
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
        for table in re.findall(r"(?:^\|.*\n)+", text, re.M)
    ]


@pytest.mark.parametrize(("name", "chinese"), PAIRS)
def test_the_chinese_page_has_the_same_content(name, chinese):
    text, other_text = TEXTS[name], TEXTS[chinese]
    assert [level for level, _ in headings(other_text)] == [level for level, _ in headings(text)]
    # What commands do is a comment in the language of the page.
    mine, theirs = (
        [re.sub(r"#(?! *!)(?!SBATCH) .*", "#", block) for block in code_blocks(text)]
        for text in (text, other_text)
    )
    assert mine == theirs
    fences = [re.findall(r"^ *```.*$", text, re.M) for text in (text, other_text)]
    assert fences[0] == fences[1]
    for mine, theirs in zip(tables(text), tables(other_text), strict=True):
        for row, other in zip(mine, theirs, strict=True):
            assert re.findall(r"`.*?`", row[0]) == re.findall(r"`.*?`", other[0])
            for cell, other_cell in zip(row, other, strict=True):
                assert FIGURE.findall(cell) == FIGURE.findall(other_cell), row


@pytest.mark.parametrize("name", PAGES)
def test_no_line_break_stands_between_chinese_letters(name):
    """It would be shown as a space."""
    text = without_code(TEXTS[name])
    assert re.findall(r"[\u4e00-\u9fff] *\n *[\u4e00-\u9fff].*", text) == []


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_quotes_the_notice_of_the_toy_model(name):
    assert any(TINY_NOTICE in block for block in code_blocks(TEXTS[name]))


def test_the_examples_of_data_are_conversations():
    both = code_blocks(README, "json") + code_blocks(TEXTS["docs/data.md"], "json")
    blocks = [json.loads(block) for block in both]
    records = [r for block in blocks for r in (block if isinstance(block, list) else [block])]
    kinds = set()
    for record in records:
        for message in parse_conversation(record):
            if not isinstance(message["content"], str):
                kinds |= {item["type"] for item in message["content"]}
    assert len(records) == 9 and kinds == {"text", "image", "video"}


def test_hf_takes_the_upload_command(tmp_path):
    """It gets as far as looking for the folder."""
    (command,) = [c for c in commands(TEXTS["docs/publish.md"], "sh") if c.startswith("hf upload")]
    words = shlex.split(command)
    words[0], words[3] = str(Path(sys.executable).with_name("hf")), str(tmp_path / "none")
    printed = run_script(*words, code=1, HF_HUB_OFFLINE="1")
    assert f"No such file or directory: '{tmp_path / 'none'}'" in printed


@pytest.mark.parametrize("name", ["docs/loop.md", "docs/loop.zh.md"])
def test_the_page_on_the_loop_has_every_field_of_the_metrics(name, short_run):
    (table,) = tables(TEXTS[name])
    fields = [field for row in table for field in re.findall(r"`(\w+)`", row[0])]
    lines = (short_run / "metrics.jsonl").read_text().splitlines()
    assert set(fields) == set(json.loads(lines[0]))


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
