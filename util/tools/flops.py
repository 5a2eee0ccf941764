"""How much a step has to compute: floating-point operations, from shapes and token counts alone."""

import re
from dataclasses import dataclass

import torch
import transformers

from util.config import Config
from util.data.batch import PlannedData
from util.data.index import Index
from util.data.plan import Step
from util.model.families import part_of

# Text and vision shapes of the published models, of the config.json files at
# https://huggingface.co/Qwen; what is left out is as transformers' Qwen2VLConfig has it.
PUBLISHED_SHAPES = {
    "Qwen/Qwen2-VL-2B-Instruct": {"hidden_size": 1536, "intermediate_size": 8960}
    | {"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
    | {"vocab_size": 151936},
    "Qwen/Qwen2-VL-7B-Instruct": {"hidden_size": 3584, "intermediate_size": 18944}
    | {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"vocab_size": 152064},
    "Qwen/Qwen2-VL-72B-Instruct": {"hidden_size": 8192, "intermediate_size": 29568}
    | {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    | {"vocab_size": 152064},
}

# Dense bf16 operations a second, of the makers' data sheets; the longest name that fits counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
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
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
}


def published_config(name: str) -> transformers.Qwen2VLConfig:
    """Return the configuration of a model in PUBLISHED_SHAPES."""
    shape = PUBLISHED_SHAPES[name]
    return transformers.Qwen2VLConfig(
        text_config=dict(shape),
        vision_config={"hidden_size": shape["hidden_size"]},
        tie_word_embeddings="2B" in name,
    )


def peak_flops(device: torch.device) -> float | None:
    """Return the operations a second that a GPU can reach in bf16, None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """Return it for a name as NVIDIA's driver gives it, such as "NVIDIA H100 80GB HBM3"."""
    words = set(re.split(r"[\s-]", name))
    known = [key for key in PEAK_FLOPS if words.issuperset(key.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass
class Shape:
    """Weights in the matrices of a model, by what uses them, and what attention works on."""

    decoder: int
    lm_head: int
    vision: int
    merger: int
    text_hidden: int  # heads x their width
    text_layers: int
    vision_hidden: int
    vision_layers: int
    patches_per_token: int


def shape_of(model) -> Shape:
    """Count the weights of a Qwen2-VL; the meta device serves."""
    visual, text = model.model.visual, model.model.language_model
    vision, merger = 0, 0
    for name, parameter in visual.named_parameters(prefix="model.visual"):
        if parameter.ndim > 1:
            if part_of(name) == "merger":
                merger += parameter.numel()
            else:
                vision += parameter.numel()
    attention = text.layers[0].self_attn
    return Shape(
        sum(p.numel() for p in text.layers.parameters() if p.ndim > 1),
        model.get_output_embeddings().weight.numel(),
        vision,
        merger,
        attention.config.num_attention_heads * attention.head_dim,
        len(text.layers),
        visual.blocks[0].attn.dim,
        len(visual.blocks),
        visual.spatial_merge_size**2,
    )


ALL_TRAINED = {"llm": 6, "merger": 6, "vision": 6}


def operations_per_weight(config: Config) -> dict[str, int]:
    """Return for each part the operations that a weight costs for each token.

    2 forward; 2 backward for the gradient of what the matrix was given, where something before it,
    or in it, is trained; 2 for the gradient of the weight itself, which LoRA does without.
    """
    trained = config.trained_parts
    own = {part: 2 if part in trained and not config.lora_rank else 0 for part in ALL_TRAINED}
    return {
        "llm": 4 + own["llm"],
        "merger": 2 + 2 * bool(trained & {"merger", "vision"}) + own["merger"],
        "vision": 2 + 2 * ("vision" in trained) + own["vision"],
    }


def count_flops(
    shape: Shape,
    num_tokens,
    num_media_tokens,
    num_supervised,
    token_pairs,
    patch_pairs,
    per_weight=ALL_TRAINED,
):
    """Return the operations of forward and backward passes, recomputation not counted.

    Attention: 4 x width for each pair of tokens (patches) of one segment and layer, and twice that
    backward; no discount for the causal half.
    """
    vision_attention = 12 if per_weight["vision"] > 2 else 4
    return (
        per_weight["llm"] * (shape.decoder * num_tokens + shape.lm_head * num_supervised)
        + per_weight["merger"] * shape.merger * num_media_tokens
        + per_weight["vision"] * shape.vision * shape.patches_per_token * num_media_tokens
        + 12 * shape.text_layers * shape.text_hidden * token_pairs
        + vision_attention * shape.vision_layers * shape.vision_hidden * patch_pairs
    )


class FlopCounter:
    """Counts the operations of training on samples of an index."""

    def __init__(self, model, index: Index, config: Config):
        self.shape, self.index = shape_of(model), index
        self.per_weight = operations_per_weight(config)

    def __call__(self, samples: list[int]) -> int:
        index = self.index
        lengths = index.num_tokens[samples]
        counts = (
            lengths.sum(),
            (index.num_image_tokens[samples] + index.num_video_tokens[samples]).sum(),
            index.num_supervised_tokens[samples].sum(),
            (lengths**2).sum(),
            index.num_patch_pairs[samples].sum(),
        )
        return count_flops(self.shape, *map(int, counts), self.per_weight)


class Throughput:
    """How fast a step was: the fields of metrics.jsonl that say so.

    mfu: the share of the GPUs' peak that the model's own operations make up, those of the vision
    tower counted, recomputation not (https://arxiv.org/abs/2204.02311, appendix B). None where the
    peak is not known. data_wait_share: of the seconds, those in which the main process waited for
    data.
    """

    def __init__(self, model, data: PlannedData, config: Config, device: torch.device):
        self.count_flops = FlopCounter(model, data.index, config)
        self.num_gpus, self.peak = data.plan.world_size, peak_flops(device)

    def __call__(self, step: Step, seconds: float, seconds_waited: float) -> dict:
        flops = self.count_flops(step.samples) / seconds
        return {
            "tokens_per_second": step.num_tokens / seconds,
            "supervised_tokens_per_second": step.num_supervised_tokens / seconds,
            "data_wait_share": seconds_waited / seconds,
            "tflops_per_second": flops / 1e12,
            "mfu": flops / (self.num_gpus * self.peak) if self.peak else None,
        }
