"""Device, processor, model and attention: what the loop trains, and how it is called."""

import json
import logging
import os
import re
import urllib.error
import urllib.request
from contextlib import contextmanager
from copy import deepcopy
from http.client import HTTPException
from itertools import groupby, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import is_flash_attn_2_available

from util.config import Config, UserError
from util.memory_util import WHOLE_ROWS, init_lora, prepare_for_training
from util.plan_util import MicroBatch
from util.sample_util import SampleEncoder
from util.tiny_model import cached_tiny_model
from util.vision_util import MAX_VIDEO_TOKENS, PixelPolicy

logger = logging.getLogger("finetune")

ADAPTER_FILE = "adapter_config.json"
# Model types that this repo trains; tests/test_families.py holds what differs between them.
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# The longest segment, by the name under which flash attention gets where segments end.
LONGEST = {
    "cu_seq_lens_q": "max_length_q",
    "cu_seq_lens_k": "max_length_k",
    "image_cu_seqlens": "image_max_seqlen",
    "image_cu_window_seqlens": "image_max_window_seqlen",
}


def choose_device(name: str | None) -> torch.device:
    """Return the device to train on: `name`, else cuda, else cpu.

    Raises UserError where an NVIDIA device is there but torch cannot use it: a silent run on the
    CPU would be a toy run.
    """
    if name:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise UserError(f"--device {name}: must be cuda, cuda:1 (or another number), or cpu")
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {name}: {_why_no_cuda()}")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if Path("/dev/nvidia0").exists() and not hidden:
        raise UserError(f"this machine has an NVIDIA device, but {_why_no_cuda()}")
    return torch.device("cpu")


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} was built without CUDA: install the CUDA build "
            "(pip install -r requirements.txt), or use --device cpu"
        )
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable device: check "
        "that nvidia-smi works, that the driver is new enough for this CUDA, and that "
        f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r} names a device of "
        "this machine; or use --device cpu"
    )


def choose_attention(device: torch.device, precision: str) -> str:
    """Return flash_attention_2 where it is installed and can run, else packed_sdpa."""
    if device.type != "cuda" or precision == "fp32" or not is_flash_attn_2_available():
        return "packed_sdpa"
    # flash-attn 2 needs Ampere or newer.
    return (
        "flash_attention_2" if torch.cuda.get_device_capability(device)[0] >= 8 else "packed_sdpa"
    )


def segment_lengths(cu_seqlens: torch.Tensor) -> list[int]:
    """Return the lengths of segments whose ends `cu_seqlens` holds, on the CPU, with a 0 before."""
    return [end - begin for begin, end in pairwise(cu_seqlens.tolist())]


def packed_sdpa(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    cu_seq_lens_q,
    scaling=None,
    is_causal=None,
    **kwargs,
):
    """Attend within each segment of a packed row, by one SDPA call for neighbours of one length.

    query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim); `cu_seq_lens_q` on
    the CPU says where segments begin and end. Returns (1, T, heads, head_dim). Stock sdpa would
    build a T x T mask for the same result.
    """
    # Such as the frames of a video, all of one length.
    runs = [(length, len(list(run))) for length, run in groupby(segment_lengths(cu_seq_lens_q))]
    num_rows = [length * count for length, count in runs]
    is_causal = module.is_causal if is_causal is None else is_causal
    # Under autocast the rotary embedding leaves queries and keys in fp32, values in bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and query.is_cuda and query.dtype == torch.float32:
        # No fused kernel takes fp32 with fewer heads of keys (pytorch/pytorch#181528).
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        is_grouped = False
    outputs = []
    rows = zip(*(x[0].split(num_rows, dim=1) for x in (query, key, value)))
    for (length, count), qkv in zip(runs, rows):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        output = F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scaling, enable_gqa=is_grouped
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output[None], None


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
    wanted = {"allow_patterns": patterns}
    if reason := _why_unreachable(f"{constants.ENDPOINT}/{name}/resolve/main/config.json"):
        try:
            return snapshot_download(name, local_files_only=True, **wanted)
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
        return snapshot_download(name, **wanted)
    except HfHubHTTPError as error:
        raise UserError(f"{name}: the hub refuses it: {error}") from error


def find_model_to_train(name: str, with_weights: bool = True) -> str:
    """Return what find_model does. Raises UserError where it is an adapter, and not a model."""
    folder = find_model(name, with_weights)
    if (Path(folder) / ADAPTER_FILE).is_file():
        raise UserError(
            f"{name}: is a LoRA adapter; to train on, merge it first: "
            f"python -m util.merge_adapter {name} MERGED"
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
    model_type = model_config.model_type
    if model_type not in FAMILIES:
        raise UserError(f"{folder}: is of type {model_type}; use one of {', '.join(FAMILIES)}")
    if "sliding_attention" in getattr(model_config.text_config, "layer_types", []):
        raise UserError(f"{folder}: its config.json asks for sliding attention: not supported")
    with explained(folder):
        processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"  # what batched generation needs
    policy = pixel_policy(processor, config)
    processor.image_processor.size = {
        "shortest_edge": policy.min_pixels,
        "longest_edge": policy.max_pixels,
    }
    video_processor = processor.video_processor
    video_processor.fps = policy.video_fps
    video_processor.max_frames = policy.video_max_frames
    # Without it, limits hold for single frames but not for long clips.
    video_processor.cap_pixels_per_frame = True
    largest, max_tokens = policy.video_max_pixels, MAX_VIDEO_TOKENS
    if isinstance(video_processor, transformers.Qwen3VLVideoProcessor):
        # It has the two the other way round: pixels of the clip, tokens of a frame. And it does
        # not enlarge frames that are smaller than the smallest, where training does.
        largest, max_tokens = policy.video_total_pixels, largest / policy.factor**2
    video_processor.size = {"shortest_edge": policy.video_min_pixels, "longest_edge": largest}
    video_processor.max_video_tokens = max_tokens
    return processor


def pixel_policy(processor, config: Config) -> PixelPolicy:
    """Return the pixel limits of the flags, with the patch sizes of the model."""
    image_processor = processor.image_processor
    return PixelPolicy(
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        video_fps=config.video_fps,
        video_max_frames=config.video_max_frames,
        video_max_pixels=config.video_max_pixels,
        patch_size=image_processor.patch_size,
        merge_size=image_processor.merge_size,
        temporal_patch_size=image_processor.temporal_patch_size,
        allow_remote_media=config.allow_remote_media,
    )


def build_encoder(folder: str, processor, config: Config) -> SampleEncoder:
    """Return what turns conversations into samples for the model in `folder`."""
    # The positions need the model's config but none of its weights.
    with torch.device("meta"):
        skeleton = transformers.AutoModelForImageTextToText.from_config(
            transformers.AutoConfig.from_pretrained(base_folder(folder))
        )
    policy = pixel_policy(processor, config)
    return SampleEncoder(processor, skeleton.model, policy, config.supervise)


def load_model(folder: str, attention: str, device: torch.device, config: Config):
    """Load a model to train onto `device`, prepared as `config` says.

    Weights are read in the checkpoint's own dtype (bf16 on the hub) and changed one at a time, so
    that neither side ever holds more than it has to.
    """
    model = _from_pretrained(folder, attention, dtype="auto")
    prepare_for_training(model, config, device)
    model.to(device)  # what are not parameters
    init_lora(model, config.seed)
    return model


def load_model_to_answer(folder: str, attention: str, device: torch.device, dtype: torch.dtype):
    """Load a model, or a base model with the LoRA adapter in `folder`, for generation."""
    base = base_folder(folder)
    model = _from_pretrained(base, attention, dtype, device_map={"": device}).eval()
    if base == folder:
        return model
    return PeftModel.from_pretrained(model, folder).eval().get_base_model()


def _from_pretrained(folder: str, attention: str, dtype, **options):
    register_attention(attention)
    with explained(folder):
        return transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, **options
        )


def register_attention(attention: str) -> None:
    """Make packed_sdpa known to transformers, where it is `attention`."""
    if attention == "packed_sdpa":
        for name in ("packed_sdpa", WHOLE_ROWS):
            transformers.AttentionInterface.register(name, packed_sdpa)


def stay_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU as one whose `to` leaves it there.

    fully_shard moves all arguments of a module to the GPU (torch 2.14,
    distributed/fsdp/_fully_shard/_fsdp_state.py), from where every layer would fetch lengths back.
    """
    tensor = tensor.detach()  # another object on the same memory
    tensor.to = lambda *args, **kwargs: tensor
    return tensor


class InputBuilder:
    """Turns a MicroBatch into keyword arguments of the model's forward pass, on the device."""

    def __init__(self, processor, attention: str, device: torch.device):
        self.device = device
        self.is_flash = "flash" in attention
        # Patches travel as uint8; one patch is laid out as (channel, frame, row, column).
        image_processor = processor.image_processor
        repeats = image_processor.temporal_patch_size * image_processor.patch_size**2
        self.mean, self.std = (
            (torch.tensor(values, device=device) * 255).repeat_interleave(repeats)
            for values in (image_processor.image_mean, image_processor.image_std)
        )

    def __call__(self, micro_batch: MicroBatch) -> dict:
        """Return the arguments. Nothing here waits for the device.

        The forward pass does in few places: where transformers 5.23 checks the number of image
        tokens, and, of Qwen3-VL, where it adds features to them in the first decoder layers.
        """
        patches = self._to_device(micro_batch.patches)
        inputs = {
            "input_ids": self._to_device(micro_batch.input_ids),
            "position_ids": self._to_device(micro_batch.position_ids),
            "pixel_values": self.normalize(patches),
            "image_grid_thw": stay_on_cpu(micro_batch.image_grid_thw),
            # Isolation comes from the segment ends below; a mask would be T x T.
            "attention_mask": None,
            "logits_to_keep": self._to_device(micro_batch.supervised_positions),
            "use_cache": False,
        }
        ends = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), micro_batch.cu_seqlens)
        for name, tensor in micro_batch.vision_inputs.items():
            if name in ("cu_seqlens", "cu_window_seqlens"):
                ends[f"image_{name}"] = tensor
            else:
                inputs[f"image_{name}"] = self._to_device(tensor)
        inputs |= {LONGEST[name]: max(segment_lengths(tensor)) for name, tensor in ends.items()}
        if self.is_flash:
            ends = {name: self._to_device(tensor) for name, tensor in ends.items()}
        else:  # packed_sdpa reads them on the CPU
            ends = {name: stay_on_cpu(tensor) for name, tensor in ends.items()}
        return inputs | ends

    def normalize(self, patches: torch.Tensor) -> torch.Tensor:
        """Return uint8 patches (num_patches, patch_dim) on the device as the model wants them."""
        return patches.float().sub_(self.mean).div_(self.std)  # in place: they can be GiB

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)


def is_exported(model, name: str) -> bool:
    """Return whether a tensor of the state dict is written: with LoRA, those of the adapter."""
    if hasattr(model, "peft_config"):
        return ".lora_" in name
    # Tied weights are one tensor under two names.
    return name != "lm_head.weight" or not model.config.tie_word_embeddings


def export_model(model, processor, output_dir: str | Path, dtype=torch.bfloat16) -> None:
    """Write a folder that the Auto classes load: bf16 weights, processor, chat template.

    With LoRA: the adapter (in fp32, it is small), as PEFT and vLLM read it.
    """
    state_dict = {
        name: tensor.detach().to("cpu", torch.float32 if ".lora_" in name else dtype)
        for name, tensor in model.state_dict().items()
        if is_exported(model, name)
    }
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
    with torch.device("meta"):
        skeleton = transformers.AutoModelForImageTextToText.from_config(
            deepcopy(model.config), dtype=dtype
        )
    skeleton.generation_config = model.generation_config
    skeleton.save_pretrained(output_dir, state_dict=state_dict)
