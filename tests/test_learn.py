"""benchmarks/learn.py: what it draws, and in small that a model learns to see from it."""

import json
import subprocess
import sys
from collections import Counter

import av
import numpy as np
import pytest
from conftest import REPO
from PIL import Image

from benchmarks.learn import OPPOSITE, QUESTIONS, draw_held_out, draw_train


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """200 samples to train on, 100 held out: (folder, hashes of both)."""
    folder = tmp_path_factory.mktemp("drawn")
    return folder, draw_train(folder, 200), draw_held_out(folder, 100)


def records_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def media_of(folder, record):
    item = record["messages"][1]["content"][0]
    return folder / item[item["type"]]


def read_clip(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def centre(pixels):
    """Return the mean (x, y) of the pixels that differ from the top left one."""
    y, x = np.nonzero(np.abs(pixels.astype(int) - pixels[0, 0]).max(axis=2) > 60)
    return np.array([x.mean(), y.mean()])


def test_what_is_held_out_is_not_trained_on(drawn, tmp_path):
    _, train, held_out = drawn
    assert len(train) > 300 and len(held_out) > 100 and not train & held_out
    # The same scenes give the same hashes, so a shared picture would be noticed.
    assert draw_train(tmp_path, 20) < train


def test_every_question_is_asked_and_no_answer_is_much_more_frequent(drawn):
    folder, _, _ = drawn
    asked = {kind: Counter() for kind in QUESTIONS}
    for record in records_of(folder, "train"):
        for question, answer in zip(record["messages"][1::2], record["messages"][2::2]):
            text = question["content"][-1]["text"]
            kind = next(kind for kind in QUESTIONS if QUESTIONS[kind] == text)
            asked[kind][answer["content"]] += 1
    assert {kind: len(answers) for kind, answers in asked.items()} == {
        **{"colour": 6, "shape": 3, "place": 4, "count": 4, "motion": 4},
    }
    for answers in asked.values():
        assert max(answers.values()) < 2 * answers.total() / len(answers)


def test_clips_move_as_their_answer_says_and_back_when_reversed(drawn):
    folder, _, _ = drawn
    clips = [r for r in records_of(folder, "held_out") if r["id"].startswith("motion")]
    turned = records_of(folder, "reversed")
    assert [r["id"] for r in turned] == [r["id"] for r in clips] and len(clips) == 20
    ways = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for record, other in zip(clips, turned):
        answer = record["messages"][-1]["content"]
        assert other["messages"][-1]["content"] == OPPOSITE[answer]
        for shown, way in ((record, answer), (other, OPPOSITE[answer])):
            frames = read_clip(media_of(folder, shown))
            assert len(frames) == 4
            moved = centre(frames[-1]) - centre(frames[0])
            assert moved @ ways[way] > 20
            assert np.abs(moved).min() < 2


def test_black_pictures_are_black_and_keep_their_answers(drawn):
    folder, _, _ = drawn
    for record, black in zip(records_of(folder, "held_out"), records_of(folder, "black")):
        assert black["messages"][-1] == record["messages"][-1]
        path = media_of(folder, black)
        pixels = read_clip(path) if path.suffix == ".mp4" else [np.asarray(Image.open(path))]
        assert not np.any(pixels)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_model_from_random_weights_learns_to_see(tmp_path):
    command = [sys.executable, REPO / "benchmarks" / "learn.py", "--output_dir", tmp_path]
    command += ["--num_train", 9600, "--num_held_out", 500]
    subprocess.run([str(part) for part in command], check=True, stdin=subprocess.DEVNULL)
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert scores["held_out"]["all images"]["right"] >= 0.85
    assert scores["held_out"]["all videos"]["right"] >= 0.9
    # The same clips with their frames in reverse order: the other answers are right.
    assert scores["reversed"]["all videos"]["right"] >= 0.9
    # Without anything to see, it can't beat always saying the same.
    for group in scores["black"].values():
        assert group["right"] <= group["most"]
