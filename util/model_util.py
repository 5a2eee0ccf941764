"""Device, processor, model and attention: what the loop trains, and how it is called."""

import logging
import os
import urllib.error
import urllib.request
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers.utils import is_flash_attn_2_available

from util.config import Config, UserError
from util.plan_util import MicroBatch
from util.sample_util import SampleEncoder
from util.tiny_model import cached_tiny_model
from util.vision_util import MAX_VIDEO_TOKENS, PixelPolicy

logger = logging.getLogger("finetune")


def choose_device(name: str | None) -> torch.device:
    """Return the device to train on: `name`, else cuda, else cpu.

    Raises UserError where an NVIDIA device is there but torch cannot use it: a silent run on the
    CPU would be a toy run.
    """
    if name:
        if torch.device(name).type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {name}: {_why_no_cuda()}")
        return torch.device(name)
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


def packed_sdpa(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    is_causal=None,
    cu_seq_lens_q=None,
    **kwargs,
):
    """Attend within each segment of a packed row, by one SDPA call per segment.

    query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim); `cu_seq_lens_q` on
    the CPU says where segments begin and end. Returns (1, T, heads, head_dim). Stock sdpa would
    build a T x T mask for the same result.
    """
    if cu_seq_lens_q is None:  # the vision tower has split its segments already
        lengths = [query.shape[2]]
    else:
        lengths = cu_seq_lens_q.diff().tolist()
    is_causal = module.is_causal if is_causal is None else is_causal
    # Under autocast the rotary embedding leaves queries and keys in fp32, values in bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def find_model(name: str) -> str:
    """Return the local folder of a model: tiny, a folder, or a hub name (downloaded once).

    Raises UserError, within seconds, where the hub cannot be reached.
    """
    if name == "tiny":
        return cached_tiny_model()
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{name}: is not a model folder: it has no config.json")
        return name
    if name.count("/") != 1 or name[0] in "./~":
        raise UserError(
            f"{name}: no such folder, and not a hub name like Qwen/Qwen2-VL-2B-Instruct"
        )
    wanted = {"allow_patterns": ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]}
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


def _why_unreachable(url: str) -> str | None:
    """Ask the hub once; from_pretrained would retry for minutes."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return None  # it answered; what it objects to is for the download to say
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def load_processor(folder: str, config: Config):
    """Return the processor of a model, with the pixel limits of this run written into it."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"  # what batched generation needs
    policy = pixel_policy(processor, config)
    for part, smallest, largest in (
        (processor.image_processor, policy.min_pixels, policy.max_pixels),
        (processor.video_processor, policy.video_min_pixels, policy.video_max_pixels),
    ):
        part.size = {"shortest_edge": smallest, "longest_edge": largest}
    processor.video_processor.fps = policy.video_fps
    processor.video_processor.max_frames = policy.video_max_frames
    # Without it, the limits above hold for single frames but not for long clips.
    processor.video_processor.cap_pixels_per_frame = True
    processor.video_processor.max_video_tokens = MAX_VIDEO_TOKENS
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
            transformers.AutoConfig.from_pretrained(folder)
        )
    policy = pixel_policy(processor, config)
    return SampleEncoder(processor, skeleton.model.get_rope_index, policy, config.supervise)


def load_model(folder: str, attention: str, device: torch.device, dtype=torch.float32):
    """Load a model onto `device`. The checkpoint's own dtype (bf16 on the hub) is not kept."""
    if attention == "packed_sdpa":
        transformers.AttentionInterface.register("packed_sdpa", packed_sdpa)
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, device_map={"": device}
    )


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
        """Return the arguments. Nothing here or in the forward pass waits for the device."""
        patches = self._to_device(micro_batch.patches)
        inputs = {
            "input_ids": self._to_device(micro_batch.input_ids),
            "position_ids": self._to_device(micro_batch.position_ids),
            "pixel_values": self.normalize(patches),
            "image_grid_thw": micro_batch.image_grid_thw,
            "image_position_ids": self._to_device(micro_batch.vision_position_ids),
            # Isolation comes from the segment ends below; a mask would be T x T.
            "attention_mask": {"full_attention": None},
            "logits_to_keep": self._to_device(micro_batch.supervised_positions),
            "use_cache": False,
        }
        ends, vision_ends = micro_batch.cu_seqlens, micro_batch.vision_cu_seqlens
        if self.is_flash:
            longest = int(ends.diff().max())
            inputs |= {"max_length_q": longest, "max_length_k": longest}
            inputs["image_max_seqlen"] = int(vision_ends.diff().max())
            ends, vision_ends = self._to_device(ends), self._to_device(vision_ends)
        # packed_sdpa and transformers' own split of the vision tower read them on the CPU.
        return inputs | {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "image_cu_seqlens": vision_ends,
        }

    def normalize(self, patches: torch.Tensor) -> torch.Tensor:
        """Return uint8 patches (num_patches, patch_dim) on the device as the model wants them."""
        return (patches.float() - self.mean) / self.std

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)


def export_model(model, processor, output_dir: str | Path) -> None:
    """Write a folder that the Auto classes load: bf16 weights, processor, chat template."""
    state_dict = {
        name: tensor.detach().to("cpu", torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        del state_dict["lm_head.weight"]  # one tensor under two names
    write_model(model, state_dict, processor, output_dir)


def write_model(model, state_dict: dict, processor, output_dir: str | Path) -> None:
    """Write a model folder with the weights `state_dict`: whole tensors, bf16, on the CPU."""
    # A model without weights, since save_pretrained writes the dtype of the one it is called on.
    with torch.device("meta"):
        skeleton = transformers.AutoModelForImageTextToText.from_config(
            deepcopy(model.config), dtype=torch.bfloat16
        )
    skeleton.generation_config = model.generation_config
    skeleton.save_pretrained(output_dir, state_dict=state_dict)
    processor.save_pretrained(output_dir)
