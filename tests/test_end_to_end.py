"""The real scripts as a user runs them, on tiny."""

import json
import re

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import check_data
import finetune
import test_on_trained_model_by_us
from helpers import REPO, call, read_metrics, run_script

SHIPPED = REPO / "train_data" / "data.json"


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The default run, started by the launcher: (output folder, what was printed).

    The launcher finds the repo, whatever the current folder is.
    """
    folder = tmp_path_factory.mktemp("run")
    output_dir = folder / "new" / "folder"
    printed = run_script(REPO / "finetune.sh", "--output_dir", output_dir, cwd=folder)
    return output_dir, printed


def test_the_default_run_learns(default_run):
    output_dir, printed = default_run
    metrics = read_metrics(output_dir)
    assert metrics[-1]["loss"] < 0.1 * metrics[0]["loss"]
    assert [m["global_step"] for m in metrics] == list(range(1, len(metrics) + 1))
    assert set(metrics[0]) == {
        *("global_step", "epoch", "loss", "learning_rate", "grad_norm", "num_samples"),
        *("num_bad_samples", "num_micro_batches", "num_tokens", "num_supervised_tokens", "seconds"),
        *("tokens_per_second", "supervised_tokens_per_second", "data_wait_share"),
        *("tflops_per_second", "mfu", "peak_memory_gib"),
    }
    # What it is about to do, said before it is done; and that this is a toy, loudly.
    for said in ("TINY", "parameters", "fp32", "12 samples", "180 of 4 samples", str(output_dir)):
        assert said in printed


def test_every_promised_file_is_there(default_run):
    output_dir, _ = default_run
    names = {path.name for path in output_dir.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("config_used.json", "train.log", "metrics.jsonl", "loss.png", "checkpoint-180"),
    }
    assert Image.open(output_dir / "loss.png").size == (960, 540)
    log = (output_dir / "train.log").read_text()
    assert "parameters" in log and "step     180/180" in log
    assert json.loads((output_dir / "config_used.json").read_text())["batch_size"] == 4


def test_the_folder_loads_and_generates_alike_in_a_batch_and_alone(default_run):
    output_dir, _ = default_run
    model = AutoModelForImageTextToText.from_pretrained(output_dir)
    assert model.dtype == torch.bfloat16
    model = model.float()
    processor = AutoProcessor.from_pretrained(output_dir)
    rows = [row["messages"] for row in json.loads(SHIPPED.read_text(encoding="utf-8"))]

    def generate(conversations):
        items = [item for (message,) in conversations for item in message["content"]]
        pictures = [Image.open(SHIPPED.parent / item["image"]) for item in items if "image" in item]
        prompts = processor.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text=prompts, images=pictures or None, padding=True, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=80)
        answers = output[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(answers, skip_special_tokens=True)

    chosen = [rows[i][:1] for i in (0, 7, 10)]
    together = generate(chosen)
    assert together == [generate([conversation])[0] for conversation in chosen]
    # Plain transformers, with the saved processor, sees what training saw.
    assert together == [rows[i][1]["content"] for i in (0, 7, 10)]


def test_trained_model_knows_its_answers_and_the_base_model_none(default_run):
    output_dir, _ = default_run
    training = ("--prompts", "train_data/data.json", "--model_dir", output_dir)
    training += ("--max_new_tokens", 64)  # what was not trained never ends
    trained = run_script("test_on_trained_model_by_us.py", *training)
    base = run_script("test_on_official_model.py", *training)
    counts = [re.search(r"(\d+) of 12 answers equal", printed)[1] for printed in (trained, base)]
    assert int(counts[0]) >= 10 and counts[1] == "0"

    def without_answers(printed):
        printed = re.sub(r"^answer: .*?^reference: ", "reference: ", printed, flags=re.M | re.S)
        return printed.splitlines()[1:-1]  # nor the model's name and the score

    assert without_answers(trained) == without_answers(base)
    limits = "images of 3136 to 50176 pixels"
    assert limits in trained.splitlines()[0] and limits in base.splitlines()[0]


def test_the_prompts_that_ship(default_run, capsys):
    output_dir, _ = default_run
    call(test_on_trained_model_by_us, "--model_dir", output_dir, "--max_new_tokens", 8)
    printed = capsys.readouterr().out
    prompts = json.loads((REPO / "test_data" / "prompts.json").read_text(encoding="utf-8"))
    assert re.findall(r"^=== (.+)$", printed, re.M) == [prompt["id"] for prompt in prompts]
    assert len(re.findall(r"^answer: ", printed, re.M)) == len(prompts)


def test_a_bf16_run_follows_the_fp32_run(small_folder, tmp_path):
    flags = ["--model_name_or_path", small_folder, "--device", "cpu", "--num_workers", 0]
    flags += ["--max_steps", 5, "--max_tokens", 400, "--max_pixels", 50176]
    flags += ["--video_max_pixels", 25088, "--learning_rate", 1e-3]
    for precision in ("bf16", "fp32"):
        call(finetune, *flags, "--precision", precision, "--output_dir", tmp_path / precision)
    bf16, fp32 = ([m["loss"] for m in read_metrics(tmp_path / name)] for name in ("bf16", "fp32"))
    assert bf16 == pytest.approx(fp32, rel=5e-3)
    assert bf16 != fp32, "bf16 computed in fp32"


def test_check_data_shows_what_is_trained(capsys):
    call(check_data, "--train_data", SHIPPED, "--model_name_or_path", "tiny", "--show", 3)
    printed = capsys.readouterr().out
    shown = json.loads(printed.splitlines()[-1])
    assert len(shown["input_ids"]) == len(shown["labels"])
    assert (
        "[[An orange space suit with a round blue mission patch on the chest.<|im_end|>]]"
        in printed
    )
    pairs = zip(shown["input_ids"], shown["labels"])
    assert all(label in (-100, token) for token, label in pairs)
