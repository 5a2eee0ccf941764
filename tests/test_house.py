"""The house: imports go down only, and the training step is in the two scripts alone."""

import ast
import os
import subprocess
import sys

import pytest

from helpers import REPO

# From the bottom up; a file imports from floors below it, and from its own.
FLOORS = [
    {"util", "util.check_requirements", "util.config"},
    {"util.survive"},
    {"util.run"},
    {"util.output_dir"},
    {"util.media"},
    {"util.vision_util"},
    {"util.data"},
    {"util.logutil"},
    {"util.model", "util.optim"},
    {"util.checkpoint", "util.distributed", "util.shards"},
    {"util.tools"},
]


def modules():
    """Yield (path, module name) of every file under util/."""
    for path in sorted((REPO / "util").rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(name):
    """Return the number of the floor of a module: its own, or that of its folder."""
    candidates = {name, name.rpartition(".")[0]}
    (floor,) = [i for i, names in enumerate(FLOORS) if names & (candidates - {"util"} or {name})]
    return floor


def own_imports(path):
    """Return the modules of util that a file imports, wherever in it."""
    names = {name for _, name in modules()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("util"):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & names
            found |= inner or {node.module}
    return found


def test_imports_go_down_and_never_in_a_circle():
    above = {name: own_imports(path) for path, name in modules()}
    for name, imported in above.items():
        for other in imported:
            assert floor_of(other) <= floor_of(name), f"{name} imports {other}"
    while above:  # take away what imports nothing that is left
        free = {name for name, imported in above.items() if not imported & above.keys()}
        assert free, f"a circle in {sorted(above)}"
        above = {name: imported for name, imported in above.items() if name not in free}


def test_nothing_under_util_trains():
    for path, name in modules():
        if name != "util.tools.planner":  # it runs a step on tensors without memory
            for call in (".backward(", "optimizer.step(", "zero_grad("):
                assert call not in path.read_text(encoding="utf-8"), f"{name}: {call}"


def test_functions_fit_on_a_screen():
    scripts = [(path, path.stem) for path in REPO.glob("*.py")]
    for path, name in (*modules(), *scripts):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name != "train":
                assert node.end_lineno - node.lineno < 50, f"{name}.{node.name}"


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_how_threads_wait_is_set_before_torch_reads_it(own):
    """In every script, and never over a setting of the user's."""
    names = [
        "finetune",
        "finetune_distributed",
        "check_data",
        "compare",
        "util.tools.merge_adapter",
    ]
    names += ["test_on_official_model", "test_on_trained_model_by_us"]
    program = (
        "import os, sys\n"
        "class Torch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "            raise SystemExit\n"
        "sys.meta_path.insert(0, Torch())\n"
        "__import__(sys.argv[1])\n"
    )
    spin = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {k: v for k, v in os.environ.items() if k not in spin} | own
    expected = own.get("GOMP_SPINCOUNT", "None" if own else "700")
    for name in names if not own else names[:1]:
        command = [sys.executable, "-c", program, name]
        printed = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
        assert printed.stdout.strip() == expected, (name, printed)
