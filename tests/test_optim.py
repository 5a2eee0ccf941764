"""AdamW of bf16_lean, whose moments take 8 bits, against what it stands for."""

import copy

import pytest
import torch

from helpers import tiny_config
from util import optim
from util.optim import build_optimizer, lean_block_size, set_learning_rate

# Of blocks of 256, 196, 228 and 256 values. Of the others, moments are fp32.
SHAPES = [(300, 512), (90, 3, 2, 14, 14), (100, 228), (7, 1536), (64,), (40, 61)]


def build(precision="bf16_lean"):
    """Return weights of 0.02 to 0.04, of which bf16 knows every 1.2e-4th, and their optimizer."""
    torch.manual_seed(0)
    weights = [(0.02 + 0.02 * torch.rand(shape)).bfloat16() for shape in SHAPES]
    model = torch.nn.ParameterList(w.float() if precision == "fp32" else w for w in weights)
    optimizer = build_optimizer(model, tiny_config(precision=precision, weight_decay=10.0))
    set_learning_rate(optimizer, 0, 1, tiny_config(learning_rate=1e-5))
    return model, optimizer


def train(model, optimizer, num_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for _ in range(num_steps):
        for weight in model:
            gradient = torch.rand(weight.shape, generator=generator) - 0.2
            weight.grad = gradient.bfloat16().to(weight.dtype)
        optimizer.step()


def assert_equal_moments(optimizer, other):
    for state, other_state in zip(optimizer.state.values(), other.state.values(), strict=True):
        for name, tensor in state.items():
            assert tensor.dtype == other_state[name].dtype
            assert torch.equal(tensor, other_state[name]), name


def test_weights_of_bf16_move_as_those_of_fp32_on_average():
    """Ten steps of 1e-5: rounded to the nearest, they would stay, and cut off, move too far."""
    model, optimizer = build()
    exact, exact_optimizer = build("fp32")
    before = [weight.detach().clone() for weight in exact]
    train(model, optimizer, 10)
    train(exact, exact_optimizer, 10)
    for ours, theirs, old in zip(model, exact, before):
        moved = (theirs - old).mean().item()
        assert abs(moved) > 5e-5
        few = ours.numel() < 4096  # the chance of each weight counts
        assert (ours - old).mean().item() == pytest.approx(moved, rel=0.5 if few else 0.05)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_are_the_nearest_of_their_values(signed):
    torch.manual_seed(0)
    moment = torch.randn(200, 256) * 10.0 ** torch.randint(-9, 3, (200, 256))
    moment = moment if signed else moment.abs()
    moment[0] = 0
    codes, scales = torch.zeros(200, 256, dtype=torch.uint8), torch.zeros(200, 1)
    code = optim.make_code(signed)
    optim.encode(moment, codes, scales, code)
    decoded = optim.decode(codes, scales, code)
    distances = (moment[..., None].double() - scales[..., None].double() * code[0]).abs()
    nearest = distances.amin(-1)
    assert (((moment - decoded).abs() - nearest) <= 1e-6 * scales).all()
    assert torch.equal(decoded[0], moment[0])


def test_what_is_cut_or_joined_does_not_matter(monkeypatch):
    model, optimizer = build()
    train(model, optimizer, 3)
    for num_values in (3000, 40_000, 10**6):
        monkeypatch.setitem(optim.LEAN_VALUES, "cpu", num_values)
        other, other_optimizer = build()
        train(other, other_optimizer, 3)
        assert_equal_moments(optimizer, other_optimizer)
        for weight, other_weight in zip(model, other):  # which are rounded by other numbers
            assert (weight - other_weight).abs().max() < 3 * 2.5e-4


def test_a_state_comes_back_to_the_last_bit():
    model, optimizer = build()
    train(model, optimizer, 2)
    other, other_optimizer = build()
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        assert_equal_moments(optimizer, other_optimizer)
        assert all(map(torch.equal, model, other))
        train(model, optimizer, 1, seed=1)
        train(other, other_optimizer, 1, seed=1)


@pytest.mark.slow  # half a minute of compiling, as on CUDA
def test_what_is_compiled_is_what_is_not():
    model, optimizer = build()
    train(model, optimizer, 3)
    other, other_optimizer = build()
    other_optimizer._update = torch.compile(optim._update_lean, fullgraph=True, dynamic=False)
    train(other, other_optimizer, 3)
    for weight, compiled in zip(model, other):
        states = optimizer.state[weight], other_optimizer.state[compiled]
        for name, tensor in states[0].items():
            if tensor.dtype == torch.uint8:
                assert (tensor != states[1][name]).float().mean() < 1e-3
            else:
                torch.testing.assert_close(tensor, states[1][name])
        assert (weight - compiled).abs().max() < 3 * 2.5e-4
        assert (weight - compiled).mean().abs() < 2e-6


def test_8_bit_moments_are_those_of_whole_rows():
    """Shards are rows: no block of values with one scale may lie in two of them."""

    def size(*shape):
        return lean_block_size(torch.empty(shape, device="meta"))

    assert size(256, 1536) == size(1280, 1280) == 256
    assert (size(8192, 29568), size(1280, 3420), size(1280, 3, 2, 14, 14)) == (231, 228, 196)
    assert size(5120) is size(8, 128) is size(4096, 61) is None


def test_the_second_moments_of_norms_and_biases_fall_in_bf16_lean():
    """Kept in bf16, they would never: 0.999 of a value is rounded back to the value."""
    bias = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    model = torch.nn.ParameterDict({"bias": bias})
    optimizer = build_optimizer(model, tiny_config(precision="bf16_lean"))
    set_learning_rate(optimizer, 0, 1, tiny_config(learning_rate=1e-5))
    for step in range(1000):
        bias.grad = torch.full_like(bias, 7.0 if step < 3 else 0.1)
        optimizer.step()
    expected = sum(0.001 * 0.999 ** (999 - i) * (49 if i < 3 else 0.01) for i in range(1000))
    assert optimizer.state[bias]["exp_avg_sq"].float().mean() == pytest.approx(expected, rel=0.01)
