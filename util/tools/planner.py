"""What a run needs: memory by kind, operations, and the flags that would make it fit.

Nothing here needs weights or a GPU: a step runs on tensors that have shapes and no memory.
"""

import weakref
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import psutil
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from util.config import Config, UserError, has_bitsandbytes
from util.data.batch import MicroBatch, PlannedData
from util.model.attention import register_attention
from util.model.families import layers_of, vision_width
from util.model.inputs import InputBuilder
from util.model.load import empty_model
from util.model.loss import cross_entropy_sum
from util.model.parts import prepare_for_training
from util.optim import moment_bytes
from util.run import shard_size

# Flags to try where memory is short, in this order: those that leave the mathematics alone first.
SAVERS = (
    {"gradient_checkpointing": "all"},
    {"gradient_checkpointing": "all", "precision": "bf16_lean"},
    {"gradient_checkpointing": "all", "train": ["llm"]},
    {"gradient_checkpointing": "all", "train": ["llm"], "precision": "bf16_lean"},
    {"gradient_checkpointing": "all", "lora_rank": 64},
    {"gradient_checkpointing": "all", "lora_rank": 64, "precision": "bf16_lean"},
    {"gradient_checkpointing": "all", "lora_rank": 64, "precision": "bf16_4bit"},
)
GIB = 2**30


class StateBytes(NamedTuple):
    """Bytes that stand on the device from the first step to the last."""

    weights: int
    gradients: int
    optimizer: int


def count_states(model_config, config: Config) -> StateBytes:
    """Return what weights, gradients and AdamW's moments take, over all GPUs together."""
    model = empty_model(model_config)
    prepare_for_training(model, config)
    return _states_of(model, config)


def _states_of(model, config: Config) -> StateBytes:
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    gradients = sum(p.numel() * p.itemsize for p in trained)
    return StateBytes(weights, gradients, sum(moment_bytes(p, config) for p in trained))


def check_fits(folder: str, config: Config, device: torch.device) -> None:
    """Raise UserError where weights, gradients and moments alone exceed the device's free memory.

    Called before the model in `folder` is loaded. It names the flags with which they would not.
    """
    model_config = transformers.AutoConfig.from_pretrained(folder)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    num_shards = shard_size(config)
    needed = sum(count_states(model_config, config)) / num_shards
    if needed <= free:
        return
    totals = {
        flags: sum(count_states(model_config, candidate)) / num_shards
        for flags, candidate in _savers(config).items()
    }
    fitting = [f"  {flags}: {t / GIB:.1f} GiB" for flags, t in totals.items() if t < free]
    raise UserError(
        f"weights, gradients and optimizer state take {needed / GIB:.1f} GiB, and {device} has "
        f"{free / GIB:.1f} GiB free. "
        + ("These flags fit:\n" + "\n".join(fitting) if fitting else "No flags make it fit: take "
           "a smaller model, or more GPUs (finetune_distributed.sh)")
        + "\nWith activations: python check_data.py, the same flags, and --plan GIB"
    )  # fmt: skip


def _savers(config: Config) -> dict[str, Config]:
    """Return, by their flags, what SAVERS make of `config`; an adapter keeps its rank."""
    savers = {}
    for changes in SAVERS:
        if config.lora_rank:
            changes = {name: value for name, value in changes.items() if name != "lora_rank"}
        savers[flags_text(changes)] = replace(config, **changes)
    return {flags: saver for flags, saver in savers.items() if saver != config}


def flags_text(changes: dict) -> str:
    """Return changes of a configuration as flags on a command line."""
    values = {k: " ".join(v) if isinstance(v, list) else v for k, v in changes.items()}
    return " ".join(f"--{name} {value}" for name, value in values.items())


class _MemoryTracker(TorchDispatchMode):
    """Follows the bytes of all fake storages that operations make, and their peak.

    Operations that no fake tensor takes part in run on real memory: the model reads lengths and
    grids, and a fake tensor has no values. Views of the model's tensors make nothing new.
    `peak_beside_gradients`: of all but gradients, with bytes `in_flight` until backward has left
    those of all blocks. `peak_of_shard`: also with `bytes_left` for each value that it has left.
    """

    def __init__(self, model, in_flight: int, bytes_left: float):
        super().__init__()
        self.now = self.gradients = self.left = 0
        self.peak = self.peak_beside_gradients = self.peak_of_shard = 0
        self._bytes_left, self._in_flight = bytes_left, in_flight
        parameters = chain(*(block.parameters() for block in _blocks_of(model)))
        self._expected = {p for p in parameters if p.requires_grad}
        standing = chain(model.parameters(), model.buffers())
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in standing)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if FakeTensor not in types:
            with unset_fake_temporarily():
                return function(*args, **(kwargs or {}))
        if function is torch.ops.prim.device.default:  # most calls
            return args[0].fake_device
        self._note_peaks()
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self._follow(leaf.untyped_storage())
        # Autograd adds up gradients in place where nothing else holds the first, also no view, but
        # never fake ones (torch 2.14, `can_accumulate_inplace` in autograd/input_buffer.cpp). What
        # it would have reused is gone when the next operation begins.
        adds_up = not torch.is_grad_enabled() and function is torch.ops.aten.add.Tensor
        if not adds_up or args[0]._is_view():
            self._note_peaks()
        return result

    def _note_peaks(self) -> None:
        self.peak = max(self.peak, self.now)
        beside = self.now - self.gradients + self._in_flight
        self.peak_beside_gradients = max(self.peak_beside_gradients, beside)
        self.peak_of_shard = max(self.peak_of_shard, beside + self.left)

    def count_gradient(self, parameter) -> None:
        """Note that backward has left the gradient of a parameter."""
        self.gradients += parameter.grad.untyped_storage().nbytes()
        self.left += parameter.numel() * self._bytes_left
        self._expected.discard(parameter)
        if not self._expected:
            self._in_flight = 0

    def _follow(self, storage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())

    def _change(self, num_bytes: int) -> None:
        self.now += num_bytes


def plan_memory(
    model_config, processor, config: Config, data: PlannedData, shard_size: int
) -> dict:
    """Return GiB by kind, and the peak, of the step with the largest micro-batch of `data`.

    With `shard_size` GPUs sharing the states: of one of them, estimated from what fully_shard
    gathers and reduces, which counts as activations.
    """
    samples, is_accumulated = largest_micro_batch(data, model_config, config)
    micro_batch = data.samples.collate([data.samples[i] for i in samples])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _fake_model(model_config, config, mode)
    states = _states_of(model, config)
    if shard_size > 1 and config.uses_autocast:
        # So fully_shard gathers them, of which autocast then makes no copies.
        for parameter in chain(*(block.parameters() for block in _blocks_of(model))):
            if parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
    # From the second micro-batch of a step on, gradients stand already, but with shards not whole.
    num_passes = 1 + is_accumulated if shard_size == 1 else 1
    # Until backward ends, fully_shard keeps what it has reduced, in fp32, for replicas, also where
    # there is one (torch 2.14, `_all_reduce_state`). That is the gradient itself, unless this is
    # bf16 or stands already.
    bytes_left = 6 if config.precision == "bf16_lean" and not is_accumulated else 4
    with_logits, gathered, in_flight, at_the_end = _gathered_bytes(model)
    in_flight = in_flight if shard_size > 1 else 0
    tracker = _MemoryTracker(model, in_flight, bytes_left / shard_size)
    at_logits, logits_bytes = _follow_memory(
        tracker, model, processor, micro_batch, config, mode, num_passes
    )
    activations = tracker.peak_beside_gradients
    if shard_size == 1:  # gradients grow while activations fall
        passes = states.weights + states.optimizer + tracker.peak
    else:
        begun = sum(states) - (0 if is_accumulated else states.gradients)
        passes = begun / shard_size + max(
            at_logits + with_logits, tracker.peak_of_shard + gathered, tracker.left + at_the_end
        )
        activations = max(activations + gathered, passes - sum(states) / shard_size)
    kinds = {
        **{name: size / shard_size for name, size in states._asdict().items()},
        "activations": activations - logits_bytes,
        "logits": logits_bytes,
        "peak": max(passes, sum(states) / shard_size),
    }
    result = {f"{kind}_gib": round(size / GIB, 3) for kind, size in kinds.items()}
    return result | {"num_tokens": micro_batch.input_ids.shape[1], "num_samples": len(samples)}


def _fake_model(model_config, config: Config, mode: FakeTensorMode):
    register_attention("packed_sdpa")
    model = empty_model(
        model_config, dtype=torch.float32, attn_implementation="packed_sdpa"
    ).train()
    # What has no memory cannot be compiled; that it takes less is left aside.
    prepare_for_training(model, replace(config, compile=False))
    with mode:
        model.to_empty(device="cpu")
    model.tie_weights()  # to_empty gives each name a tensor of its own
    return model


def _follow_memory(
    tracker, model, processor, micro_batch: MicroBatch, config: Config, mode, num_passes: int
) -> tuple[int, int]:
    """Run forward and backward passes as the loop does, and let the tracker follow them.

    Return what was there when logits were, and what these took.
    """
    device = torch.device("cpu")
    inputs = InputBuilder(processor, "packed_sdpa", device)(micro_batch)
    pixel_values = inputs.pop("pixel_values")
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=config.uses_autocast, cache_enabled=False
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(tracker.count_gradient) for p in trained]
    with mode, tracker:
        for _ in range(num_passes):
            # Of a tensor of its own, or what is remembered of it would live on in backward.
            patches = [mode.from_tensor(torch.empty_like(pixel_values))]
            with autocast:
                logits = model(**inputs, pixel_values=patches.pop()).logits
            at_logits, logits_bytes = tracker.now, logits.numel() * logits.itemsize
            targets = micro_batch.targets
            # From here on as in finetune.py: a test compares these lines.
            loss_sum = cross_entropy_sum(logits, targets)
            del logits
            loss_sum.backward()
            for hook in hooks:
                hook.remove()
    return at_logits, logits_bytes


def _blocks_of(model) -> list:
    """Return what fully_shard gathers for itself in bf16, where that is what is computed in."""
    vision_blocks, layers = layers_of(model)
    return [*vision_blocks, *layers, *([] if model.config.tie_word_embeddings else [model.lm_head])]


def _gathered_bytes(model) -> tuple[int, int, int, int]:
    """Return what is whole on every GPU with the logits, in backward, and when that ends.

    The third is of the largest block alone, in backward. In the forward pass, weights of a block
    are there twice, as they came and in their places. Its gradients are reduced in fp32, with the
    weights of the next one there. The logits' matrix follows the loss; of the rest, gradients are
    whole until the end, where embeddings that are not tied to it have theirs.
    """

    def size(module, weights: int, gradients: int, reduced: int) -> int:
        total = 0
        for p in module.parameters():
            trained = p.requires_grad * (gradients * p.itemsize + reduced)
            total += p.numel() * (weights * p.itemsize + trained)
        return total

    def size_of_rest(*each: int) -> int:
        return size(model, *each) - sum(size(block, *each) for block in _blocks_of(model))

    most = max(size(block, 2, 1, 4) for block in chain(*layers_of(model)))
    embeddings = model.get_input_embeddings()
    at_logits = size_of_rest(1, 0, 0)
    # Of tied ones, the tracker follows the logits' part of the gradient until theirs is added.
    during = size_of_rest(1, 1, 0) - size(embeddings, 0, 1, 0)
    if not model.config.tie_word_embeddings:
        most = max(most, size(model.lm_head, 0, 0, 4))
        during -= size(embeddings, 1, 0, 0)
        at_logits += size(model.lm_head, 2, 0, 0) - size(embeddings, 1, 0, 0)
    return at_logits, during, most, size_of_rest(1, 0, 4)


def largest_micro_batch(data: PlannedData, model_config, config: Config, most_steps: int = 5000):
    """Return the samples of the micro-batch that needs most, and whether steps have several.

    Looked for in the first epoch, by what a text token, a patch and a supervised token keep.
    """
    text, vision = model_config.text_config, model_config.vision_config
    is_checkpointed = {
        part: config.gradient_checkpointing in (part, "all") for part in ("llm", "vision")
    }
    per_token = text.num_hidden_layers * text.hidden_size * (1 if is_checkpointed["llm"] else 16)
    per_patch = vision.depth * vision_width(vision) * (1 if is_checkpointed["vision"] else 16)
    if "vision" not in config.trained_parts:
        per_patch = 0  # a frozen tower keeps nothing
    index, plan = data.index, data.plan
    media = index.num_image_tokens + index.num_video_tokens
    cost = index.num_tokens * per_token + media * 4 * per_patch
    cost = cost + index.num_supervised_tokens * text.vocab_size
    num_steps = min(plan.num_steps_per_epoch, most_steps)
    micro_batches = [step.micro_batches[0] for step in plan.steps(0, num_steps)]
    every = [samples for step in micro_batches for samples in step]
    largest = max(every, key=lambda samples: int(cost[samples].sum()))
    return largest, any(len(step) > 1 for step in micro_batches)


def fitting_flags(
    model_config, processor, config: Config, data: PlannedData, shard_size: int, limit_gib: float
) -> tuple[str, float] | None:
    """Return the first flags of SAVERS with which a step fits into `limit_gib`, and its peak."""
    for flags, candidate in _savers(config).items():
        if candidate.precision == "bf16_4bit" and not has_bitsandbytes():
            continue  # its step cannot be run
        if sum(count_states(model_config, candidate)) / shard_size < limit_gib * GIB:
            needed = plan_memory(model_config, processor, candidate, data, shard_size)
            if needed["peak_gib"] <= limit_gib:
                return flags, needed["peak_gib"]
    return None
