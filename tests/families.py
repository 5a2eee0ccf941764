"""Tiny models of the families, with random weights and tiny's tokenizer."""

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
    # Renders what chat_template.jinja of Qwen/Qwen3.5-27B does, tools left out.
    "qwen3_5": """\
{%- macro text_of(content) -%}
{%- for item in ([{'text': content}] if content is string else content) -%}
{%- if 'image' in item -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'video' in item -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{- item.text -}}{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
{%- set last = namespace(query=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set last.query = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if last.query < 0 -%}{{- raise_exception('No user query found in messages.') -}}{%- endif -%}
{%- for message in messages -%}
{%- set text = text_of(message.content) | trim -%}
{%- set reasoning = message.reasoning_content -%}
{%- if message.role == 'assistant' and reasoning is not string and '</think>' in text -%}
{%- set reasoning = text.split('</think>')[0].split('<think>')[-1] -%}
{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if message.role == 'assistant' and loop.index0 > last.query -%}
{%- set text = '<think>\\n' + (reasoning or '') | trim + '\\n</think>\\n\\n' + text -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
""",
}
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "rms_norm_eps": 1e-6}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
VISION |= {"out_hidden_size": 128}
# Family: parameters of its rope, what else its text model has, and what else its vision tower.
SHAPES = {
    # Windows are 2 x 2 tokens.
    "qwen2_5_vl": (
        {"rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        {},
        {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2},
    ),
    # Two deepstack levels and a table of 6 x 6 positions.
    "qwen3_vl": (
        {"rope_theta": 1e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        {"head_dim": 32},
        {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
    ),
    # Two gated delta nets, with more heads of values than of keys, and one attention.
    "qwen3_5": (
        {"rope_theta": 1e7, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
        | {"partial_rotary_factor": 0.25},
        {"head_dim": 64, "full_attention_interval": 3}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
        {"num_position_embeddings": 36},
    ),
}


def build_model(family: str, tokens: dict, vocab_size: int):
    """Return a model of a family with random weights; `tokens` are the ids of its config."""
    rope, text, vision = SHAPES[family]
    text = text | {"vocab_size": vocab_size, "rope_parameters": {"rope_type": "default"} | rope}
    config = AutoConfig.for_model(
        family,
        text_config=TEXT | text,
        vision_config=VISION | vision,
        tie_word_embeddings=family != "qwen2_5_vl",  # a head of its own, as from 7B on
        **tokens,
    )
    return transformers.AutoModelForImageTextToText.from_config(config)


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


def build_small(tiny_folder: str, folder: Path) -> str:
    """Write a Qwen2-VL of 0.6 million parameters to `folder` and return its path."""
    config = AutoConfig.from_pretrained(tiny_folder)
    config.vision_config.update({"embed_dim": 64, "hidden_size": 128})
    config.text_config.update({"hidden_size": 128, "intermediate_size": 256})
    config.text_config.update({"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    model.generation_config = transformers.GenerationConfig.from_pretrained(tiny_folder)
    model.save_pretrained(folder)
    transformers.AutoProcessor.from_pretrained(tiny_folder).save_pretrained(folder)
    return str(folder)


def build_family(family: str, tiny_folder: str, folder: Path) -> str:
    """Write a model of a family to `folder` and return its path; Qwen2-VL's is `tiny_folder`."""
    if family == "qwen2_vl":
        return tiny_folder
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    config = AutoConfig.from_pretrained(tiny_folder)
    names = (f"{name}_token_id" for name in ("image", "video", "vision_start", "vision_end"))
    tokens = {name: getattr(config, name) for name in names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(family, tokens, len(tokenizer))
        # Larger than training would begin with: what is out of place shows in the logits. At 0.1,
        # ten steps of Qwen3.5 make 1e-2 in gradient norms of 1e-7 in the weights; at 0.05, 5e-5.
        std = 0.05 if family == "qwen3_5" else 0.1
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=std)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    # In several files, and with what checkpoints of Qwen3.5 hold and transformers does not load.
    unread = {"mtp.fc.weight": torch.arange(8.0)} if family == "qwen3_5" else {}
    model.save_pretrained(folder, state_dict=model.state_dict() | unread, max_shard_size="2MB")
    build_processor(family, tokenizer).save_pretrained(folder)
    return str(folder)
