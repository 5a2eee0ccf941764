"""Tiny models of the families beside Qwen2-VL, with random weights and tiny's tokenizer."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from util.model.tiny import CHAT_TEMPLATE

DEFAULT_SYSTEM = """\
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""
# Qwen2.5-VL's own template renders what Qwen2-VL's does; that of Qwen3-VL has no default system
# prompt. The times of frames come from the processor.
assert DEFAULT_SYSTEM in CHAT_TEMPLATE
TEMPLATES = {
    "qwen2_5_vl": CHAT_TEMPLATE,
    "qwen3_vl": CHAT_TEMPLATE.replace(DEFAULT_SYSTEM, ""),
}
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "rms_norm_eps": 1e-6}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
VISION |= {"out_hidden_size": 128}


def qwen2_5_vl(tokens: dict, vocab_size: int):
    """Return a model whose windows are 2 x 2 tokens, with a head of its own as from 7B on."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": vocab_size, "rope_parameters": rope},
        vision_config=VISION
        | {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2},
        tie_word_embeddings=False,
        **tokens,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(tokens: dict, vocab_size: int):
    """Return a model with two deepstack levels and a table of 6 x 6 positions."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5]}
    config = transformers.Qwen3VLConfig(
        text_config=TEXT
        | {"vocab_size": vocab_size, "head_dim": 32}
        | {"rope_parameters": rope | {"mrope_interleaved": True}},
        vision_config=VISION | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
        tie_word_embeddings=True,
        **tokens,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def build_processor(family: str, tokenizer):
    """Return a processor with the settings that the family's preprocessor_config.json has."""
    if family == "qwen2_5_vl":
        return transformers.Qwen2_5_VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(),
            tokenizer=tokenizer,
            video_processor=transformers.Qwen2VLVideoProcessor(),
            chat_template=TEMPLATES[family],
        )
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**normal),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(**normal),
        chat_template=TEMPLATES[family],
    )


def build_family(family: str, tiny_folder: str, folder: Path) -> str:
    """Write a model of a family to `folder` and return its path."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    config = AutoConfig.from_pretrained(tiny_folder)
    names = (f"{name}_token_id" for name in ("image", "video", "vision_start", "vision_end"))
    tokens = {name: getattr(config, name) for name in names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}[family](tokens, len(tokenizer))
        # Larger than training would begin with: what is out of place shows in the logits.
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    model.save_pretrained(folder)
    build_processor(family, tokenizer).save_pretrained(folder)
    return str(folder)
