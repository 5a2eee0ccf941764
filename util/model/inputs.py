"""From a micro-batch to the arguments of the model's forward pass."""

import torch

from util.data.batch import MicroBatch
from util.model.attention import segment_lengths

# The longest segment, by the name under which flash attention gets where segments end.
LONGEST = {
    "cu_seq_lens_q": "max_length_q",
    "cu_seq_lens_k": "max_length_k",
    "image_cu_seqlens": "image_max_seqlen",
    "image_cu_window_seqlens": "image_max_window_seqlen",
}


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
        self.ends_on_device = attention != "packed_sdpa"
        # Patches travel as uint8; one patch is laid out as (channel, frame, row, column).
        image_processor = processor.image_processor
        repeats = image_processor.temporal_patch_size * image_processor.patch_size**2
        self.mean, self.std = (
            (torch.tensor(values, device=device) * 255).repeat_interleave(repeats)
            for values in (image_processor.image_mean, image_processor.image_std)
        )

    def __call__(self, micro_batch: MicroBatch) -> dict:
        """Return the arguments. Nothing here waits for the device.

        Nor does the forward pass, see place_media; but that of Qwen3-VL does in a few places.
        """
        patches = self._to_device(micro_batch.patches)
        inputs = {
            "input_ids": self._to_device(micro_batch.input_ids),
            "position_ids": self._to_device(micro_batch.position_ids),
            "media_positions": self._to_device(micro_batch.media_positions),
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
        if self.ends_on_device:
            ends = {name: self._to_device(tensor) for name, tensor in ends.items()}
        else:  # packed_sdpa reads them on the CPU
            ends = {name: stay_on_cpu(tensor) for name, tensor in ends.items()}
        # Also there where attention reads them on the device: linear attention does not.
        ends["cu_seq_lens_cpu"] = stay_on_cpu(micro_batch.cu_seqlens)
        return inputs | ends

    def normalize(self, patches: torch.Tensor) -> torch.Tensor:
        """Return uint8 patches (num_patches, patch_dim) on the device as the model wants them."""
        return patches.float().sub_(self.mean).div_(self.std)  # in place: they can be GiB

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)
