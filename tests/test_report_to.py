"""--report_to: the metrics arrive where they are sent, and a missing package is known at once."""

import importlib.util
import sys
from unittest.mock import ANY, Mock
from unittest.mock import call as called

import pytest

import finetune
from helpers import assistant, call, read_metrics, tiny_config, user, write_data
from util.config import UserError
from util.logutil import MetricsFile, open_reporter


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


@pytest.fixture
def package(monkeypatch):
    """What stands in for wandb and for trackio."""
    package = Mock(__spec__="found")
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, package)
    return package


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
def test_wandb_and_trackio_are_called_as_they_want_it(train, package, name):
    rows = train(name)
    init, *logs = package.mock_calls
    assert init == called.init(project="finetune-Qwen2-VL", name="out", config=ANY)
    assert init.kwargs["config"]["max_steps"] == 2
    assert logs == [called.log(ANY, step=step) for step in (1, 2)]
    assert [log.args[0]["loss"] for log in logs] == [row["loss"] for row in rows]


def test_only_numbers_are_sent_and_what_json_has_no_number_for_is_null(tmp_path):
    sent = []
    file = MetricsFile(tmp_path / "metrics.jsonl", sent.append)
    row = {"global_step": 1, "loss": None, "num_text_tokens_by_rank": [3, 4], "seconds": 0.5}
    file.append(row | {"eval_loss": float("nan")})
    assert sent == [{"global_step": 1, "seconds": 0.5}]
    assert read_metrics(tmp_path) == [row | {"eval_loss": None}]


def test_a_missing_package_is_an_error_before_anything_is_made(train, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install trackio"):
        train("trackio")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["init", "log"])
@pytest.mark.parametrize("error", [ConnectionError("no network"), SystemExit(1)])
def test_a_package_that_fails_ends_no_run(package, tmp_path, caplog, when, error):
    getattr(package, when).side_effect = error
    report = open_reporter(tiny_config(report_to="trackio"), tmp_path)
    file = MetricsFile(tmp_path / "metrics.jsonl", report)
    rows = [{"global_step": step, "loss": 1.0} for step in (1, 2)]
    for row in rows:
        file.append(row)
    assert read_metrics(tmp_path) == rows
    assert caplog.text.count("--report_to fails, and is left out from here on") == 1
