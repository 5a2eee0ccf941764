"""The log, the metrics file, and the loss plot."""

import json
import logging
import resource
import sys
from pathlib import Path

import torch
from tqdm import tqdm

logger = logging.getLogger("finetune")


class _TqdmHandler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(output_dir: Path) -> None:
    """Log to the terminal and to `output_dir`/train.log."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    terminal = _TqdmHandler()
    file = logging.FileHandler(output_dir / "train.log", encoding="utf-8")
    terminal.setFormatter(logging.Formatter("%(message)s"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(terminal)
    logger.addHandler(file)


def append_metrics(path: Path, metrics: dict) -> None:
    """Append one JSON object to a metrics.jsonl, whole."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak so far in GiB: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def plot_loss(metrics_file: Path, output_file: Path) -> None:
    """Draw the loss over the steps of a metrics.jsonl, and its running mean, as a PNG."""
    # Imported here: it takes a second, and only the end of a run needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row]
    steps, losses = [row["global_step"] for row in rows], [row["loss"] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="each step")
    window = max(1, len(losses) // 20)
    if window > 1:
        means = [
            sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window)
            for i in range(len(losses))
        ]
        axes.plot(steps, means, color="#1f4e8c", linewidth=2, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss per supervised token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output_file, dpi=120)
