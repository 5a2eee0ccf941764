"""The chunked loss beside further terms on the same logits, and what it takes of memory."""

import ast

import pytest
import torch
import torch.nn.functional as F

from helpers import REPO
from util.model.loss import cross_entropy_sum


def plain_sum(logits, targets):
    return F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")


def square_of_logsumexp(logits):
    return logits.float().logsumexp(-1).square().sum()


TERMS = [square_of_logsumexp, lambda x: x.square().sum(), lambda x: x.softmax(-1).square().sum()]


def gradient_of(loss_function, term, place, dtype):
    """Return the gradient of loss and term; `place`: when the term is computed, and how."""
    torch.manual_seed(0)
    weight = torch.randn(16, 50, requires_grad=True)
    logits = (torch.randn(1, 7, 16) @ weight).to(dtype)
    targets = torch.randint(0, 50, (7,))
    if place == "before, one backward":
        value = term(logits)
        (loss_function(logits, targets) + value).backward()
    elif place == "after, one backward":
        loss_sum = loss_function(logits, targets)
        loss_sum = loss_sum + term(logits)
        del logits
        loss_sum.backward()
    elif place == "a backward of its own":
        loss_function(logits, targets).backward(retain_graph=True)
        term(logits).backward()
    return weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "place", ["before, one backward", "after, one backward", "a backward of its own"]
)
@pytest.mark.parametrize("term", TERMS)
def test_a_further_term_on_the_logits_is_exact_wherever_it_stands(term, place, dtype):
    expected = gradient_of(plain_sum, term, place, dtype)
    found = gradient_of(cross_entropy_sum, term, place, dtype)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("is_held", [False, True])
def test_the_gradient_takes_no_memory_of_its_own_where_nobody_holds_the_logits(is_held):
    places = []
    logits = torch.randn(1, 7, 50, requires_grad=True) * 2
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    place, before = logits.data_ptr(), logits.detach().clone()
    held = logits if is_held else None
    loss = cross_entropy_sum(logits, torch.arange(7))
    del logits
    loss.backward()
    assert (places == [place]) != is_held
    assert held is None or torch.equal(held, before)


def lines_of_the_loss(path, function):
    """Return what a function does between the targets and the letting go of the logits."""
    tree = ast.parse((REPO / path).read_text(encoding="utf-8"))
    (body,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function]
    lines = [ast.unparse(n) for n in ast.walk(body) if isinstance(n, ast.stmt)]
    (first,) = [i for i, line in enumerate(lines) if line.startswith("targets = ")]
    return lines[first + 1 : lines.index("del logits")]


def test_the_planner_computes_the_loss_of_the_loop():
    """A term that one of them lacks would be missing from the plan, or from the training."""
    loop = lines_of_the_loss("finetune.py", "train")
    assert loop and loop[0] == "loss_sum = cross_entropy_sum(logits, targets)"
    assert lines_of_the_loss("finetune_distributed.py", "train") == loop
    assert lines_of_the_loss("util/tools/planner.py", "_follow_memory") == loop
