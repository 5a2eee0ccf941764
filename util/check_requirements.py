"""Check that Python is new enough and the packages of files are installed; nothing is changed.

    python util/check_requirements.py [requirements.txt ...]

A missing package is an error. Another version than the tested one is a warning in one line.
"""

import importlib.metadata
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 11)  # of numpy and pillow in requirements.txt


def read_requirements(path: Path) -> dict[str, str]:
    """Return {name: version} of the `name==version` lines of a file and of those it includes."""
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            pins |= read_requirements(path.parent / line[3:].strip())
        elif line:
            name, version = line.split("==")
            pins[name] = version
    return pins


def find_differences(pins: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return which packages are not installed, and which are of another version."""
    missing, other = [], []
    for name, version in pins.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        # A local part names a build, such as 2.14.1+cu130.
        if installed.split("+")[0] != version:
            other.append(f"{name} {installed} (tested: {version})")
    return missing, other


def main() -> None:
    if sys.version_info < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        sys.exit(
            f"error: {sys.executable} is Python {'.'.join(map(str, sys.version_info[:3]))}, and "
            f"{needed} or newer is needed. Outside of any environment, "
            f"PYTHON=python{needed} ./finetune.sh takes another one"
        )
    pins = {}
    for path in sys.argv[1:]:
        pins |= read_requirements(Path(path))
    missing, other = find_differences(pins)
    if other:
        print("warning: versions that were not tested: " + ", ".join(other), file=sys.stderr)
    if missing:
        sys.exit(
            f"error: the active environment {sys.prefix} lacks {', '.join(missing)}. It is not "
            f"changed for you: run\n  pip install -r {sys.argv[1]}\nor deactivate it, and an "
            "environment of its own is made in .venv"
        )


if __name__ == "__main__":
    main()
