"""Tokens a second where others use the cores too: how long should idle threads spin?

    python -m benchmarks.bench_busy
    python -m benchmarks.bench_busy --spins default 0 1000 --num_steps 60

finetune.py on tiny, with as many threads as torch takes: alone, three runs started at once (their
mean), and one beside four processes that compute. GOMP_SPINCOUNT says how often a thread of
libgomp looks for work before it sleeps; "default" is what libgomp does by itself, "ours" what
util/__init__.py sets. Rounds are interleaved, and medians of steps are shown, without the first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import REPO, print_header, print_row

BUSY = "while True: sum(range(10**6))"


def start_run(folder: Path, spin: str, num_steps: int) -> subprocess.Popen:
    """Start a run that writes into `folder`."""
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    if spin == "default":
        env["OMP_WAIT_POLICY"] = ""  # a setting of the user's own that sets nothing
    elif spin != "ours":
        env["GOMP_SPINCOUNT"] = spin
    flags = f"--model_name_or_path tiny --device cpu --num_workers 1 --max_steps {num_steps}"
    command = [sys.executable, "finetune.py", *flags.split(), "--output_dir", str(folder)]
    return subprocess.Popen(command, cwd=REPO, env=env, stderr=subprocess.DEVNULL)


def measure(spin: str, num_runs: int, num_busy: int, num_steps: int) -> float:
    """Return tokens a second of one run: the median step, and the mean over runs."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(num_busy)]
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / str(i) for i in range(num_runs)]
        runs = [start_run(path, spin, num_steps) for path in folders]
        codes = [run.wait() for run in runs]
        for process in busy:
            process.kill()
            process.wait()
        assert not any(codes), codes
        speeds = []
        for path in folders:
            rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
            speeds.append(statistics.median([row["tokens_per_second"] for row in rows][1:]))
    return statistics.mean(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--spins", nargs="+", default=["default", "0", "ours"])
    parser.add_argument("--num_steps", type=int, default=40)
    parser.add_argument("--num_rounds", type=int, default=3)
    arguments = parser.parse_args()
    cases = {"alone": (1, 0), "each of three": (3, 0), "beside four": (1, 4)}
    speeds = {(spin, case): [] for spin in arguments.spins for case in cases}
    for _ in range(arguments.num_rounds):
        for spin, case in speeds:
            speeds[spin, case].append(measure(spin, *cases[case], arguments.num_steps))
    print_header("tokens/s by GOMP_SPINCOUNT", *cases)
    for spin in arguments.spins:
        print_row(spin, *(f"{statistics.median(speeds[spin, case]):,.0f}" for case in cases))


if __name__ == "__main__":
    main()
