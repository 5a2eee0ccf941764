"""Models on the hub and in folders: found, loaded, and written."""

import json
import re
import urllib.error
import urllib.request
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from http.client import HTTPException
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from util.config import Config, UserError, logger
from util.data.sample import SampleEncoder
from util.model.attention import choose_attention, register_attention
from util.model.families import (
    UNREAD,
    added_by_users,
    set_pixel_limits,
    vision_inputs,
    why_not_trained,
    write_boxes,
)
from util.model.four_bit import quantize_base
from util.model.parts import init_lora, prepare_for_training
from util.model.tiny import cached_tiny_model
from util.run import is_main_process
from util.vision_util import PixelPolicy

ADAPTER_FILE = "adapter_config.json"
PIXEL_FLAGS = ("min_pixels", "max_pixels", "video_fps", "video_max_frames", "video_max_pixels")


def is_model_folder(folder: str | Path) -> bool:
    """Return whether a folder holds a model or a LoRA adapter."""
    return any((Path(folder) / name).is_file() for name in ("config.json", ADAPTER_FILE))


def find_model(name: str, with_weights: bool = True) -> str:
    """Return the local folder of a model: tiny, a folder, or a hub name (downloaded once).

    Without weights, only what says how the model looks and what it reads is downloaded.
    Raises UserError, within seconds, where the hub cannot be reached.
    """
    if name == "tiny":
        return cached_tiny_model()
    if Path(name).is_dir():
        if not is_model_folder(name):
            raise UserError(f"{name}: is not a model folder: it has no config.json")
        return name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"{name}: no such folder, and not a hub name like Qwen/Qwen2-VL-2B-Instruct"
        )
    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *["*.safetensors"] * with_weights]
    download = partial(snapshot_download, name, allow_patterns=patterns)
    if reason := _why_unreachable(f"{constants.ENDPOINT}/{name}/resolve/main/config.json"):
        try:
            return download(local_files_only=True)
        except LocalEntryNotFoundError:
            raise UserError(
                f"{name} is not on this machine, and {constants.ENDPOINT} cannot be reached "
                f"({reason}). Ways out:\n"
                f"  - on a machine with access: hf download {name} --local-dir MODEL, copy the "
                "folder here, and use --model_name_or_path MODEL\n"
                "  - a mirror: export HF_ENDPOINT=https://hf-mirror.com\n"
                f"  - ModelScope: pip install modelscope; modelscope download --model {name} "
                "--local_dir MODEL\n"
                "  - try everything with the embedded model: --model_name_or_path tiny"
            ) from None
    try:
        return download()
    except HfHubHTTPError as error:
        raise UserError(f"{name}: the hub refuses it: {error}") from error


def find_model_to_train(name: str, with_weights: bool = True) -> str:
    """Return what find_model does. Raises UserError where it is an adapter, and not a model."""
    folder = find_model(name, with_weights)
    if (Path(folder) / ADAPTER_FILE).is_file():
        raise UserError(
            f"{name}: is a LoRA adapter; to train on, merge it first: "
            f"python -m util.tools.merge_adapter {name} MERGED"
        )
    return folder


def _why_unreachable(url: str) -> str | None:
    """Ask the hub once; from_pretrained would retry for minutes."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return None  # it answered; what it objects to is for the download to say
    except (OSError, ValueError, HTTPException) as error:
        return str(getattr(error, "reason", error))
    return None


def base_folder(folder: str) -> str:
    """Return the model folder that a LoRA adapter stands on; for any other folder, itself."""
    adapter = Path(folder) / ADAPTER_FILE
    if not adapter.is_file():
        return folder
    return find_model(json.loads(adapter.read_text())["base_model_name_or_path"])


@contextmanager
def explained(folder: str):
    """Raise UserError where a model folder cannot be loaded."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: cannot be loaded; are all files there? {reason}") from error


def load_processor(folder: str, config: Config):
    """Return the processor of a model, with the pixel limits of this run written into it.

    Raises UserError where the model is of no family that this repo trains.
    """
    with explained(folder):
        model_config = transformers.AutoConfig.from_pretrained(
            base_folder(folder), trust_remote_code=False
        )
        if problem := why_not_trained(model_config):
            raise UserError(f"{folder}: {problem}")
        processor = transformers.AutoProcessor.from_pretrained(folder)
    _check_tokenizer(folder, processor, model_config)
    processor.tokenizer.padding_side = "left"  # what batched generation needs
    set_pixel_limits(processor, pixel_policy(processor, config))
    return processor


def _check_tokenizer(folder: str, processor, model_config) -> None:
    """Raise UserError where tokenizer and model do not belong together."""
    tokenizer, expected = processor.tokenizer, model_config.image_token_id
    if tokenizer.convert_tokens_to_ids(processor.image_token) != expected:
        raise UserError(
            f"{folder}: its tokenizer does not know {processor.image_token} as the model does "
            f"(token {expected}): are all of its files there (tokenizer.json)?"
        )
    num_embeddings = model_config.get_text_config().vocab_size
    last = max(tokenizer.get_vocab().values())
    if last >= num_embeddings:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.convert_ids_to_tokens(last)!r} as token "
            f"{last}, but the model has {num_embeddings} embeddings. After adding tokens: "
            "model.resize_token_embeddings(len(tokenizer)), and save the model too"
        )


def pixel_policy(processor, config: Config) -> PixelPolicy:
    """Return the pixel limits of the flags, with the patch sizes of the model."""
    sizes = ("patch_size", "merge_size", "temporal_patch_size")
    return PixelPolicy(
        **{name: getattr(config, name) for name in PIXEL_FLAGS},
        **{name: getattr(processor.image_processor, name) for name in sizes},
        allow_remote_media=config.allow_remote_media,
    )


def load_encoder(config: Config, with_weights: bool = True):
    """Return the folder of the model to train, its processor, and what makes samples for it."""
    folder = find_model_to_train(config.model_name_or_path, with_weights)
    processor = load_processor(folder, config)
    tokens = added_by_users(processor.tokenizer)
    if config.lora_rank and tokens:
        logger.warning(
            f"LoRA leaves embeddings as they are: those of {len(tokens)} added tokens too, "
            f"{', '.join(tokens[:5])}. Unless they were trained before, train without --lora_rank"
        )
    return folder, processor, build_encoder(folder, processor, config)


def empty_model(model_config, **options):
    """Return a model of shapes alone, on the meta device."""
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(model_config, **options)


def build_encoder(folder: str, processor, config: Config) -> SampleEncoder:
    """Return what turns conversations into samples for the model in `folder`."""
    # The positions need the model's config but none of its weights.
    model = empty_model(transformers.AutoConfig.from_pretrained(base_folder(folder))).model
    inputs = partial(vision_inputs, vision_tower=model.visual)
    policy = pixel_policy(processor, config)
    encoder = SampleEncoder(processor, model, inputs, write_boxes, policy, config.supervise)
    try:
        encoder.render([{"role": "user", "content": "?"}])
    except UserError:  # it does not end
        raise
    except (TypeError, ValueError) as error:  # what a template of no use gives
        raise UserError(f"{folder}: its chat template fails: {error}") from error
    return encoder


def load_model(folder: str, device: torch.device, config: Config):
    """Load a model to train onto `device`, prepared as `config` says.

    Weights are read in the checkpoint's own dtype (bf16 on the hub) and changed one at a time, so
    that neither side ever holds more than it has to.
    """
    if device.index is not None:
        torch.cuda.set_device(device)
    attention = choose_attention(device, config.precision)
    model = _from_pretrained(folder, attention, dtype="auto")
    prepare_for_training(model, config, device)
    model.to(device)  # what are not parameters
    init_lora(model, config.seed)
    return model


def load_model_to_answer(folder: str, attention: str, device: torch.device, dtype: torch.dtype):
    """Load a model, or a base model with the LoRA adapter in `folder`, for generation.

    The base is what the adapter was trained on: rounded to 4 bits with --precision bf16_4bit.
    """
    base, is_rounded = base_folder(folder), stands_on_4_bits(folder)
    # Where the base is in 4 bits, its whole weights may not fit onto the device.
    place = "cpu" if is_rounded else device
    model = _from_pretrained(base, attention, dtype, device_map={"": place})
    if base == folder:
        return model.eval()
    with explained(folder):
        check_adapter(folder)
        from peft import PeftModel  # which takes a second, and few need it

        model = PeftModel.from_pretrained(model, folder).get_base_model()
    if is_rounded:
        quantize_base(model, device)
    return model.to(device).eval()


def stands_on_4_bits(folder: str | Path) -> bool:
    """Return whether a folder's adapter was trained on a base in 4 bits, as its run's flags say."""
    flags = Path(folder) / "config_used.json"
    if not ((Path(folder) / ADAPTER_FILE).is_file() and flags.is_file()):
        return False
    return json.loads(flags.read_text(encoding="utf-8")).get("precision") == "bf16_4bit"


def check_adapter(folder: str | Path) -> None:
    """Raise UserError where the settings of an adapter are not those of its weights.

    PEFT would make room for any rank first.
    """
    settings = json.loads((Path(folder) / ADAPTER_FILE).read_text(encoding="utf-8"))
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "lora_A" in name]
        ranks = {file.get_slice(name).get_shape()[0] for name in names}
    told = {settings.get("r"), *(settings.get("rank_pattern") or {}).values()}
    if not ranks or not ranks <= told or max(told) > max(ranks):
        raise UserError(f"{folder}: {ADAPTER_FILE} says rank {told}, the weights have {ranks}")


def _from_pretrained(folder: str, attention: str, dtype, **options):
    register_attention(attention)
    with explained(folder):
        return transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, **options
        )


@torch.no_grad()
def export_model(model, processor, output_dir: str | Path, dtype=torch.bfloat16) -> None:
    """Write a folder that the Auto classes load: bf16 weights, processor, chat template.

    With LoRA: the adapter (in fp32, it is small), as PEFT and vLLM read it. Shards are gathered a
    tensor at a time; only the main process keeps them, in main memory, and writes.
    """
    state_dict, is_adapter = {}, hasattr(model, "peft_config")
    for name, tensor in model.state_dict().items():
        # Tied weights are one tensor under two names.
        is_double = name == "lm_head.weight" and model.config.tie_word_embeddings
        if is_double or (is_adapter and ".lora_" not in name):
            continue
        tensor = tensor.detach().to(torch.float32 if ".lora_" in name else dtype)
        if isinstance(tensor, DTensor):
            if tensor.device_mesh["replicate"].get_local_rank() > 0:
                continue  # replicas hold the same
            tensor = tensor.full_tensor()
        if is_main_process():
            state_dict[name] = tensor.cpu()
    if is_main_process():
        write_model(model, state_dict, processor, output_dir, dtype)


def write_model(model, state_dict, processor, output_dir, dtype=torch.bfloat16) -> None:
    """Write a model folder with the weights `state_dict`: whole tensors on the CPU.

    Raises OSError where it cannot be written.
    """
    try:
        _write_model(model, state_dict, processor, output_dir, dtype)
    except SafetensorError as error:  # such as of a full disk
        raise OSError(f"{output_dir}: {error}") from error


def _write_model(model, state_dict, processor, output_dir, dtype) -> None:
    processor.save_pretrained(output_dir)
    if hasattr(model, "peft_config"):
        model.peft_config["default"].save_pretrained(output_dir)
        renamed = {
            f"base_model.model.{name.replace('.default.', '.')}": tensor
            for name, tensor in state_dict.items()
        }
        save_file(renamed, Path(output_dir) / "adapter_model.safetensors", {"format": "pt"})
        return
    # A model without weights, since save_pretrained writes the dtype of the one it is called on.
    skeleton = empty_model(deepcopy(model.config), dtype=dtype)
    skeleton.generation_config = model.generation_config
    skeleton.save_pretrained(output_dir, state_dict=state_dict | unread_weights(model))


def unread_weights(model) -> dict[str, torch.Tensor]:
    """Return the weights in a model's own folder that transformers leaves out on loading."""
    prefix, weights = UNREAD.get(model.config.model_type), {}
    if not prefix:
        return weights
    for path in sorted(Path(model.name_or_path).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            weights |= {name: file.get_tensor(name) for name in names}
    if not weights:
        logger.warning(
            f"{model.name_or_path} has no weights {prefix}*, so {prefix}* is missing from what is "
            "saved: it answers as it should, but servers cannot draft tokens with it"
        )
    return weights
