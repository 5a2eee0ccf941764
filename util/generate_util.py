"""Answer prompts with a model: what the two test scripts share."""

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from util.config import Config, UserError
from util.data_util import Sample, SampleEncoder, load_records, media_of, parse_conversation
from util.media_source import describe
from util.model_util import (
    InputBuilder,
    build_encoder,
    choose_attention,
    choose_device,
    find_model,
    load_model,
    load_processor,
)

logger = logging.getLogger("finetune")


@dataclass
class Prompt:
    """A conversation up to the user's last turn, and the answer that one hopes for, if known."""

    id: str
    messages: list[dict]
    reference: str | None


def parse_arguments(description: str) -> argparse.Namespace:
    """Parse the flags of the two test scripts."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--model_name_or_path", help="hub name, local folder, or tiny")
    parser.add_argument("--model_dir", help="folder of a run. Left out: the newest in train_output")
    parser.add_argument("--prompts", default="test_data/prompts.json", help="what to ask")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer, in tokens")
    parser.add_argument("--batch_size", type=int, default=4, help="prompts answered at once")
    parser.add_argument("--device", help="cuda, cuda:1, cpu. Left out: cuda, else cpu")
    return parser.parse_args()


def newest_run(model_dir: str | None = None) -> Path | None:
    """Return `model_dir`, or the newest finished run under train_output, or None."""
    if model_dir:
        if not (Path(model_dir) / "config.json").is_file():
            raise UserError(
                f"--model_dir {model_dir}: is not a model folder: it has no config.json"
            )
        return Path(model_dir)
    runs = Path("train_output").glob("*/config.json")
    newest = max(runs, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent if newest else None


def run_config(run: Path | None) -> Config:
    """Return the flags that a run was trained with; the defaults where there is none."""
    path = run / "config_used.json" if run else None
    return Config.load(path) if path and path.is_file() else Config()


def load_prompts(path: str) -> list[Prompt]:
    """Read prompts in the format of the training data; a last assistant turn is the reference."""
    prompts = []
    for i, record in enumerate(load_records(path)):
        try:
            messages = parse_conversation(record)
        except ValueError as error:
            raise UserError(f"{path}: sample {i}: {error}") from error
        reference = None
        if messages[-1]["role"] == "assistant":
            reference = messages.pop()["content"]
        prompts.append(Prompt(str(record.get("id", i)), messages, reference))
    return prompts


def answer_prompts(name: str, config: Config, arguments: argparse.Namespace) -> None:
    """Load model `name` with the pixel limits of `config`, answer all prompts, print them."""
    device = choose_device(arguments.device)
    prompts = load_prompts(arguments.prompts)
    folder = find_model(name)
    processor = load_processor(folder, config)
    encoder = build_encoder(folder, processor, config, arguments.prompts)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    is_flash = choose_attention(device, "bf16") == "flash_attention_2"
    attention = "flash_attention_2" if is_flash else "sdpa"
    model = load_model(folder, attention, device, dtype).eval()
    build_inputs = InputBuilder(processor, attention, device)
    print(
        f"model {name} on {device}; images of {config.min_pixels} to {config.max_pixels} pixels, "
        f"video frames up to {config.video_max_pixels} at {config.video_fps:g} a second\n"
    )

    num_equal = 0
    for start in range(0, len(prompts), arguments.batch_size):
        chosen = prompts[start : start + arguments.batch_size]
        started = time.perf_counter()
        samples = []
        for prompt in chosen:
            try:
                samples.append(encoder.encode_prompt(prompt.messages))
            except ValueError as error:
                raise UserError(f"{arguments.prompts}: {prompt.id}: {error}") from error
        answers = generate(model, encoder, build_inputs, samples, arguments.max_new_tokens)
        seconds = time.perf_counter() - started
        for prompt, answer in zip(chosen, answers):
            num_equal += answer == prompt.reference
            print_answer(prompt, answer)
        logger.info(f"{len(chosen)} answers in {seconds:.1f} s")
    references = [prompt for prompt in prompts if prompt.reference is not None]
    if references:
        print(f"{num_equal} of {len(references)} answers equal their reference word for word")


def generate(
    model, encoder: SampleEncoder, build_inputs, samples: list[Sample], max_new_tokens: int
) -> list[str]:
    """Return the greedy answers to prompts, generated as one batch, padded on the left."""
    device, tokenizer = build_inputs.device, encoder.tokenizer

    def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")

    rows = [sample.input_ids for sample in samples]
    inputs = {
        "input_ids": pad(rows, tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in rows], 0),
        "mm_token_type_ids": pad([encoder.token_types(row) for row in rows], 0),
    }
    for kind, grid_name, pixel_name in (
        ("image", "image_grid_thw", "pixel_values"),
        ("video", "video_grid_thw", "pixel_values_videos"),
    ):
        patches, grids = [], []
        for sample in samples:
            sizes = [t * h * w for t, h, w in sample.grids]
            for part, grid, type_ in zip(
                sample.patches.split(sizes), sample.grids, sample.media_types
            ):
                if type_ == kind:
                    patches.append(part)
                    grids.append(grid)
        if grids:
            inputs[grid_name] = torch.tensor(grids)
            inputs[pixel_name] = build_inputs.normalize(torch.cat(patches).to(device))
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # The generation_config has sampling settings, of no use to greedy search.
            temperature=None,
            top_p=None,
            top_k=None,
        )
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new_tokens, skip_special_tokens=True)


def print_answer(prompt: Prompt, answer: str) -> None:
    """Print a prompt and its answer, in the same form for every model."""
    print(f"=== {prompt.id}")
    for message in prompt.messages:
        media = [
            f"[{item['type']} {describe(item[item['type']])}] " for _, item in media_of([message])
        ]
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(item["text"] for item in content if item["type"] == "text")
        print(f"{message['role']}: {''.join(media)}{content}")
    print(f"answer: {answer}")
    if prompt.reference is not None:
        print(f"reference: {prompt.reference}")
    print(flush=True)
