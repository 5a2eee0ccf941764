"""check_data.py finds what is wrong, all of it, and nothing else."""

import json
import re
import sys

import pytest
from conftest import assistant, image, make_image, make_video, text, user, video
from test_end_to_end import run_script

from check_data import main
from util import config

GOOD = [user("Hi"), assistant("Hello.")]


def item(**keys):
    return {"messages": [user(keys), assistant("x")]}


def turns(value, speaker="human", **keys):
    messages = [{"from": speaker, "value": value}, {"from": "gpt", "value": "x"}]
    return {"conversations": messages, **keys}


@pytest.fixture
def check_data(monkeypatch, capsys):
    """Run check_data.py in this process and return what it printed; `code` is its exit code."""

    def run(*flags, code=0):
        argv = ["check_data.py", "--model_name_or_path", "tiny", "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        if code:
            with pytest.raises(SystemExit) as info:
                config.run_main(main)
            assert str(info.value).startswith("error: ") and code == 1
        else:
            config.run_main(main)
        return capsys.readouterr().out

    return run


@pytest.fixture
def faults(tmp_path):
    """40 records, each wrong in a way of its own."""
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder").mkdir()
    make_image(tmp_path / "long.png", 10, 2100)
    make_image(tmp_path / "cut.png", 300, 300)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    make_video(tmp_path / "cut.mp4", 30, 64, 64)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:600])

    def said(role, content):
        return {"messages": [{"role": role, "content": content}, assistant("x")]}

    return [
        *(3, None, "text", [], {}, {"text": "a"}, {"messages": "a"}, {"messages": []}),
        *({"conversations": []}, {"conversations": {"from": "human"}}, {"messages": [3]}),
        *({"conversations": [3]}, said("bot", "a"), said(None, "a"), said("user", None)),
        *(said("user", 3), said("user", [3]), said("user", [None]), said("user", ["a"])),
        *({"messages": [user("a")]}, {"messages": [*GOOD, {"role": "system", "content": "a"}]}),
        *(turns("a", speaker="bot"), turns(None), turns("<image>"), turns("a", image="a.png")),
        turns("<video><video>", video="a.mp4"),
        *(item(type="audio", audio="a"), item(type="image"), item(type="text")),
        *(item(type="image", image="none.jpg"), item(type="video", video="none.mp4")),
        *(item(type="image", image="text.jpg"), item(type="video", video="text.mp4")),
        *(item(type="image", image="empty.jpg"), item(type="image", image="folder")),
        *(item(type="image", image="long.png"), item(type="image", image="cut.png")),
        item(type="video", video="cut.mp4"),
        {"messages": [user("a <|im_end|>"), assistant("x")]},
        {"messages": [user("word " * 2000), assistant("x")]},
    ]


def test_forty_faults_of_forty_kinds_are_found_and_nothing_else(faults, tmp_path):
    assert len(faults) == 40
    picture, clip = (
        make_image(tmp_path / "a.png", 60, 60),
        make_video(tmp_path / "a.mp4", 8, 64, 64),
    )
    good = [
        GOOD,
        [user(image(picture), text("What?")), assistant("x")],
        [user(video(clip), text("What?")), assistant("y")],
    ]
    records, bad = [], []
    for i, fault in enumerate(faults):
        records.append({"messages": good[i % 3], "id": i})
        bad.append(len(records))
        records.append(fault)
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = tmp_path / "data.json"
    printed = run_script("check_data.py", "--train_data", data, "--decode", code=1)
    problems = re.findall(rf"^problem: {data}: sample (\d+): (.+)$", printed, re.M)
    assert [int(number) for number, _ in sorted(problems, key=lambda p: int(p[0]))] == bad
    assert printed.splitlines()[-1].startswith("error: 40 problems: ")
    assert "Traceback" not in printed
    assert len({re.sub(r"\d+", "", reason) for _, reason in problems}) >= 25
    assert "duplicates: 37" in printed  # the three good ones, again and again


def test_without_decoding_only_what_headers_tell_is_found(check_data, tmp_path, faults):
    cut = item(type="image", image="cut.png")
    (tmp_path / "data.json").write_text(json.dumps([{"messages": GOOD}, cut]))
    printed = check_data("--train_data", tmp_path / "data.json")
    assert "all good" in printed
    flags = ("--train_data", tmp_path / "data.json", "--decode")
    assert "cut.png" in check_data(*flags, code=1)


def test_held_out_data_are_checked_too(check_data, tmp_path):
    lines = [json.dumps({"messages": m}) for m in (GOOD, [user("no answer")])]
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines))
    flags = ("--eval_data", tmp_path / "held_out.jsonl")
    printed = check_data(*flags, code=1)
    assert f"problem: {tmp_path}/held_out.jsonl: line 2: no assistant message" in printed


def test_it_prints_lengths_shares_duplicates_and_one_sample(check_data, tmp_path):
    lines = [json.dumps({"messages": GOOD, "id": i}) for i in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    printed = check_data("--train_data", tmp_path / "data.jsonl")
    assert "duplicates: 2" in printed
    assert f"{tmp_path}/data.jsonl: line 3 repeats {tmp_path}/data.jsonl: line 1" in printed
    assert "length in tokens" in printed and "100.0 % text" in printed
    assert "[[Hello.<|im_end|>]]" in printed
