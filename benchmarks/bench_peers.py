"""The same model, data and number of epochs through finetune.py and through its peers.

    python -m benchmarks.bench_peers
    python -m benchmarks.bench_peers --num_samples 40 --num_epochs 1 --peers original ours

The embedded tiny model, on the CPU; text, pictures and clips, their lengths spread 20-fold. Each
peer runs in a process of its own, one after the other:

original: the loop of zhangfaen/finetune-Qwen2-VL, written anew as it is described: one sample at a
  time, every frame of a clip decoded to RGB before some are picked, stock sdpa, logits at all
  positions, a mean of means, a constant learning rate, no clipping.
trl: SFTTrainer; pip install trl==1.16.0. It takes no video, so it is given less: every second
  frame, which makes as many tokens, as a picture that was decoded and resized before its run.
llamafactory: 0.9.5, where --llamafactory_python names the interpreter of an environment with it: it
  wants transformers<=5.6.0, accelerate<=1.11.0, peft<=0.18.1, av<=16.0.0 and trl<=0.24.0.
ours: finetune.py, with --max_tokens as low as the longest sample allows.

trl and llamafactory get the schedule, decay, clipping and workers of finetune.py in place of their
defaults, and no checkpointing. By default they put 8 samples into a forward pass and pad them:
trl packs no samples with pictures, llamafactory only if told to. --micro_batch_size 1 gives them
one, where nothing is padded: on a CPU that is their fastest. All compute in fp32; --precision bf16
takes bf16 autocast, for which a CPU should have units.

Wall clock and the peak of memory (PSS: a page that processes share counts once) are of the whole
process with its children, from its start to the exported model; samples and tokens a second of the
training loop, as each tells its time. The loss is that of held-out data by supervised token.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.clips import make_clip
from benchmarks.common import REPO, load_tiny, print_header, print_row
from util.config import Config
from util.data.batch import prepare_data
from util.model.inputs import InputBuilder
from util.model.load import find_model, load_model
from util.vision_util import load_frames

CPU = torch.device("cpu")
COLOURS = {"red": (220, 30, 30), "green": (40, 170, 60), "blue": (40, 60, 210), "grey": (90,) * 3}
CLIP_SECONDS = (4, 6, 8, 10)

# ---------------------------------------------------------------- the data


def make_data(folder: Path, num_samples: dict[str, int]) -> None:
    """Write data files: one fifth of the samples has a clip, two fifths a picture."""
    for seconds in CLIP_SECONDS:
        make_clip(str(folder / f"{seconds}.mp4"), 360, 640, seconds)
    random = np.random.default_rng(0)
    for name, count in num_samples.items():
        records = [make_record(folder, f"{name}{i}", i % 5, random) for i in range(count)]
        random.shuffle(records)
        (folder / f"{name}.json").write_text(json.dumps(records))


def make_record(folder: Path, name: str, kind: int, random) -> dict:
    """Return a conversation, in a format that llamafactory and finetune.py share."""
    images, videos = [], []
    if kind == 0:
        seconds = random.choice(CLIP_SECONDS)
        videos = [str(folder / f"{seconds}.mp4")]
        question = "<video>What does the camera show?"
        answer = f"For {seconds} seconds it moves over a cup of coffee on a table."
    elif kind < 3:
        names = random.choice(list(COLOURS), random.integers(2, 7))
        row = np.array([COLOURS[n] for n in names], np.uint8).repeat(random.integers(20, 50), 0)
        images = [str(folder / f"{name}.png")]
        Image.fromarray(np.stack([row] * random.integers(60, 200))).save(images[0])
        question = "<image>Name the colours from left to right."
        answer = f"There are {len(names)} colours: {', '.join(names)}."
    else:
        first, count = random.integers(1, 200), int(2 ** random.uniform(0, 8.4))
        question = f"Count from {first} to {first + count}."
        answer = " ".join(map(str, range(first, first + count + 1)))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": images, "videos": videos}


def without_tags(message: dict) -> str:
    """Return the text of a message without the places of its media."""
    return message["content"].replace("<image>", "").replace("<video>", "")


# ---------------------------------------------------------------- the peers


def train_original(run: dict) -> float:
    """Train as the original's finetune.py does; return the seconds of its loop."""
    processor = transformers.AutoProcessor.from_pretrained(run["base"])
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        run["base"], dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    header = processor.tokenizer("<|im_start|>assistant\n").input_ids

    def collate(records: list[dict]) -> dict:
        (record,) = records
        user, assistant = record["messages"]
        content = [{"type": kind} for kind in ("image", "video") if record[f"{kind}s"]]
        content.append({"type": "text", "text": without_tags(user)})
        text = processor.apply_chat_template([{"role": "user", "content": content}, assistant])
        inputs = processor(
            text=[text],
            images=[Image.open(path).convert("RGB") for path in record["images"]] or None,
            videos=[read_video(path, run["video_fps"]) for path in record["videos"]] or None,
            videos_kwargs={"do_sample_frames": False},
            return_tensors="pt",
        )
        ids = inputs["input_ids"][0].tolist()
        begin = len(ids) - 1 - ids[::-1].index(header[0]) + len(header)
        labels = inputs["input_ids"].clone()  # <|im_end|> and the line break behind it are trained
        labels[:, :begin] = -100
        return {**inputs, "labels": labels}

    optimizer = torch.optim.AdamW(model.parameters(), lr=run["learning_rate"])
    records = json.loads(Path(run["train_data"]).read_text())
    started, num_backward = time.perf_counter(), 0
    for _ in range(run["num_epochs"]):
        for inputs in DataLoader(records, batch_size=1, collate_fn=collate):
            with torch.autocast("cpu", torch.bfloat16, enabled=run["precision"] == "bf16"):
                loss = model(**inputs).loss
            (loss / run["batch_size"]).backward()
            num_backward += 1
            if num_backward % run["batch_size"] == 0:
                optimizer.step()
                optimizer.zero_grad()
    seconds = time.perf_counter() - started
    model.save_pretrained(run["output_dir"])
    return seconds


def read_video(path: str, fps: float) -> torch.Tensor:
    """Return frames (num_frames, 3, height, width), picked when all are decoded to RGB."""
    with av.open(path) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames = torch.as_tensor(np.stack(frames)).permute(0, 3, 1, 2)
    return frames[torch.linspace(0, len(frames) - 1, round(len(frames) / rate * fps)).round().int()]


def train_trl(run: dict) -> float:
    """Train with TRL's SFTTrainer; return the seconds of its loop."""
    import datasets
    import trl

    rows = []
    for record in json.loads(Path(run["train_data"]).read_text()):
        images = record["images"] + [f for path in record["videos"] for f in run["frames"][path]]
        prompt = [{"role": "user", "content": without_tags(record["messages"][0])}]
        rows.append({"prompt": prompt, "completion": record["messages"][1:], "images": images})
    data = datasets.Dataset.from_list(rows)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    trainer = trl.SFTTrainer(
        run["base"],
        trl.SFTConfig(**trainer_flags(run), model_init_kwargs=options, max_length=None),
        train_dataset=data.cast_column("images", datasets.List(datasets.Image())),
        processing_class=transformers.AutoProcessor.from_pretrained(run["base"]),
    )
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    return seconds


def trainer_flags(run: dict) -> dict:
    """Return what transformers' Trainer needs to train as finetune.py does."""
    return {
        **{"output_dir": run["output_dir"], "num_train_epochs": run["num_epochs"]},
        **{"per_device_train_batch_size": run["micro_batch_size"], "use_cpu": True},
        **{"gradient_accumulation_steps": run["batch_size"] // run["micro_batch_size"]},
        **{"learning_rate": run["learning_rate"], "lr_scheduler_type": "cosine"},
        **{"warmup_steps": 0.03, "weight_decay": 0.01, "max_grad_norm": 1.0},  # 3 % of the steps
        **{"bf16": run["precision"] == "bf16"},
        **{"gradient_checkpointing": False, "dataloader_num_workers": run["num_workers"]},
        **{"save_strategy": "no", "report_to": "none", "logging_steps": 10},
    }


def command_llamafactory(run: dict) -> list[str]:
    """Write the settings of llamafactory; return the command that trains with them."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    info = {"file_name": run["train_data"], "formatting": "sharegpt"}
    info["columns"] = {name: name for name in ("messages", "images", "videos")}
    info["tags"] = tags | {"assistant_tag": "assistant"}
    Path(run["folder"], "dataset_info.json").write_text(json.dumps({"mixed": info}))
    flags = {
        **trainer_flags(run),
        **{"stage": "sft", "do_train": True, "finetuning_type": "full", "template": "qwen2_vl"},
        **{"freeze_vision_tower": False, "freeze_multi_modal_projector": False},
        **{"dataset": "mixed", "dataset_dir": run["folder"], "model_name_or_path": run["base"]},
        **{"cutoff_len": 4096, "disable_gradient_checkpointing": True, "flash_attn": "sdpa"},
        **{"image_max_pixels": run["max_pixels"], "image_min_pixels": run["min_pixels"]},
        **{"video_max_pixels": run["video_max_pixels"], "video_min_pixels": 784},
        **{"video_fps": run["video_fps"], "overwrite_cache": True},
    }
    settings = Path(run["folder"], "settings.yaml")  # JSON is YAML; 0.9.5 fails on .json
    settings.write_text(json.dumps(flags))
    return [run["llamafactory_python"], "-m", "llamafactory.cli", "train", str(settings)]


def command_ours(run: dict) -> list[str]:
    """Return the command of finetune.py; its other flags are its defaults."""
    names = ("train_data", "output_dir", "num_epochs", "batch_size", "learning_rate", "max_pixels")
    names += ("video_max_pixels", "video_fps", "num_workers", "precision", "max_tokens")
    flags = [text for name in names for text in (f"--{name}", str(run[name]))]
    return [sys.executable, "finetune.py", "--model_name_or_path", run["base"], *flags]


# ---------------------------------------------------------------- the measurement


def prepare_run(folder: Path, arguments, config: Config, processor, encoder) -> dict:
    """Write data, and a model folder in which every peer finds the same; return what all need."""
    make_data(folder, {"train": arguments.num_samples, "held_out": arguments.num_samples // 5})
    shutil.copytree(find_model("tiny"), folder / "base")
    processor.save_pretrained(folder / "base")  # with the pixel limits of finetune.py
    frames = {}
    for path in (str(folder / f"{seconds}.mp4") for seconds in CLIP_SECONDS):
        clip = load_frames({"type": "video", "video": path}, encoder.policy)[::2]
        frames[path] = [f"{path}{k}.png" for k in range(len(clip))]
        for name, frame in zip(frames[path], clip):
            Image.fromarray(frame.permute(1, 2, 0).numpy()).save(name)
    names = ("min_pixels", "max_pixels", "video_max_pixels", "video_fps", "learning_rate")
    run = vars(arguments) | {name: getattr(config, name) for name in names}
    paths = {"train_data": str(folder / "train.json"), "base": str(folder / "base")}
    return run | paths | {"folder": str(folder), "frames": frames}


def measure(command: list[str], log: Path, num_threads: int) -> tuple[float, float]:
    """Run a command; return its wall clock seconds and its peak of memory in GiB."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(num_threads)}
    started, peak = time.perf_counter(), 0
    with open(log, "w") as output:
        process = psutil.Popen(command, cwd=REPO, env=env, stdout=output, stderr=output)
        while process.poll() is None:
            total = 0
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += one.memory_full_info().pss
            peak = max(peak, total)
            time.sleep(0.5)  # to look more often takes time away from what is measured
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - started, peak / 2**30


def loop_seconds(output_dir: Path) -> float:
    """Return how long the training loop took."""
    if (output_dir / "train_results.json").is_file():
        return json.loads((output_dir / "train_results.json").read_text())["train_runtime"]
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(line)["seconds"] for line in lines)


@torch.no_grad()
def held_out_loss(folder: str, config: Config, data) -> float:
    """Return the loss per supervised token, of weights in bf16, as finetune.py writes them."""
    model = load_model(folder, CPU, config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    build_inputs = InputBuilder(data.samples.encoder.processor, "packed_sdpa", CPU)
    loss_sum = 0.0
    for i in range(len(data.index)):
        micro_batch = data.samples.collate([data.samples[i]])
        logits = model(**build_inputs(micro_batch)).logits[0]
        loss_sum += F.cross_entropy(logits, micro_batch.targets, reduction="sum").item()
    return loss_sum / data.index.num_supervised_tokens.sum()


def compare(folder: Path, arguments) -> None:
    """Print one row a peer."""
    config, processor, encoder = load_tiny(video_fps=1.0)
    run = prepare_run(folder, arguments, config, processor, encoder)
    # Of a copy: the index of a file is kept, and ours is to measure the data itself.
    copied = shutil.copy(run["train_data"], str(folder / "copy.json"))
    index = prepare_data([copied], encoder, config).index
    run["max_tokens"] = int(index.num_tokens.max()) + encoder.num_dummy_tokens
    held_out = prepare_data([str(folder / "held_out.json")], encoder, config)
    print(f"{index.summary()}\n{vars(arguments)}, --max_tokens {run['max_tokens']} of ours\n")
    before = held_out_loss(run["base"], config, held_out)
    print_header(f"loss before: {before:.4f}", "wall s", "GiB", "samples/s", "tokens/s", "loss")
    for i, name in enumerate(arguments.peers):
        run["output_dir"] = str(folder / f"{i}_{name}")
        (folder / "run.json").write_text(json.dumps(run))
        command = [sys.executable, "-m", "benchmarks.bench_peers", "--run", name, str(folder)]
        if build := {"ours": command_ours, "llamafactory": command_llamafactory}.get(name):
            command = build(run)
        costs = measure(command, folder / f"{i}_{name}.log", arguments.num_threads)
        rounds = arguments.num_epochs / loop_seconds(Path(run["output_dir"]))
        loss = held_out_loss(run["output_dir"], config, held_out)
        speeds = (rounds * len(index), rounds * index.num_tokens.sum())
        print_row(name, *costs, *speeds, f"{loss:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    peers = ["original", "trl", "ours"]
    parser.add_argument("--peers", nargs="+", choices=peers, default=peers, help="in this order")
    parser.add_argument("--num_samples", type=int, default=320)
    parser.add_argument("--num_epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8, help="samples in one step")
    parser.add_argument("--micro_batch_size", type=int, default=8, help="of trl, llamafactory")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--num_workers", type=int, default=1, help="the original has none")
    parser.add_argument("--num_threads", type=int, default=1, help="of torch in a process")
    parser.add_argument("--llamafactory_python", help="adds llamafactory; see above")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.batch_size % arguments.micro_batch_size:
        parser.error("--batch_size must be a multiple of --micro_batch_size")
    if arguments.run:
        run = json.loads(Path(arguments.run[1], "run.json").read_text())
        train = {"original": train_original, "trl": train_trl}[arguments.run[0]]
        results = json.dumps({"train_runtime": train(run)})  # as llamafactory writes it
        Path(run["output_dir"], "train_results.json").write_text(results)
        return
    if arguments.llamafactory_python:
        arguments.peers.append("llamafactory")
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), arguments)


if __name__ == "__main__":
    main()
