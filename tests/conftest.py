"""What tests begin with; the fixtures that they share are in shared_fixtures.py."""

import importlib
import multiprocessing
import signal

import pytest

import zygote

# What a shell runs in the background ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Begun first, since at the end one process would wait for them.
LONGEST = ["nullgpu", "distributed", "end_to_end", "readme", "terminals", "checkpoint", "families"]
LONGEST = [f"test_{name}.py" for name in [*LONGEST, "planner", "faults", "contributing"]]


def pytest_configure(config):
    """Import what tests need, but not in a process that only deals tests out to others."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        zygote.begin()
        config.pluginmanager.register(importlib.import_module("shared_fixtures"))


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


def pytest_sessionfinish():
    """End the loader's workers of runs that have failed: Python would wait for them."""
    for worker in multiprocessing.active_children():
        worker.kill()


@pytest.fixture(autouse=True)
def signal_handlers():
    """Take back the handlers that a training in this process leaves behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
