"""What the benchmarks share: the embedded model, measuring in a process of its own, tables."""

import json
import resource
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def load_tiny(**flags):
    """Return configuration, processor and encoder of the embedded tiny model."""
    # Not at the top: bench_video starts many processes, which have no use for transformers.
    from util.config import Config, fill_defaults
    from util.model.load import build_encoder, find_model, load_processor

    config = fill_defaults(Config(model_name_or_path="tiny", **flags), "cpu")
    processor = load_processor(find_model("tiny"), config)
    return config, processor, build_encoder(find_model("tiny"), processor, config)


def run_alone(function: str, *arguments) -> dict:
    """Call a function of a benchmark, such as bench_2b.measure, in a process of its own.

    Arguments are what JSON can hold, and so is the object that is returned. Where the function
    fails, the object has one key, error.
    """
    module, name = function.split(".")
    code = f"import json, sys\nfrom benchmarks.{module} import {name}\n"
    code += f"print(json.dumps({name}(*json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if done.returncode < 0:
        return {"error": f"ended by signal {-done.returncode}, as when memory is full"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:100]}
    return json.loads(done.stdout.splitlines()[-1])


def resident_gib() -> float:
    """Return the peak of this process's resident memory so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def print_row(*cells) -> None:
    """Print a row of a table in Markdown, small fractions with two digits."""
    texts = []
    for cell in cells:
        is_small = isinstance(cell, float) and abs(cell) < 100
        texts.append(str(cell) if isinstance(cell, str) else f"{cell:,.{2 * is_small}f}")
    print(f"| {' | '.join(texts)} |", flush=True)


def print_header(*names: str) -> None:
    print_row(*names)
    print("|" + "---|" * len(names))
