"""Every flag of finetune.py, in one place."""

import dataclasses
import importlib.util
import json
import logging
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg, HfArgumentParser

# What every file tells through; util/logutil.py says where it goes.
logger = logging.getLogger("finetune")

# What a run uses where the flag is left out.
DEFAULTS = {
    "learning_rate": 1e-5,
    "num_epochs": 3,
    "precision": "bf16",
    "max_pixels": 1280 * 28 * 28,
    "video_max_pixels": 768 * 28 * 28,
}
# The embedded tiny model starts from random weights, so it needs a higher learning rate and more
# rounds than a trained one; and it is made for CPUs, so its pictures are small, and its precision
# is the one that most CPUs are fast at.
TINY_DEFAULTS = {
    "learning_rate": 1e-3,
    "num_epochs": 60,
    "precision": "fp32",
    "max_pixels": 64 * 28 * 28,
    "video_max_pixels": 32 * 28 * 28,
}
LORA_LEARNING_RATE = 1e-4
BITSANDBYTES = "bitsandbytes==0.50.2"
TINY_NOTICE = """\
*** No NVIDIA device: this is about the embedded TINY model, a toy with random weights.
*** For the real one: --model_name_or_path Qwen/Qwen2-VL-2B-Instruct (or a folder)."""


# Control characters but tab and line feed, those that turn the direction of writing, and halves of
# pairs, which cannot be written.
INVISIBLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def make_visible(text: str) -> str:
    """Return `text` with control characters as escapes, and many empty lines as one line of marks.

    Everything of data, answers and file names is printed through this: a terminal takes escape
    sequences as orders, and a model that has learned nothing answers with a hundred line breaks.
    """
    text = re.sub(r"\n{3,}", lambda run: "\u21b5" * len(run[0]) + "\n", text)
    return INVISIBLE.sub(lambda character: ascii(character[0])[1:-1], text)


def _left_out(name: str) -> str:
    return f"Left out: {DEFAULTS[name]}; tiny: {TINY_DEFAULTS[name]}"


class UserError(ValueError):
    """A mistake in flags or data: shown as one message, without a traceback."""


@dataclass(frozen=True)
class Config:
    """The flags, after parsing. Raises UserError where a value makes no sense."""

    # -- model and data
    model_name_or_path: str | None = HfArg(
        default=None,
        help="hub name, local folder, or tiny (the embedded model). Left out: "
        "Qwen/Qwen2-VL-2B-Instruct on CUDA, tiny on a machine without an NVIDIA device",
    )
    train_data: list[str] = HfArg(  # noqa: RUF009
        default_factory=lambda: ["train_data/data.json"],
        help="JSON, JSONL or Parquet files of conversations, each with an optional sampling rate: "
        "a.json b.jsonl:0.5",
    )
    eval_data: list[str] = HfArg(  # noqa: RUF009
        default_factory=list, help="held-out data, in the formats of --train_data"
    )
    output_dir: str | None = HfArg(
        default=None, help="new or empty folder. Left out: train_output/<timestamp>"
    )
    resume_from: str | None = HfArg(
        default=None, help="latest, or a checkpoint folder: go on with that run, in its folder"
    )

    # -- hyper-parameters: these set the mathematics
    num_epochs: int | None = HfArg(
        default=None, help="passes over the data. " + _left_out("num_epochs")
    )
    max_steps: int | None = HfArg(default=None, help="stop after this many optimizer steps")
    early_stopping: int | None = HfArg(
        default=None,
        help="stop once the loss on --eval_data has not fallen for so many evaluations; the model "
        "in output_dir is then the best, not the last",
    )
    batch_size: int = HfArg(default=4, help="samples in one optimizer step, over all GPUs")
    learning_rate: float | None = HfArg(
        default=None,
        help="peak learning rate. " + _left_out("learning_rate") + f"; LoRA: {LORA_LEARNING_RATE}",
    )
    vision_learning_rate: float | None = HfArg(
        default=None, help="that of vision tower and merger. Left out: --learning_rate"
    )
    warmup_ratio: float = HfArg(default=0.03, help="share of the steps that warm up")
    weight_decay: float = HfArg(default=0.01, help="AdamW's decay, on matrices only")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped to this norm")
    train: list[str] = HfArg(  # noqa: RUF009
        default_factory=lambda: ["all"],
        help="parts to train: all, or any of llm, vision (the tower), merger",
    )
    lora_rank: int | None = HfArg(
        default=None,
        help="train LoRA adapters of this rank on the linear layers of --train, not the weights",
    )
    supervise: Literal["assistant", "last", "all"] = HfArg(
        default="assistant",
        help="train the assistant's answers, the last one of each sample, or all text (continued "
        "pre-training)",
    )
    precision: Literal["bf16", "fp32", "bf16_lean", "bf16_4bit"] | None = HfArg(
        default=None,
        help="bf16: fp32 weights, bf16 compute. fp32: all fp32. bf16_lean: bf16 weights with "
        "stochastic rounding, 8-bit AdamW. bf16_4bit: bf16, and what --lora_rank leaves frozen in "
        "the language model takes 4 bits. " + _left_out("precision"),
    )
    seed: int = HfArg(default=0, help="fixes the order of the samples")

    # -- what the model sees
    min_pixels: int = HfArg(default=56 * 56, help="smallest image, in pixels after resizing")
    max_pixels: int | None = HfArg(
        default=None,
        help="largest image, in pixels after resizing; 28 x 28 (from Qwen3-VL on: 32 x 32) are one "
        "token. " + _left_out("max_pixels"),
    )
    video_fps: float = HfArg(default=2.0, help="frames sampled from each second of video")
    video_max_frames: int = HfArg(default=768, help="most frames sampled from one video")
    video_max_pixels: int | None = HfArg(
        default=None,
        help="largest video frame, in pixels after resizing. " + _left_out("video_max_pixels"),
    )
    allow_remote_media: bool = HfArg(
        default=False, help="fetch images and videos whose source is an http(s) URL"
    )

    # -- memory and machine: these never change the mathematics
    max_tokens: int = HfArg(default=4096, help="most tokens in one forward pass on one GPU")
    gradient_checkpointing: Literal["none", "llm", "vision", "all"] = HfArg(
        default="none", help="layers that compute their activations twice instead of keeping them"
    )
    compile: bool = HfArg(
        default=False,
        help="compile each layer: fewer and larger kernels, and first steps that take minutes",
    )
    on_bad_sample: Literal["stop", "skip"] = HfArg(
        default="stop",
        help="samples that cannot be used: stop, where possible before training, or leave them out",
    )
    skip_bad_steps: int = HfArg(
        default=0, help="leave out up to so many steps in a row whose loss is not finite"
    )
    save_steps: int = HfArg(
        default=500, help="steps between checkpoints; the last step is saved in any case"
    )
    keep_checkpoints: int = HfArg(
        default=2, help="newest checkpoints kept, and, of those that were evaluated, the best one"
    )
    eval_steps: int = HfArg(default=100, help="steps between evaluations on --eval_data")
    eval_generate: int = HfArg(
        default=0, help="held-out samples that are also answered and scored at every evaluation"
    )
    metric: str | None = HfArg(
        default=None, help="FILE.py:FUNCTION, your own score of those: function(answer, reference)"
    )
    num_workers: int = HfArg(default=2, help="processes that read and decode the data")
    shard_size: int | None = HfArg(
        default=None,
        help="finetune_distributed.py: GPUs that share one copy of weights, gradients and "
        "optimizer state. Left out: all GPUs of one machine",
    )
    device: str | None = HfArg(default=None, help="cuda, cuda:1, cpu. Left out: cuda, else cpu")

    # -- what is written
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = HfArg(
        default="none", help="send the metrics there too; tensorboard: into output_dir"
    )

    def __post_init__(self):
        for name in (
            *("num_epochs", "max_steps", "batch_size", "learning_rate", "max_grad_norm"),
            *("min_pixels", "max_pixels", "video_fps", "video_max_frames", "video_max_pixels"),
            *("max_tokens", "save_steps", "keep_checkpoints", "eval_steps", "shard_size"),
            *("lora_rank", "vision_learning_rate", "early_stopping"),
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} {value}: must be greater than 0")
        for name in ("weight_decay", "num_workers", "seed", "skip_bad_steps", "eval_generate"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{field.name} {value}: must be a finite number")
        if self.seed >= 2**64:
            raise UserError(f"--seed {self.seed}: must be below 2 to the power of 64")
        if not self.train or set(self.train) - {"all", "llm", "vision", "merger"}:
            raise UserError(
                f"--train {' '.join(self.train)}: must be all, or any of llm, vision, merger"
            )
        if self.precision == "bf16_4bit" and not self.lora_rank:
            raise UserError(
                "--precision bf16_4bit: rounds the weights that LoRA leaves as they are, so it "
                "needs --lora_rank, such as --lora_rank 16 (all weights: --precision bf16_lean)"
            )
        if self.eval_generate and not self.eval_data:
            raise UserError("--eval_generate: answers held-out data, so it needs --eval_data")
        if self.early_stopping and not self.eval_data:
            raise UserError("--early_stopping: goes by held-out data, so it needs --eval_data")
        if self.metric and not self.eval_generate:
            raise UserError("--metric: scores answers, so it needs --eval_generate")
        if self.vision_learning_rate and not self.trained_parts & {"vision", "merger"}:
            raise UserError("--vision_learning_rate: --train names neither vision nor merger")
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise UserError(
                f"--report_to {self.report_to}: is not installed: pip install {self.report_to}"
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"--warmup_ratio {self.warmup_ratio}: must be between 0 and 1")
        if self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise UserError(
                f"--min_pixels {self.min_pixels} is above --max_pixels {self.max_pixels}: "
                "lower the one or raise the other"
            )

    @property
    def is_tiny(self) -> bool:
        """Whether this run trains the embedded tiny model."""
        return self.model_name_or_path == "tiny"

    @property
    def uses_autocast(self) -> bool:
        """Whether matrix products are in bf16 and what is trained is fp32."""
        return self.precision in ("bf16", "bf16_4bit")

    @property
    def trained_parts(self) -> set[str]:
        """What --train names, of llm, vision and merger."""
        return {"llm", "vision", "merger"} if "all" in self.train else set(self.train)

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Read the flags that `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """Write the flags as JSON to `path`."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def parse_config(argv: list[str] | None = None, extra=None) -> Config:
    """Parse the command line into a Config.

    Flags that are unknown end the program. `extra` is called with the parser, to add flags of a
    script's own; they come back as a second value.
    """
    parser = HfArgumentParser(Config, allow_abbrev=False)
    if extra:
        extra(parser)
    config, *rest, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if config.precision == "bf16_4bit":
        require_bitsandbytes()
    return (config, rest[0]) if extra else config


def has_bitsandbytes() -> bool:
    """Return whether the package is installed that --precision bf16_4bit needs."""
    return importlib.util.find_spec("bitsandbytes") is not None


def require_bitsandbytes() -> None:
    """Raise UserError where it is not."""
    if not has_bitsandbytes():
        raise UserError(f"weights in 4 bits need a package more: pip install {BITSANDBYTES}")


def fill_defaults(config: Config, device_type: str, output_dir: Path | None = None) -> Config:
    """Return `config` with what was left out filled in for a device type, "cuda" or "cpu"."""
    model = config.model_name_or_path or (
        "Qwen/Qwen2-VL-2B-Instruct" if device_type == "cuda" else "tiny"
    )
    filled = dict(TINY_DEFAULTS if model == "tiny" else DEFAULTS)
    if config.lora_rank and model != "tiny":
        filled["learning_rate"] = LORA_LEARNING_RATE
    filled["output_dir"] = str(output_dir or f"train_output/{time.strftime('%Y%m%d_%H%M%S')}")
    filled = {name: value for name, value in filled.items() if getattr(config, name) is None}
    return dataclasses.replace(config, model_name_or_path=model, **filled)
