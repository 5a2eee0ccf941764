"""Scores, the answers that the test scripts save, and the page that compare.py makes of them."""

import base64
import copy
import io
import json
import logging
import math
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, GenerationConfig

import compare
import helpers
import test_on_official_model
import test_on_trained_model_by_us
import zoo
from helpers import assistant, call, image, make_image, make_video, text, user, video
from util.config import UserError, make_visible
from util.logutil import setup_logging
from util.media.source import describe
from util.model.inputs import InputBuilder
from util.run import run_main
from util.tools import scores
from util.tools.generate import Prompt, generate, print_answer
from util.tools.page import mark_differences
from util.tools.scores import character_error_rate, edit_distance, exact_match, load_metric

TEXT = st.text("ab \n\u4f60\u597d\U0001f600", max_size=12)

# ------------------------------------------------------------------ scores


def slow_edit_distance(first, second):
    """The textbook recurrence, cell by cell."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first):
        above, row = row, [i + 1]
        for k, b in enumerate(second):
            row.append(min(above[k] + (a != b), above[k + 1] + 1, row[k] + 1))
    return row[-1]


@given(TEXT, TEXT)
def test_edit_distance_is_the_textbook_one(first, second):
    assert edit_distance(first, second) == slow_edit_distance(first, second)


@given(TEXT, TEXT)
def test_no_errors_exactly_where_the_match_is_exact(answer, reference):
    assert (character_error_rate(answer, reference) == 0) == bool(exact_match(answer, reference))


def test_scores_by_hand():
    assert edit_distance("kitten", "sitting") == 3
    assert character_error_rate("\u4e00\u53ea\u732b", "\u4e00\u53ea\u72d7") == pytest.approx(1 / 3)
    assert exact_match(" yes\n", "yes") == 1 and exact_match("Yes", "yes") == 0
    found = scores.score_all(
        ["ab", "xy", "?"], ["ab", "xyzzzz", None], lambda a, r: len(r) - len(a)
    )
    # 4 edits over 8 characters, not the mean of 0 and 4/6.
    expected = {"num_scored": 2, "num_exact": 1, "character_error_rate": 0.5, "metric": 2.0}
    assert found == expected
    assert scores.score_all(["a"], [None], None)["character_error_rate"] is None


def test_own_metric(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def first(answer, reference):\n    return answer[:1] == reference[:1]\n"
        "def broken(answer, reference):\n    return 1 / 0\n"
        "def nan(answer, reference):\n    return float('nan')\n"
        "number = 3\n"
        "calls = []\n"
        "def counted(answer, reference):\n    calls.append(answer)\n    return len(calls)\n"
    )
    assert load_metric(None) is None
    assert load_metric(f"{path}:first")("abc", "axe") == 1.0
    counted = load_metric(f"{path}:counted")
    # Asked again, it is not called again: it may be slow.
    assert [counted("a", "b"), counted("a", "b"), counted("a", "c")] == [1, 1, 2]
    for name, words in {"broken": "ZeroDivisionError", "nan": "returned nan"}.items():
        with pytest.raises(UserError, match=words):
            load_metric(f"{path}:{name}")("a", "b")
    for name in ("number", "missing", ""):
        with pytest.raises(UserError, match="has no function"):
            load_metric(f"{path}:{name}")
    for name in (str(path), "nowhere.py:first", "first"):
        with pytest.raises(UserError, match=r"path\.py:function"):
            load_metric(name)
    path = tmp_path / "other.py"
    path.write_text("import nowhere_to_be_found")
    with pytest.raises(UserError, match="nowhere_to_be_found"):
        load_metric(f"{path}:first")


# ------------------------------------------------------------------ marked words


@given(TEXT, TEXT)
def test_marks_lose_nothing_and_what_is_unmarked_is_common(first, second):
    pieces = mark_differences(first, second)
    for side, whole in zip(pieces, (first, second)):
        assert "".join(part for part, _ in side) == make_visible(whole)
    kept = [[part for part, differs in side if not differs] for side in pieces]
    assert "".join(kept[0]) == "".join(kept[1])
    assert any(differs for side in pieces for _, differs in side) == (first != second)


def test_marks_go_by_words_and_by_chinese_characters():
    first, second = mark_differences("A red cat sits.", "A blue cat sat.")
    assert [part for part, differs in first if differs] == ["red", "sits"]
    assert [part for part, differs in second if differs] == ["blue", "sat"]
    first, second = mark_differences(
        "\u684c\u4e0a\u6709\u7ea2\u8272\u7684\u676f\u5b50",
        "\u684c\u4e0a\u6709\u84dd\u8272\u7684\u676f\u5b50",
    )
    assert [part for part, differs in first if differs] == ["\u7ea2"]
    assert [part for part, differs in second if differs] == ["\u84dd"]


def test_answers_that_repeat_themselves_are_marked_in_no_time():
    started = time.perf_counter()
    mark_differences("a b " * 1500, "b c " * 1500)
    mark_differences("\u5f20" * 3000, "\u5f20" * 2000 + "\u738b" * 500)
    assert time.perf_counter() - started < 20
    assert mark_differences("a b " * 500, "a b " * 500)[0] == [("a b " * 500, False)]
    words = [str(i) for i in range(500)]
    first, second = mark_differences(" ".join(words), " ".join([*words[:99], "x", *words[99:]]))
    assert all(not differs for text, differs in first if text != " ")
    assert "".join(text for text, differs in second if differs).split() == ["x"]


def test_what_cannot_be_seen_is_shown():
    assert make_visible("a\x07b\u202ec\td\ne") == "a\\x07b\\u202ec\td\ne"
    assert make_visible("a\n\n\n\nb") == "a\u21b5\u21b5\u21b5\u21b5\nb"


def test_nothing_that_is_printed_gives_orders_to_the_terminal(capsys, tmp_path):
    clear = "\x1b[2J\x9b2J\r\udcff"
    prompt = Prompt(clear, [user(image(clear), text(clear))], clear)
    print_answer(prompt, clear)

    def fail():
        raise UserError(f"{clear} is wrong")

    with pytest.raises(SystemExit) as info:
        run_main(fail)
    setup_logging(tmp_path)
    logging.getLogger("finetune").warning(f"left out   {clear}")
    printed = capsys.readouterr()
    for shown in (printed.out, printed.err, info.value.code, (tmp_path / "train.log").read_text()):
        assert r"\x1b[2J\x9b2J\r\udcff" in shown
        assert not re.search("[\x1b\x9b\r\udcff]", shown)
    assert printed.out.count(r"\x1b") == 5 and describe("a\n\x1b.png") == r"a\n\x1b.png"


def test_a_model_folder_decides_nothing_of_an_answer_but_its_end(tiny_folder):
    encoder, model = helpers.encoder_for(tiny_folder), helpers.plain_model(tiny_folder)
    build_inputs = InputBuilder(helpers.processor_for(tiny_folder), "sdpa", helpers.CPU)
    samples = [encoder.encode_prompt([user(question)]) for question in ("Hi", "What is it?")]
    expected = generate(model, encoder, build_inputs, samples, 4)
    for odd in (
        {"num_return_sequences": 3, "num_beams": 3},
        {"max_length": 1, "repetition_penalty": 9.0, "suppress_tokens": list(range(900))},
        {"eos_token_id": [-1, 10**12, "a"], "pad_token_id": -7},
    ):
        model.generation_config = config = GenerationConfig(**odd)
        assert generate(model, encoder, build_inputs, samples, 4) == expected
        assert model.generation_config is config


# ------------------------------------------------------------------ from models to the page


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """A folder with data, and a run in it whose model always repeats itself: (folder, run)."""
    folder = tmp_path_factory.mktemp("compare")
    picture = make_image(folder / "picture.png", 90, 120)
    make_video(folder / "clip.mp4", 8, 64, 96)
    helpers.write_data(
        folder / "data.json",
        [
            [user(image(picture), text("What is it?")), assistant("\u4e00\u53ea\u732b")],
            [user(video("clip.mp4"), text("What moves?"))],
            [user("Hello?"), assistant("Hello.")],
        ],
    )
    output_dir = folder / "run"
    model = helpers.plain_model(tiny_folder)
    # All logits equal: the first token is answered to everything, unlike the base model.
    model.model.language_model.norm.weight.data.zero_()
    model.save_pretrained(output_dir)
    AutoProcessor.from_pretrained(tiny_folder).save_pretrained(output_dir)
    lines = [{"global_step": i + 1, "loss": 3 / (i + 1)} for i in range(30)]
    lines += [{"global_step": 30, "eval_loss": 0.5}, {"global_step": 31, "loss": None}]
    (output_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, output_dir


@pytest.fixture(scope="module")
def answers(run):
    """The files that both test scripts save, run from the folder of the data: (base, trained)."""
    folder, output_dir = run
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        flags = ("--device", "cpu", "--prompts", "data.json", "--max_new_tokens", 6, "--save")
        call(test_on_official_model, "--model_name_or_path", "tiny", *flags, "b.json")
        flags = (*flags, folder / "new" / "t.json")
        call(test_on_trained_model_by_us, "--model_dir", output_dir, *flags)
    return folder / "b.json", folder / "new" / "t.json"


@pytest.fixture
def make_page(monkeypatch, tmp_path, run):
    """Call compare.main() in the folder of the data, with flags, and with files of answers or what
    they hold; return the page.
    """

    def write(i, saved):
        path = tmp_path / f"{i}<img src=x>.json"
        path.write_text(json.dumps(saved))
        return path

    def make(*arguments):
        arguments = [write(i, a) if isinstance(a, dict) else a for i, a in enumerate(arguments)]
        monkeypatch.chdir(run[0])
        call(compare, *arguments, "--output", tmp_path / "page.html")
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return make


def test_saved_answers(answers, run):
    base, trained = (json.loads(path.read_text(encoding="utf-8")) for path in answers)
    assert base["model"] == "tiny" and trained["model"] == str(run[1])
    # No machine path where the media lie below the current folder.
    assert base["metrics"] is None and trained["metrics"] == "run/metrics.jsonl"
    assert [row["id"] for row in base["answers"]] == ["0", "1", "2"]
    assert base["answers"][0]["messages"][0]["content"][0] == image("picture.png")
    assert base["answers"][1]["messages"][0]["content"][0] == video("clip.mp4")
    references = [row["reference"] for row in trained["answers"]]
    assert references == ["\u4e00\u53ea\u732b", None, "Hello."]
    assert all(row["seconds"] > 0 and isinstance(row["answer"], str) for row in base["answers"])
    assert [row["answer"] for row in base["answers"]] != [r["answer"] for r in trained["answers"]]
    settings = base["settings"]
    assert settings["max_new_tokens"] == 6 and settings["max_pixels"] == 50176
    assert settings["device"] == "cpu" and settings["dtype"] == "float32" and settings["torch"]


def test_own_metric_in_the_test_scripts(run, monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def seven(answer, reference):\n    return 7")
    monkeypatch.chdir(run[0])
    flags = ("--model_name_or_path", "tiny", "--device", "cpu", "--max_new_tokens", 2)
    flags = (*flags, "--prompts", "data.json", "--metric", f"{tmp_path}/mine.py:seven")
    call(test_on_official_model, *flags)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"0 of 2 answers .* character error rate \d+\.\d%; --metric 7\.0000", last)


def test_the_page_is_whole_and_alone(answers, make_page):
    page = make_page(*answers)
    assert page.count("<article") == 3
    assert page.count("data:image/jpeg;base64,") == 2  # the picture, and a frame of the clip
    assert page.count("data:video/mp4;base64,") == 1
    assert "What moves?" in page and "\u4e00\u53ea\u732b" in page
    assert "0 of 2" in page and page.count("<polyline") == 3
    # Nothing is fetched: every address in the page is a data URI.
    assert re.findall(r'\b(?:src|href|poster)="(?!data:)', page) == []
    assert "http:" not in page and "https:" not in page


def edited(path, *changes):
    """Return the saved answers at `path` with `answer` or `reference` of some prompts changed."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    for i, change in changes:
        saved["answers"][i].update(change)
    return saved


def groups(page):
    return re.findall(r'data-groups="([^"]*)"', page)


def test_better_and_worse(answers, make_page, tmp_path):
    exact, wrong = {"answer": "Hello."}, {"answer": "Good bye."}
    first = edited(answers[0], (0, wrong), (1, wrong), (2, exact))
    second = edited(answers[0], (0, exact), (1, exact), (2, wrong))
    page = make_page(first, second)
    assert groups(page) == ["all changed better", "all changed", "all changed worse"]
    assert "Not only the models differ" not in page
    assert groups(make_page(first, first)) == ["all unchanged"] * 3
    (tmp_path / "mine.py").write_text("def length(answer, reference):\n    return len(answer)")
    page = make_page(first, second, "--metric", f"{tmp_path}/mine.py:length")
    assert groups(page) == ["all changed worse", "all changed", "all changed better"]
    assert "metric 6.000" in page and "metric 9.000" in page


def test_other_settings_are_named(answers, make_page):
    saved = edited(answers[0])
    saved["settings"]["max_pixels"] = 1
    assert "Not only the models differ: max_pixels." in make_page(answers[0], saved)


# U+202E turns the direction of what follows it.
HOSTILE = "\u202e</script></style></p><img src=x onerror=alert(1)>\"'`{{ 7 * 7 }}<!--\ud800"


def test_hostile_text_stays_text(answers, make_page):
    before, hostile = make_page(*answers), []
    for i, path in enumerate(answers):
        saved = edited(path)
        saved["model"] = saved["metrics"] = HOSTILE
        saved["settings"] = {HOSTILE: HOSTILE + str(i)}
        for row in saved["answers"]:
            row |= {"id": HOSTILE, "reference": HOSTILE, "answer": HOSTILE + row["answer"]}
            row["messages"].append(assistant(HOSTILE))
        saved["answers"][0]["messages"][0]["content"][0]["image"] = HOSTILE
        hostile.append(saved)
    page = make_page(*hostile)
    assert page.count("onerror=alert") > 20 and "<img src=x" not in page
    assert page.count("{{ 7 * 7 }}") > 20
    assert "\u202e" not in page
    for tag in ("<script", "</script", "<style", "</style", "<!--"):
        assert page.count(tag) == before.count(tag)


def test_missing_media_are_named(answers, make_page, capsys):
    saved = edited(answers[0])
    saved["answers"][0]["messages"][0]["content"][0]["image"] = "nowhere/gone.png"
    page = make_page(saved, saved)
    assert 'class="lost"' in page and "gone.png" in page and "cannot be shown" in page
    assert "nowhere/gone.png" in capsys.readouterr().err
    assert 'class="lost"' not in make_page(*answers)


def test_every_source_that_the_data_may_have_is_shown(answers, make_page, tmp_path, capsys):
    picture = zoo.encode_image(zoo.smooth(30, 40), "PNG")
    data = "data:image/png;base64," + base64.b64encode(picture).decode()
    frames = [make_image(tmp_path / f"{i}.png", 60, 80, i) for i in range(6)]
    url = "https://example.com/cat.jpg"
    saved = edited(answers[0], (0, {"messages": [user(image(data), video(frames), image(url))]}))
    page = make_page(saved, saved)
    figures = re.findall(r"<figure.*?</figure>", page, re.S)
    assert "<img" in figures[0] and "<figcaption>data:image/png</figcaption>" in figures[0]
    assert "<img" in figures[1] and "0.png to 5.png &ndash; 3 of 6 frames" in figures[1]
    still = base64.b64decode(re.search(r"base64,([^\"]*)", figures[1])[1])
    assert Image.open(io.BytesIO(still)).size == (240, 60)
    assert "not fetched from the network" in figures[2] and "cat.jpg" in figures[2]
    printed = capsys.readouterr().err
    assert url in printed and "base64" not in printed
    # A clip in the data itself is shown by a frame.
    clip = make_video(tmp_path / "a.mp4", 8, 64, 96)
    data = "data:video/mp4;base64," + base64.b64encode(Path(clip).read_bytes()).decode()
    saved = edited(answers[0], (0, {"messages": [user(video(data))]}))
    assert "one frame" in re.findall(r"<figure.*?</figure>", make_page(saved, saved), re.S)[0]


def test_media_are_found_beside_the_answers(answers, monkeypatch, tmp_path, run):
    monkeypatch.chdir(tmp_path)
    call(compare, answers[0], answers[0])
    assert 'class="lost"' not in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_clips_that_cannot_be_embedded_show_a_frame(answers, make_page, monkeypatch):
    monkeypatch.setattr("util.tools.page.MAX_CLIP_BYTES", 10)
    page = make_page(*answers)
    assert "<video" not in page and "not embedded" in page
    assert page.count("data:image/jpeg;base64,") == 2


def test_a_page_holds_so_many_bytes_of_clips_and_no_more(answers, make_page, monkeypatch, capsys):
    saved = edited(answers[0], (0, {"messages": [user(*[video("clip.mp4")] * 3)]}))
    size = (answers[0].parent / "clip.mp4").stat().st_size
    monkeypatch.setattr("util.tools.page.MAX_MEDIA_BYTES", 2 * size)
    page = make_page(saved, saved)
    assert page.count("<video") == 2 and page.count("MiB of clips at most") == 2
    assert capsys.readouterr().err.count("clip.mp4: one frame: the page holds") == 2


def test_the_answers_are_not_overwritten(answers):
    with pytest.raises(UserError, match="would overwrite what"):
        call(compare, *answers, "--output", answers[1])


def test_other_prompts_are_an_error_that_names_them(answers, make_page):
    def message(saved):
        with pytest.raises(UserError, match="different prompts") as info:
            make_page(answers[0], saved)
        return str(info.value)

    assert "number 1 (1)" in message(edited(answers[0], (1, {"messages": [user("Other?")]})))
    assert "number 2 (2 against z)" in message(edited(answers[0], (2, {"id": "z"})))
    assert "number 0 (0)" in message(edited(answers[0], (0, {"reference": None})))
    fewer = edited(answers[0])
    del fewer["answers"][2]
    assert "number 2 (2 against nothing)" in message(fewer)
    for i, row in enumerate(copy.deepcopy(fewer["answers"] * 5)):
        fewer["answers"].append(row | {"id": f"new {i}"})
    assert "and 5 more" in message(fewer) or "and 6 more" in message(fewer)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"answers": 3}', "[" * 100_000, "\ufffd"),
        *({"answers": []}, {"answers": [{}]}, {"metrics": [3]}, {"metrics": 7}),
        *({"seconds": math.inf}, {"seconds": math.nan}, {"seconds": 10**400}),
        {"answer": 100_001 * "a"},
    ],
)
def test_other_files_are_an_error(answers, make_page, tmp_path, content):
    """Texts, and saved answers with something else in them or in their first row."""
    if isinstance(content, dict):
        saved = edited(answers[0])
        (saved if content.keys() <= saved.keys() else saved["answers"][0]).update(content)
        content = json.dumps(saved)
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="is not a file that --save"):
        make_page(answers[0], tmp_path / "x.json")


def test_a_file_that_is_not_there_is_an_error(answers, make_page, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        make_page(answers[0], tmp_path / "nowhere.json")


def test_broken_metrics_cost_only_the_curve(answers, make_page, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    paths = ["/dev/zero", tmp_path / "pipe", "x" * 5000]
    contents = ["{broken", '{"global_step": null, "loss": 1}', "3", "[" * 100_000]
    for content in [*contents, '{"global_step": 1e999, "loss": 1}']:
        paths.append(tmp_path / str(len(paths)))
        paths[-1].write_text(content)
    saved = edited(answers[1])
    for path in paths:
        page = make_page(answers[0], saved | {"metrics": str(path)})
        assert "<polyline" not in page and page.count("<article") == 3
        assert "no loss curve" in capsys.readouterr().err
    saved["metrics"] = str(tmp_path / "metrics.jsonl")
    for points in ([(10**300, 1), (1, 1.7e308), (2, math.inf)], [(1, 0.0)], [(0, math.nan)]):
        lines = [json.dumps({"global_step": step, "loss": loss}) for step, loss in points]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        page = make_page(answers[0], saved)
        assert len(points) == 1 or "<polyline" not in page


def test_compare_needs_no_gpu_and_no_model():
    source = (helpers.REPO / "compare.py").read_text(encoding="utf-8")
    assert "util.model" not in source and "generate" not in source.split('"""')[2]
