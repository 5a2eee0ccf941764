"""Every mistake gets one message that says where it is and what to do; nothing is trained."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

import finetune
import helpers
import util.run
from helpers import assistant, call, image, make_image, read_metrics, user, video, write_data
from util.config import UserError
from util.data import index, workers
from util.data.files import Records
from util.data.sample import find_file

GOOD = [user("Hi"), assistant("Hello.")]


def about(content) -> list[dict]:
    """Return a conversation about an item, or a text."""
    return [user(content), assistant("x")]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Call finetune.main() for a step, in this process, with conversations or a file of data."""

    def run(data, *flags):
        monkeypatch.chdir(tmp_path)
        data = write_data(tmp_path / "d.json", data) if isinstance(data, list) else data
        more = ("--num_workers", 0, "--max_steps", 1, "--output_dir", tmp_path / "out", *flags)
        call(finetune, "--model_name_or_path", "tiny", "--train_data", data, *more)

    return run


def fails(train, data, *flags):
    with pytest.raises(UserError) as info:
        train(data, *flags)
    assert not any(word in str(info.value) for word in ("Traceback", "Error("))
    return str(info.value)


def has(message, *words):
    assert all(word in message for word in words), message


def make_cut_image(path):
    """Write a picture that only decoding finds to be cut off."""
    make_image(path, 300, 300)
    path.write_bytes(path.read_bytes()[:2000])
    return str(path)


def test_all_problems_are_told_at_once(train, tmp_path):
    data = [GOOD, about(image("no/such.jpg")), GOOD, about("word " * 200)]
    message = fails(train, data, "--max_tokens", 100)
    has(message, "sample 1: message 0", "no such file", str(tmp_path / "no/such.jpg"))
    has(message, "sample 3: has", "--max_tokens 100", "--max_pixels", "--video_fps", "shorten")
    assert "sample 0" not in message and "sample 2" not in message


@pytest.fixture
def twelve(tmp_path) -> str:
    """A data file of twelve pictures, 0.png to 11.png."""
    paths = [make_image(tmp_path / f"{i}.png", 90, 90, i) for i in range(12)]
    return write_data(tmp_path / "twelve.json", [about(image(path)) for path in paths])


def test_a_bad_sample_in_mid_run_costs_no_step_that_was_done(train, tmp_path, twelve, tiny_folder):
    prepared = helpers.set_up(helpers.tiny_config(train_data=[twelve], batch_size=4), tiny_folder)
    number = prepared.data.plan.step(2).samples[1]
    broken = tmp_path / f"{number}.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    flags = ("--max_steps", 5, "--batch_size", 4)
    message = fails(train, twelve, *flags)
    has(message, f"sample {number}: message 0: {broken}: ", "image", "--decode")
    has(message, "use --on_bad_sample skip", "--resume_from")
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    train(twelve, *flags, "--resume_from", "latest", "--on_bad_sample", "skip")
    rows = read_metrics(tmp_path / "out")
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["num_bad_samples"] for row in rows][:3] == [0, 0, 1]


@pytest.mark.parametrize("num_samples", [1, 300])
def test_a_decoder_that_does_not_return_ends_the_run(train, tmp_path, monkeypatch, num_samples):
    """In training, and while samples are measured, if those are so many that processes do it."""
    path = make_image(tmp_path / "a.png", 60, 60)
    data = [GOOD] * (num_samples - 1) + [about(image(path))]
    name = "load_media" if num_samples == 1 else "probe_media"
    monkeypatch.setattr(f"util.data.sample.{name}", lambda *_: time.sleep(60))
    monkeypatch.setattr(workers, "READ_SECONDS", 3)
    start = time.monotonic()
    with pytest.raises(SystemExit) as info:
        util.run.run_main(lambda: train(data, "--num_workers", 1))
    has(info.value.code, "error: not read within", f"d.json: sample {num_samples - 1}")
    assert time.monotonic() - start < 40


def test_a_picture_that_changed_since_it_was_indexed_is_refused(train, tmp_path):
    data = [about(image(make_image(tmp_path / "a.png", 60, 60)))]
    train(data)
    make_image(tmp_path / "a.png", 160, 160)
    for flags in ((), ("--on_bad_sample", "skip")):  # left out, nothing would be left to train
        message = fails(train, data, "--output_dir", tmp_path / f"out{len(flags)}", *flags)
        has(message, "sample 0", "have changed", "index-")


def test_bad_samples_are_left_out_and_counted(train, tmp_path):
    bad = [[user("no answer")], about(image("missing.jpg"))]
    broken = about(image(make_cut_image(tmp_path / "cut.png")))
    flags = ("--on_bad_sample", "skip", "--max_tokens", 900, "--num_workers", 1)
    train([GOOD, *bad, [user("word " * 500)], broken, GOOD], *flags)
    log = (tmp_path / "out" / "train.log").read_text()
    for place in ("sample 1: no assistant", "sample 2: message 0", "sample 3: ", "sample 4: mess"):
        assert place in log, log
    counted = "left out   altogether: 3 samples before the first step, and 1 in the steps"
    assert counted in log.splitlines()[-2], log
    before, metrics = read_metrics(tmp_path / "out")
    assert before == {"global_step": 0, "num_bad_samples": 3}
    assert (metrics["num_samples"], metrics["num_bad_samples"]) == (2, 1)
    flags = ("--on_bad_sample", "skip", "--output_dir", tmp_path / "out2")
    has(fails(train, bad, *flags), "no sample is left", "sample 1")


def test_held_out_samples_that_cannot_be_decoded_are_left_out_and_counted(train, tmp_path):
    """Also those that are asked about; what is too long for the plan is not asked about."""
    cut = make_cut_image(tmp_path / "cut.png")
    held_out = [about("word " * 500), about(image(cut)), GOOD]
    eval_data = write_data(tmp_path / "e.json", held_out)
    flags = ("--eval_data", eval_data, "--eval_generate", 9, "--max_tokens", 900)
    train([GOOD], *flags, "--on_bad_sample", "skip")
    log = (tmp_path / "out" / "train.log").read_text()
    assert log.count(f"{eval_data}: sample 1: message 0: {cut}") == 4  # two times two
    rows = [row for row in read_metrics(tmp_path / "out") if "eval_loss" in row]
    assert [row["num_bad_eval_samples"] for row in rows] == [1, 1]
    assert all("eval_exact_match" in row for row in rows)
    shutil.rmtree(tmp_path / "out")
    write_data(tmp_path / "e.json", held_out[1:])
    has(fails(train, [GOOD], *flags), "cut.png", "--on_bad_sample skip")


def test_an_adapter_is_no_model_to_train(train, tmp_path):
    (tmp_path / "adapter_config.json").touch()
    message = fails(train, [GOOD], "--model_name_or_path", tmp_path)
    has(message, "is a LoRA adapter", "python -m util.tools.merge_adapter")


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"batch_size": 0}, "--batch_size 0"),
        ({"seed": 2**64}, "--seed 18446744073709551616"),
        ({"eval_generate": 5}, "needs --eval_data"),
        ({"metric": "a.py:b"}, "needs --eval_generate"),
        ({"learning_rate": -1.0}, "--learning_rate"),
        ({"learning_rate": float("nan")}, "--learning_rate nan"),
        ({"learning_rate": float("inf")}, "--learning_rate inf"),
        ({"weight_decay": float("nan")}, "--weight_decay nan"),
        ({"warmup_ratio": 2.0}, "--warmup_ratio"),
        ({"num_workers": -1}, "--num_workers"),
        ({"min_pixels": 10**9}, "--min_pixels"),
    ],
)
def test_flags_that_make_no_sense(flags, words):
    with pytest.raises(UserError, match=words):
        helpers.tiny_config(**{"max_pixels": 50176} | flags)


def test_unknown_flag_ends_the_program_with_its_name(train, capsys):
    for flag in ("--batchsize", "--batch"):  # no abbreviations either
        with pytest.raises(SystemExit) as info:
            train([GOOD], flag, "3")
        assert info.value.code == 2 and flag in capsys.readouterr().err


def test_output_folder_that_is_not_empty(train, tmp_path):
    (tmp_path / "out").mkdir()
    train([GOOD])
    before = sorted((tmp_path / "out").iterdir())
    has(fails(train, [GOOD]), "--output_dir", "not an empty folder")
    assert sorted((tmp_path / "out").iterdir()) == before


def test_a_crash_is_told_and_ends_the_workers(train, monkeypatch, capsys):
    """That it ends the process too, where nobody reads what it tells, is in test_terminals.py."""

    def crash(*_):
        raise RuntimeError("CUDA error: an illegal access")

    monkeypatch.setattr(finetune, "cross_entropy_sum", crash)
    with pytest.raises(SystemExit) as info:
        util.run.run_main(lambda: train([GOOD] * 5, "--num_workers", 2))
    assert info.value.code == 1 and "RuntimeError: CUDA error" in capsys.readouterr().err
    assert not multiprocessing.active_children()


def test_what_a_worker_finds_to_be_wrong_is_told_in_one_line(train, tmp_path, capfd):
    cut = make_cut_image(tmp_path / "cut.png")
    with pytest.raises(SystemExit) as info:
        util.run.run_main(lambda: train([about(image(cut))] * 5, "--num_workers", 2))
    place = f"error: {tmp_path}/d.json: sample .: message 0: {cut}: "
    assert re.match(place, info.value.code) and "\n" not in info.value.code
    assert "Traceback" not in capfd.readouterr().err


def test_media_are_found_from_the_current_folder_first(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    make_image(tmp_path / "data" / "a.png", 60, 60)
    monkeypatch.chdir(tmp_path)
    assert find_file("a.png", tmp_path / "data") == str(tmp_path / "data" / "a.png")
    make_image(tmp_path / "a.png", 60, 60)
    assert find_file("a.png", tmp_path / "data") == "a.png"


def test_bom_and_chinese_in_the_data_file(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"messages": [user("你好")]}], ensure_ascii=False), "utf-8-sig")
    assert Records([str(path)])[0]["messages"][0]["content"] == "你好"


def test_a_step_without_any_sample_stops_the_run(train, tmp_path):
    """As after the disk with the media has gone: nothing was trained, and nobody was told."""
    bad = [about(image(make_cut_image(tmp_path / f"{i}.png"))) for i in range(4)]
    message = fails(train, bad, "--on_bad_sample", "skip")
    has(message, "none of the 4 samples of a step can be read", "0: message 0")


def test_a_metric_that_exits_is_an_error(train, tmp_path):
    (tmp_path / "m.py").write_text("import sys\nsys.exit(0)\n")
    flags = ("--eval_data", write_data(tmp_path / "e.json", [GOOD]), "--eval_generate", 1)
    message = fails(train, [GOOD], *flags, "--metric", f"{tmp_path}/m.py:f")
    has(message, "fails: SystemExit")


# ------------------------------------------------------------------ what changes during a run


def in_first_step(monkeypatch, do):
    """Call `do` once, when the first micro-batch has gone through the model."""
    sum_losses, done = finetune.cross_entropy_sum, []

    def do_and_sum(*args):
        if not done:
            done.append(do())
        return sum_losses(*args)

    monkeypatch.setattr(finetune, "cross_entropy_sum", do_and_sum)


@pytest.mark.parametrize("how", ["cut short", "edited", "renamed over"])
def test_an_edited_jsonl_file_stops_the_run_and_saves(train, tmp_path, monkeypatch, how):
    """A letter is enough, with any --on_bad_sample; a new file under its name is none of ours."""
    lines = [json.dumps({"messages": [user("Hi"), assistant(f"It is {i}")]}) for i in range(12)]
    path, other = tmp_path / "d.jsonl", "\n".join(lines).replace("It", "At")
    path.write_text("\n".join(lines))

    def change():
        if how == "cut short":
            os.truncate(path, 300)
        elif how == "edited":
            time.sleep(0.01)  # the clock of file times ticks so often
            with path.open("r+") as file:
                file.write(other)
        else:
            (tmp_path / "new").write_text(other)
            os.replace(tmp_path / "new", path)

    in_first_step(monkeypatch, change)
    flags = ("--on_bad_sample", "skip", "--max_steps", 3)
    if how == "renamed over":
        return train(path, *flags)
    has(fails(train, path, *flags), f"{path}: was changed while it was in use", "rename")
    assert helpers.undamaged_steps(tmp_path / "out") == [1]


def test_a_killed_worker_costs_no_step_that_was_done(train, tmp_path, twelve, monkeypatch):
    in_first_step(monkeypatch, lambda: [w.kill() for w in multiprocessing.active_children()])
    flags = ("--num_workers", 1, "--num_epochs", 9, "--max_steps", 27)
    message = fails(train, twelve, *flags)
    has(message, "a process that reads data was killed", "--num_workers", "--shm-size", "sample")
    assert helpers.undamaged_steps(tmp_path / "out") == [len(read_metrics(tmp_path / "out"))]


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="needs the right to mount",
)
def test_a_full_shared_memory_is_done_without(tmp_path, small_folder):
    """As of Docker, which gives 64 MiB; here 2 MiB, for micro-batches of 5 MB."""
    paths = [make_image(tmp_path / f"{i}.png", 440, 440, i) for i in range(4)]
    data = write_data(tmp_path / "d.json", [about(image(path)) for path in paths])
    flags = f"--model_name_or_path {small_folder} --device cpu --train_data {data}"
    flags += f" --max_steps 2 --num_workers 2 --output_dir {tmp_path}/out --max_pixels 200000"
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm"
    command = f"{mount} && exec {sys.executable} finetune.py {flags}"
    helpers.run_script("unshare", "-m", "sh", "-c", command)
    assert len(read_metrics(tmp_path / "out")) == 2


def test_an_index_that_is_damaged_or_cannot_be_kept_is_measured_again(
    tmp_path, tiny_folder, monkeypatch, caplog
):
    monkeypatch.setattr(index, "CACHE_DIR", tmp_path)
    data = write_data(tmp_path / "d.json", [GOOD] * 3)

    config = helpers.tiny_config(train_data=[data])

    def measured():
        return helpers.set_up(config, tiny_folder).index.num_tokens.tolist()

    expected = measured()
    (cache_file,) = tmp_path.glob("index-*.npy")
    content = cache_file.read_bytes()
    for damaged in (content[:-40], content[:40] + b"\7" + content[41:], b""):
        cache_file.write_bytes(damaged)
        assert measured() == expected and "is damaged" in caplog.text
        assert cache_file.read_bytes() == content
        caplog.clear()
    monkeypatch.setattr(index, "CACHE_DIR", cache_file / "cache")
    assert measured() == expected and "the index is not kept" in caplog.text


# ------------------------------------------------------------------ files that are something else


STARTS = {
    "a PDF document": b"%PDF-1.7\n",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a web page": b"\n<!DOCTYPE html><html>",
    "XML": b"<?xml version='1.0'?><svg>",
    "a HEIC picture": b"\0\0\0\x18ftypheic",
    "a Parquet file": b"PAR1\x15\0",
    "an Arrow file": b"ARROW1\0\0",
    "`gunzip`": b"\x1f\x8b\x08",
    "a ZIP archive": b"PK\x03\x04",
}


@pytest.mark.parametrize("words", STARTS)
def test_a_file_that_is_not_what_its_name_says_is_named(tiny_folder, tmp_path, words):
    for item in (image("a.jpg"), video("a.mp4")):
        name = item[item["type"]]
        (tmp_path / name).write_bytes(STARTS[words] + bytes(99))
        with pytest.raises(ValueError, match=f"message 0: {tmp_path}/{name}: .*{words}"):
            helpers.encoder_for(tiny_folder).measure({"messages": about(item)}, tmp_path)
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(STARTS[words] + bytes(99))
        with pytest.raises(UserError, match=f"{name}: is .*{words}.*JSONL"):
            Records([str(tmp_path / name)])


def test_paths_of_other_systems_are_explained(tiny_folder, tmp_path):
    for path, words in (("~/a.jpg", "write the whole path"), ("b\\a.jpg", "set apart by /")):
        with pytest.raises(ValueError, match=f"(?s)no such file: .*{tmp_path}.*{words}"):
            helpers.encoder_for(tiny_folder).measure({"messages": about(image(path))}, tmp_path)
    (tmp_path / "d.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is a table.*JSONL"):
        Records([str(tmp_path / "d.csv")])
