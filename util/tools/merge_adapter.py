"""Make a full model of a LoRA adapter and its base model.

    python -m util.tools.merge_adapter train_output/20260101_120000 MERGED

The base is the one that the adapter names; the result has the dtype of its files. It is not
rounded to 4 bits, also where the adapter was trained on one that was.
"""

import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel

from util.config import UserError
from util.model.load import ADAPTER_FILE, base_folder, check_adapter, export_model, stands_on_4_bits
from util.run import run_main


def merge_adapter(adapter: str, output_dir: str) -> None:
    """Write the model folder `output_dir`. Raises UserError where `adapter` is none."""
    if not (Path(adapter) / ADAPTER_FILE).is_file():
        raise UserError(f"{adapter}: is not a LoRA adapter: it has no {ADAPTER_FILE}")
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output_dir}: exists and is not an empty folder: name a new one")
    check_adapter(adapter)
    base = base_folder(adapter)
    dtype = transformers.AutoConfig.from_pretrained(base).dtype
    # Added up in fp32, rounded once.
    model = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    processor = transformers.AutoProcessor.from_pretrained(adapter)
    export_model(merged, processor, output_dir, dtype)


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("usage: python -m util.tools.merge_adapter ADAPTER OUTPUT")
    # peft 0.21.2 asks transformers 5.23.0 by an old name; gone when PEFT uses the new one.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated", FutureWarning)
    merge_adapter(*sys.argv[1:])
    print(f"merged into {sys.argv[2]}")
    if stands_on_4_bits(sys.argv[1]):
        print(
            "note: the adapter was trained on a base rounded to 4 bits, and is merged into the "
            "base as it is: answers can differ a little from the adapter's own"
        )


if __name__ == "__main__":
    run_main(main)
