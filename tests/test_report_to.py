"""--report_to: the metrics arrive where they are sent, and a missing package is known at once."""

import importlib.util
import sys

import pytest

import finetune
from helpers import assistant, call, read_metrics, user, write_data
from util.config import UserError
from util.logutil import MetricsFile


@pytest.fixture
def train(tmp_path):
    """Train two steps with --report_to; return the rows of metrics.jsonl."""
    data = write_data(tmp_path / "d.json", [[user("Hi"), assistant("Hello.")]])
    flags = ("--model_name_or_path", "tiny", "--device", "cpu", "--num_workers", 0)
    flags += ("--train_data", data, "--max_steps", 2, "--output_dir", tmp_path / "out")

    def run(report_to):
        call(finetune, *flags, "--report_to", report_to)
        return read_metrics(tmp_path / "out")

    return run


def test_tensorboard_holds_what_metrics_jsonl_holds(train, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = train("tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "out"))
    events.Reload()
    names = {name for name, value in rows[0].items() if value is not None}
    assert set(events.Tags()["scalars"]) == names == set(rows[0]) - {"mfu"}  # known on GPUs only
    for name in names:
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2]
        values = [scalar.value for scalar in scalars]
        assert values == pytest.approx([row[name] for row in rows], rel=1e-6)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_are_called_as_they_want_it(train, tmp_path, monkeypatch, name):
    (tmp_path / f"{name}.py").write_text(
        "calls = []\n"
        "def init(*, project, name, config):\n    calls.append((name, config['max_steps']))\n"
        "def log(metrics, step):\n    calls.append((step, metrics['loss']))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    rows = train(name)
    expected = [("out", 2), (1, rows[0]["loss"]), (2, rows[1]["loss"])]
    assert sys.modules[name].calls == expected
    monkeypatch.delitem(sys.modules, name)


def test_only_numbers_are_sent(tmp_path):
    sent = []
    file = MetricsFile(tmp_path / "metrics.jsonl", sent.append)
    row = {"global_step": 1, "loss": None, "num_text_tokens_by_rank": [3, 4], "seconds": 0.5}
    file.append(row)
    assert sent == [{"global_step": 1, "seconds": 0.5}]
    assert read_metrics(tmp_path) == [row]


def test_a_missing_package_is_an_error_before_anything_is_made(train, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install trackio"):
        train("trackio")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["init", "log"])
@pytest.mark.parametrize("fails", ["raise ConnectionError('no network')", "raise SystemExit(1)"])
def test_a_package_that_fails_ends_no_run(train, tmp_path, monkeypatch, caplog, when, fails):
    fails = f"    {fails}\n"
    functions = {"init": "    pass\n", "log": "    pass\n", when: fails}
    (tmp_path / "trackio.py").write_text(
        "".join(f"def {name}(*args, **more):\n{body}" for name, body in functions.items())
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    assert len(train("trackio")) == 2
    log = (tmp_path / "out" / "train.log").read_text()
    assert log.count("--report_to fails, and is left out from here on") == 1
    monkeypatch.delitem(sys.modules, "trackio")


def test_what_is_no_number_in_json_is_null(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").append({"eval_loss": float("nan"), "seconds": 1.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"eval_loss": null, "seconds": 1.5}\n'
