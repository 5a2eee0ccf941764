"""benchmarks/learn.py: a model learns to see from what it draws."""

import json
import sys

import pytest

from helpers import run_script


@pytest.mark.slow
def test_a_model_from_random_weights_learns_to_see(tmp_path):
    """It checks itself that nothing held out is trained on."""
    flags = ("--output_dir", tmp_path, "--num_train", 9600, "--num_held_out", 500)
    run_script(sys.executable, "-m", "benchmarks.learn", *flags)
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert scores["held_out"]["all images"]["right"] >= 0.85
    assert scores["held_out"]["all videos"]["right"] >= 0.9
    # No answer is much more frequent than others to the same question.
    num_answers = {"colour": 6, "shape": 3, "place": 4, "count": 4, "motion": 4}
    for question, number in num_answers.items():
        assert scores["held_out"][question]["most"] < 2 / number
    # The same clips with their frames in reverse order: the other answers are right.
    assert scores["reversed"]["all videos"]["right"] >= 0.9
    # Without anything to see, it can't beat always saying the same.
    for group in scores["black"].values():
        assert group["right"] <= group["most"]
