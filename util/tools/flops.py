"""How much a step has to compute: floating-point operations, from shapes and token counts alone."""

import re
import resource
from itertools import chain

import torch
import transformers

from util.config import Config
from util.data.batch import PlannedData
from util.data.index import Index
from util.data.plan import Plan, Step
from util.logutil import count_weights
from util.model.families import layers_of, part_of, state_size, vision_width

# Text and vision shapes of the published models, of the config.json files at
# https://huggingface.co/Qwen; what is left out is as transformers' Qwen2VLConfig has it.
SHAPE_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE_NAMES += ("num_key_value_heads", "vocab_size")
PUBLISHED_SHAPES = {
    "Qwen/Qwen2-VL-2B-Instruct": (1536, 8960, 28, 12, 2, 151936),
    "Qwen/Qwen2-VL-7B-Instruct": (3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2-VL-72B-Instruct": (8192, 29568, 80, 64, 8, 152064),
}

# Dense bf16 operations a second, of the makers' data sheets; the longest name that fits counts.
PEAK_FLOPS = {
    **dict.fromkeys(("A100", "A800"), 312e12),
    "A40": 149.7e12,
    "A10": 125e12,
    "A10G": 70e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209.5e12,
    "RTX A6000": 154.8e12,
    "RTX 6000 Ada": 364e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H20": 148e12,
    **dict.fromkeys(("H100", "H200", "H800", "GH200"), 989e12),
    "H100 PCIe": 756e12,
    "B200": 2250e12,
}


def published_config(name: str) -> transformers.Qwen2VLConfig:
    """Return the configuration of a model in PUBLISHED_SHAPES."""
    shape = dict(zip(SHAPE_NAMES, PUBLISHED_SHAPES[name]))
    return transformers.Qwen2VLConfig(
        text_config=shape,
        vision_config={"hidden_size": shape["hidden_size"]},
        tie_word_embeddings="2B" in name,
    )


def peak_flops_of(name: str) -> float | None:
    """Return the operations a second that a GPU reaches in bf16, None where that is not known.

    `name` as NVIDIA's driver gives it, such as "NVIDIA H100 80GB HBM3".
    """
    words = set(re.split(r"[\s-]", name))
    known = [key for key in PEAK_FLOPS if words.issuperset(key.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def operations_per_weight(config: Config) -> dict[str, int]:
    """Return for each part the operations that a weight costs for each token.

    2 forward; 2 backward for the gradient of what the matrix was given, where something before it,
    or in it, is trained; 2 for the gradient of the weight itself, which LoRA does without.
    """
    trained = config.trained_parts
    own = set() if config.lora_rank else trained
    return {
        "llm": 4 + 2 * ("llm" in own),
        "merger": 2 + 2 * bool(trained & {"merger", "vision"}) + 2 * ("merger" in own),
        "vision": 2 + 2 * ("vision" in trained) + 2 * ("vision" in own),
    }


class FlopCounter:
    """Counts the operations of training on samples of an index, recomputation left out.

    The meta device serves for the model. Attention: 4 x width for each pair of tokens (patches) of
    one segment and layer, and twice that backward; no discount for the causal half. Linear
    attention: 6 x the state for each token, which is decayed, corrected and read.
    """

    def __init__(self, model, index: Index, config: Config):
        visual, (blocks, layers) = model.model.visual, layers_of(model)
        per_weight, weights = operations_per_weight(config), {"vision": 0, "merger": 0}
        for name, parameter in visual.named_parameters(prefix="model.visual"):
            if parameter.ndim > 1:
                weights[part_of(name)] += parameter.numel()
        decoder = count_weights(p for layer in layers for p in layer.parameters() if p.ndim > 1)
        patches = per_weight["vision"] * weights["vision"] * visual.spatial_merge_size**2
        heads = model.config.text_config.num_attention_heads
        attentions = [layer.self_attn for layer in layers if hasattr(layer, "self_attn")]
        text_width = heads * attentions[0].head_dim
        patch_width = vision_width(model.config.vision_config)
        vision_passes = 3 if per_weight["vision"] > 2 else 1
        # Each number of something in a sample, and the operations that one of it takes.
        media_tokens = index.num_image_tokens + index.num_video_tokens
        self.costs = [
            (index.num_tokens, per_weight["llm"] * decoder + 3 * 6 * state_size(layers)),
            (media_tokens, per_weight["merger"] * weights["merger"] + patches),
            (index.num_supervised_tokens, per_weight["llm"] * model.lm_head.weight.numel()),
            (index.num_tokens**2, 12 * len(attentions) * text_width),
            (index.num_patch_pairs, 4 * vision_passes * len(blocks) * patch_width),
        ]

    def __call__(self, samples: list[int]) -> int:
        return sum(int(counts[samples].sum()) * cost for counts, cost in self.costs)


class Throughput:
    """How fast a step was, and with how much memory: the fields of metrics.jsonl that say so.

    mfu: the share of the GPUs' peak that the model's own operations make up, those of the vision
    tower counted, recomputation not (https://arxiv.org/abs/2204.02311, appendix B). None where the
    peak is not known. data_wait_share: of the seconds, those in which the main process waited for
    data.
    """

    def __init__(self, model, data: PlannedData, config: Config, device: torch.device):
        self.count_flops, self.device = FlopCounter(model, data.index, config), device
        self.plan, self.num_dummy_tokens = data.plan, config.max_tokens - data.plan.capacity
        is_gpu = device.type == "cuda"
        self.peak = peak_flops_of(torch.cuda.get_device_name(device)) if is_gpu else None

    def __call__(self, step: Step, seconds: float, seconds_waited: float) -> dict:
        flops, num_gpus = self.count_flops(step.samples) / seconds, self.plan.world_size
        metrics = {
            "tokens_per_second": step.num_tokens / seconds,
            "supervised_tokens_per_second": step.num_supervised_tokens / seconds,
            "data_wait_share": seconds_waited / seconds,
            "tflops_per_second": flops / 1e12,
            "mfu": flops / (num_gpus * self.peak) if self.peak else None,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        if num_gpus > 1:
            metrics |= rank_metrics(self.plan, step, self.num_dummy_tokens)
        return metrics


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak so far in GiB: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def rank_metrics(plan: Plan, step: Step, num_dummy_tokens: int) -> dict:
    """Return lists, one entry a rank: its tokens in `step`, by kind, and its share of dummy work.

    They follow from the plan: nothing is asked of the other ranks.
    """
    index = plan.index
    ranks = [[*chain(*micro_batches)] for micro_batches in step.micro_batches]  # samples of each
    totals, images, videos = (
        [int(counts[samples].sum()) for samples in ranks]
        for counts in (index.num_tokens, index.num_image_tokens, index.num_video_tokens)
    )
    dummies = [num_dummy_tokens * len(micro_batches) for micro_batches in step.micro_batches]
    return {
        "num_text_tokens_by_rank": [t - i - v for t, i, v in zip(totals, images, videos)],
        "num_image_tokens_by_rank": images,
        "num_video_tokens_by_rank": videos,
        "dummy_share_by_rank": [round(d / (t + d), 4) for t, d in zip(totals, dummies)],
    }
