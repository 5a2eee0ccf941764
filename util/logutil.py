"""The log, the metrics file, and the loss plot."""

import atexit
import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from util.check_requirements import find_differences, read_requirements
from util.config import Config, logger, make_visible
from util.run import is_main_process, on_main_process, shard_size, world_size
from util.survive import check_claim

# How long a disk that has refused the last of a run gets before it is asked once more.
LAST_CHANCE_SECONDS = 30
REPORT_FAILS = "--report_to fails, and is left out from here on: {0!r:.300}"


class _TqdmHandler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record):
        if not hasattr(record, "is_printed"):
            tqdm.write(make_visible(self.format(record)), file=sys.stderr)


class _LogFile(logging.Handler):
    """Appends to a file; a disk that is full or gone costs lines, and not the run."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def emit(self, record):
        with suppress(OSError):
            check_claim(self.path.parent)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(make_visible(self.format(record)) + "\n")


def setup_logging(output_dir: Path) -> None:
    """Log to the terminal and to `output_dir`/train.log; ranks but the first: only their end."""
    logger.setLevel(logging.INFO if is_main_process() else logging.CRITICAL)
    logger.propagate = False
    file = _LogFile(output_dir / "train.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers = [_TqdmHandler(), file]


class RunLog:
    """What a run tells: train.log, terminal and progress bar, metrics.jsonl, --report_to.

    Only the main process tells anything. The set-up is logged with its arithmetic as this is made.
    """

    def __init__(self, config, model, data, eval_data, first_step, num_steps, device):
        _log_setup(config, model, data, eval_data, num_steps, device)
        output_dir, is_main = Path(config.output_dir), is_main_process()
        self.num_steps = num_steps
        self.metrics_file = MetricsFile(Path(os.devnull))
        if is_main:
            report = open_reporter(config, output_dir)
            self.metrics_file = MetricsFile(output_dir / "metrics.jsonl", report)
        self.progress = tqdm(
            total=num_steps, initial=first_step, unit="step", disable=None if is_main else True
        )
        if data.problems and first_step == 0:
            self.metrics_file.append({"global_step": 0, "num_bad_samples": len(data.problems)})

    def step(self, metrics: dict, problems: list[str]) -> None:
        """Tell a step: its metrics, and the messages of samples that were left out."""
        global_step = metrics["global_step"]
        self.metrics_file.append(metrics)
        for problem in problems:
            logger.warning(f"left out   {problem}")
        loss = math.nan if metrics["loss"] is None else metrics["loss"]
        line = f"loss {loss:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"
        self.progress.set_postfix_str(line)
        self.progress.update()
        if global_step % max(1, self.num_steps // 20) == 0:
            logger.info(f"step {global_step:>7,}/{self.num_steps:,}   {line}")

    def evaluation(self, global_step: int, scores: dict) -> None:
        """Tell what evaluate() has found after so many steps; nothing, where a signal ended it."""
        if not scores:
            return
        self.metrics_file.append({"global_step": global_step, **scores})
        line = f"held-out loss {scores['eval_loss']:.4f}"
        if "eval_exact_match" in scores:
            line += (
                f", {scores['eval_exact_match']:.1%} of answers exact, "
                f"character error rate {scores['eval_character_error_rate']:.1%}"
            )
        line += f", metric {scores['eval_metric']:.4f}" if "eval_metric" in scores else ""
        logger.info(f"step {global_step:>7,}/{self.num_steps:,}   {line}")

    def close(self, is_saved: bool) -> list[str]:
        """Give a disk that has refused metrics, or a last checkpoint, time; return what is lost."""
        self.progress.close()
        if on_main_process(self.metrics_file.is_waiting) or not is_saved:
            logger.error(f"once more, for the last time, in {LAST_CHANCE_SECONDS} s")
            time.sleep(LAST_CHANCE_SECONDS)
            folder = self.metrics_file.path.parent
            with suppress(OSError):  # one that was deleted; until now it might have come back
                on_main_process(folder.mkdir, parents=True, exist_ok=True)
        num_lost = on_main_process(self.metrics_file.give_up)
        return [f"{num_lost} lines of metrics.jsonl"] if num_lost else []


def count_weights(parameters) -> int:
    """Return how many weights parameters are: those of 4 bits are two to a byte, in columns."""
    return sum(
        p.numel() if p.is_floating_point() else 2 * p.numel() * (p.ndim > 1) for p in parameters
    )


def _log_setup(config, model, data, eval_data, num_steps, device) -> None:
    num_weights = count_weights(model.parameters())
    logger.info(
        f"model      {config.model_name_or_path}: {num_weights / 1e6:,.1f} M parameters "
        f"on {device}, {config.precision}, attention {model.config._attn_implementation}"
    )
    is_lean_on_cuda = config.precision == "bf16_lean" and device.type == "cuda"
    parts = ["layers"] * config.compile + ["AdamW's step"] * is_lean_on_cuda
    if parts:
        logger.info(f"compiled   {', '.join(parts)}: the first steps can take minutes")
    logger.info(f"data       {' '.join(config.train_data)}: {data.index.summary()}")
    if eval_data:
        logger.info(f"held out   {' '.join(config.eval_data)}: {eval_data.index.summary()}")
    for problem in data.problems + (eval_data.problems if eval_data else []):
        logger.warning(f"left out   {problem}")
    logger.info(
        f"steps      {num_steps} of {config.batch_size} samples ({data.plan.num_steps_per_epoch} "
        f"an epoch), in micro-batches of at most {config.max_tokens:,} tokens; learning rate "
        f"{config.learning_rate:g}"
    )
    logger.info(
        f"output     {config.output_dir}, with a checkpoint every {config.save_steps} steps and at "
        "the end"
    )
    if world_size() > 1:
        shards = shard_size(config)
        logger.info(
            f"ranks      {world_size()}: {world_size() // shards} replicas, each over {shards}"
        )
    requirements = Path(__file__).resolve().parent.parent / "requirements.txt"
    _, other = find_differences(read_requirements(requirements))
    if other:
        logger.warning(f"versions   not tested: {', '.join(other)}")


class MetricsFile:
    """Appends JSON objects to a metrics.jsonl, each of them once.

    Where that fails (a full disk, a vanished folder), that is logged, and the objects wait until
    it works again. `report` is called with the numbers of each of them.
    """

    def __init__(self, path: Path, report: Callable[[dict], None] = lambda row: None):
        self.path, self.report = path, report
        self._waiting = []
        atexit.register(self.give_up)  # however the run ends

    def append(self, row: dict) -> None:
        """Append `row` and whatever waits."""
        # JSON has no NaN: null, as of a step that was skipped.
        row = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        try:
            # What has an entry for each rank is in the file alone.
            self.report({k: value for k, value in row.items() if isinstance(value, int | float)})
        except (Exception, SystemExit) as error:  # whatever a package does whose server is down
            logger.warning(REPORT_FAILS.format(error))
            self.report = lambda row: None
        self._waiting.append(json.dumps(row) + "\n")
        self._write()

    def is_waiting(self) -> bool:
        """Return whether there are objects that could not be written yet."""
        return bool(self._waiting)

    def give_up(self) -> int:
        """Try for the last time to write what waits; say and return how many objects are lost."""
        if self._waiting:
            self._write()
        if num_lost := len(self._waiting):
            logger.error(f"{self.path}: the last {num_lost} lines are lost")
            self._waiting.clear()
        return num_lost

    def _write(self) -> None:
        try:
            check_claim(self.path.parent)
            with self.path.open("ab") as file:
                end = file.tell()
                try:
                    file.write("".join(self._waiting).encode())
                    file.flush()
                except OSError:
                    os.truncate(self.path, end)  # no half line
                    raise
        except OSError as error:
            if len(self._waiting) == 1:
                logger.error(f"{self.path} cannot be written, will try again: {error}")
        else:
            self._waiting.clear()


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on."""
    names = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "peft", "av")
    names += ("pillow", "numpy")
    installed = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **installed}


def open_reporter(config: Config, output_dir: Path) -> Callable[[dict], None]:
    """Return the function that sends one object of metrics.jsonl where --report_to says.

    Where the package fails, that is logged, and nothing is sent.
    """
    try:
        if config.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(output_dir)

            def report(metrics: dict) -> None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, metrics["global_step"])
                writer.flush()  # else the last two minutes of a run that is killed are lost

            return report
        if config.report_to != "none":
            # wandb, and trackio, which is made to be called like it. Both finish when Python exits.
            package = importlib.import_module(config.report_to)
            flags = dataclasses.asdict(config)
            package.init(project="finetune-Qwen2-VL", name=output_dir.name, config=flags)
            return lambda metrics: package.log(metrics, step=metrics["global_step"])
    except (Exception, SystemExit) as error:
        logger.warning(REPORT_FAILS.format(error))
    return lambda metrics: None


def tell_the_end(output_dir: Path) -> None:
    """Say how many samples a run was without, where there are any, and draw its losses.

    Also before a resume. Those that were known before the first step stand at step 0 of the
    metrics, those that only decoding found at the steps that they belonged to.
    """
    file = output_dir / "metrics.jsonl"
    if not file.is_file():
        return  # lost, which is told
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    counts = [(row["global_step"], row.get("num_bad_samples", 0)) for row in rows]
    before = sum(count for step, count in counts if step == 0)
    undecodable = sum(count for step, count in counts if step > 0)
    if before or undecodable:
        logger.warning(
            f"left out   altogether: {before:,} samples before the first step, and "
            f"{undecodable:,} in the steps, where they could not be decoded"
        )
    try:
        plot_loss(rows, output_dir / "loss.png")
    except Exception as error:  # the model is written: a picture less is no failure
        logger.warning(f"{output_dir / 'loss.png'} could not be drawn: {error!r:.300}")


def plot_loss(rows: list[dict], output_file: Path) -> None:
    """Draw the losses in the rows of a metrics.jsonl over the steps, and a running mean."""
    # Imported here: it takes a second, and only the end of a run needs it.
    from matplotlib.figure import Figure

    trained = [row for row in rows if row.get("loss") is not None]
    steps, losses = [row["global_step"] for row in trained], [row["loss"] for row in trained]
    evaluated = [row for row in rows if row.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="each step")
    window = max(1, len(losses) // 20)
    if window > 1:
        means = [
            sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window)
            for i in range(len(losses))
        ]
        axes.plot(steps, means, color="#1f4e8c", linewidth=2, label=f"mean of {window} steps")
    if evaluated:
        points = [row["global_step"] for row in evaluated], [row["eval_loss"] for row in evaluated]
        axes.plot(*points, color="#c2571a", marker="o", markersize=4, label="held-out data")
    axes.set(xlabel="step", ylabel="loss per supervised token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output_file, dpi=120)
