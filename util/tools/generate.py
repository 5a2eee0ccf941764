"""Answer prompts with a model: what the two test scripts share."""

import argparse
import json
import os
import platform
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.nn.utils.rnn import pad_sequence

from util.config import Config, UserError, logger, make_visible
from util.data.batch import PlannedData, refuse_bad_samples
from util.data.conversation import media_of, text_of
from util.data.files import DataHaveChanged, Records
from util.data.sample import Sample, SampleEncoder
from util.media.source import describe as describe_media
from util.media.source import map_paths
from util.model import load
from util.model.attention import PACKED, choose_attention
from util.model.families import takes_seconds_per_grid
from util.model.inputs import InputBuilder
from util.run import choose_device, on_main_process
from util.tools.page import data_uri
from util.tools.scores import load_metric, score_all


@dataclass
class Prompt:
    """A conversation up to the user's last turn, and the answer that one hopes for, if known."""

    id: str
    messages: list[dict]
    reference: str | None
    reasoning: str = ""  # that the reference begins with; where there is any, the model is to think


def parse_arguments(description: str) -> argparse.Namespace:
    """Parse the flags of the two test scripts."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--model_name_or_path", help="hub name, local folder, or tiny")
    parser.add_argument("--model_dir", help="folder of a run. Left out: the newest in train_output")
    parser.add_argument("--prompts", default="test_data/prompts.json", help="what to ask")
    parser.add_argument(
        "--max_new_tokens", type=positive, default=128, help="longest answer, in tokens"
    )
    parser.add_argument("--batch_size", type=positive, default=4, help="prompts answered at once")
    parser.add_argument("--device", help="cuda, cuda:1, cpu. Left out: cuda, else cpu")
    parser.add_argument("--save", metavar="FILE", help="write the answers as JSON, for compare.py")
    parser.add_argument(
        "--metric", metavar="FILE.py:FUNCTION", help="your own score: function(answer, reference)"
    )
    return parser.parse_args()


def positive(text: str) -> int:
    """Return a number of a flag. Raises what argparse reports where it is not above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)


def newest_run(model_dir: str | None = None) -> Path | None:
    """Return `model_dir`, or the newest finished run under train_output, or None."""
    if model_dir:
        if not load.is_model_folder(model_dir):
            problem = "it has no config.json" if Path(model_dir).is_dir() else "there is none"
            raise UserError(f"--model_dir {model_dir}: is not a model folder: {problem}")
        return Path(model_dir)
    runs = [path for path in Path("train_output").glob("*") if load.is_model_folder(path)]
    return max(runs, key=lambda path: path.stat().st_mtime, default=None)


def run_config(run: Path | None) -> Config:
    """Return the flags that a run was trained with; the defaults where there is none."""
    path = run / "config_used.json" if run else None
    return Config.load(path) if path and path.is_file() else Config()


def read_prompt(records: Records, i: int, encoder: SampleEncoder) -> Prompt:
    """Return record `i`, in the format of the training data; a last answer is the reference."""
    messages = encoder.prepare(records[i], records.folder(i))
    name = str(records[i].get("id", i))
    if messages[-1]["role"] != "assistant":
        return Prompt(name, messages, None)
    *messages, answer = messages
    return Prompt(name, messages, text_of(answer), answer.get("reasoning_content", ""))


def encode_prompt(prompt: Prompt, encoder: SampleEncoder) -> Sample:
    return encoder.encode_prompt(prompt.messages, thinking=bool(prompt.reasoning))


def load_prompts(path: str, encoder: SampleEncoder) -> list[Prompt]:
    """Return the prompts in a file. Raises UserError naming one that cannot be asked."""
    prompts, records = [], Records([path])
    for i in range(len(records)):
        try:
            prompts.append(read_prompt(records, i, encoder))
            encode_prompt(prompts[-1], encoder)
        except ValueError as error:
            raise UserError(f"{records.where(i)}: {error}") from error
    return prompts


def answer_prompts(name: str, config: Config, arguments: argparse.Namespace) -> None:
    """Load model `name` with the pixel limits of `config`, answer all prompts, print them."""
    device = choose_device(arguments.device)
    metric = load_metric(arguments.metric)
    if arguments.save and Path(arguments.save).is_dir():
        raise UserError(f"--save {arguments.save}: is a folder, not a file")
    folder = load.find_model(name, with_weights=False)
    processor = load.load_processor(folder, config)
    encoder = load.build_encoder(folder, processor, config)
    # What is wrong with a prompt is told before the model is downloaded and loaded.
    prompts = load_prompts(arguments.prompts, encoder)
    folder = load.find_model(name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    is_flash = choose_attention(device, "bf16") == "flash_attention_2"
    attention = "flash_attention_2" if is_flash else "sdpa"
    model = load.load_model_to_answer(folder, attention, device, dtype)
    build_inputs = InputBuilder(processor, attention, device)
    print(
        f"model {name} on {device}; images of {config.min_pixels} to {config.max_pixels} pixels, "
        f"video frames up to {config.video_max_pixels} at {config.video_fps:g} a second\n"
    )

    rows, prompts_folder = [], Path(arguments.prompts).parent
    for start in range(0, len(prompts), arguments.batch_size):
        chosen = prompts[start : start + arguments.batch_size]
        started = time.perf_counter()
        samples = [encode_prompt(prompt, encoder) for prompt in chosen]
        answers = generate(model, encoder, build_inputs, samples, arguments.max_new_tokens)
        seconds = time.perf_counter() - started
        for prompt, answer in zip(chosen, answers):
            print_answer(prompt, answer)
            rows.append(answer_row(prompt, answer, seconds / len(chosen), encoder, prompts_folder))
    answers = [encoder.without_reasoning(row["answer"]) for row in rows]
    scores = score_all(answers, [prompt.reference for prompt in prompts], metric)
    if scores["num_scored"]:
        own = "" if scores["metric"] is None else f"; --metric {scores['metric']:.4f}"
        print(
            f"{scores['num_exact']} of {scores['num_scored']} answers equal their reference word "
            f"for word; character error rate {scores['character_error_rate']:.1%}{own}"
        )
    if arguments.save:
        save_answers(arguments, name, rows, describe(config, arguments, device, dtype, attention))


def describe(config: Config, arguments, device, dtype, attention: str) -> dict:
    """Return everything beside the model that answers depend on."""
    return {
        **{name: getattr(config, name) for name in load.PIXEL_FLAGS},
        "prompts": portable(arguments.prompts),
        "max_new_tokens": arguments.max_new_tokens,
        "batch_size": arguments.batch_size,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def portable(path: str | Path) -> str:
    """Return a path as it is written into files: from the current folder where it is below it."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else Path(relative).as_posix()


def answer_row(
    prompt: Prompt, answer: str, seconds: float, encoder: SampleEncoder, folder: Path
) -> dict:
    """Return one entry of "answers" in the file of --save, media paths found and portable.

    `seconds` is the prompt's share of the time that its batch took.
    """
    messages = encoder.prepare({"messages": prompt.messages}, folder)
    for _, item in media_of(messages):
        item[item["type"]] = map_paths(portable, item[item["type"]])
    return {
        "id": prompt.id,
        "messages": messages,
        "reference": prompt.reference,
        "answer": answer,
        "seconds": round(seconds, 3),
    }


def save_answers(arguments, name: str, rows: list[dict], settings: dict) -> None:
    """Write the file of --save: the model, its settings, where its metrics are, its answers."""
    # A checkpoint of a run lies one folder below the metrics.
    candidates = [Path(name) / "metrics.jsonl", Path(name).parent / "metrics.jsonl"]
    metrics = next((portable(p) for p in candidates if Path(name).is_dir() and p.is_file()), None)
    saved = {"model": name, "settings": settings, "metrics": metrics, "answers": rows}
    # Bytes are pictures of a Parquet file; Pillow will see of what format.
    text = json.dumps(saved, ensure_ascii=False, indent=1, default=partial(data_uri, "image/*"))
    try:
        Path(arguments.save).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.save).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--save {arguments.save}: cannot be written: {error}") from error
    print(f"saved to {arguments.save}")


@torch.no_grad()
def score_answers(config: Config, model, build_inputs, data: PlannedData, stop) -> dict:
    """Let the model in training answer the first --eval_generate held-out samples; return scores.

    Every rank answers all of them: sharded layers are gathered by all ranks together, and a text
    on one and a picture on another would call for other layers. An answer may be twice as long as
    the longest reference. Raises UserError where a prompt cannot be read, unless bad samples are
    to be left out. Ends without scores where the ranks agree that a signal has come.
    """
    encoder = data.samples.encoder
    expected = on_main_process(held_out_answers, data, config.eval_generate)
    if not expected:
        return {}
    numbers, texts = [*expected], [*expected.values()]
    limit = 2 * max(len(ids) for ids in encoder.tokenizer(texts).input_ids) + 1
    # As many at once as training may hold, and one at least.
    longest = int(data.index.num_tokens[numbers].max()) + limit
    batch_size = min(config.batch_size, max(1, config.max_tokens // longest))
    answers, references = [], []
    with _ready_to_answer(model):
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start : start + batch_size]
            # Read once for all ranks, so that all of them leave out the same ones.
            samples, readable, problems = on_main_process(_read_prompts, data, chosen)
            refuse_bad_samples(problems, config)
            for problem in problems:
                logger.warning(f"left out   {problem}")
            if samples:
                synced = dist.is_initialized()
                answers += generate(model, encoder, build_inputs, samples, limit, synced)
                references += readable
            stop.agree()
            if stop.name:
                return {}
    if not answers:
        return {}
    answers = [encoder.without_reasoning(answer) for answer in answers]
    # The user's metric is asked once, not on every rank.
    scores = on_main_process(score_all, answers, references, load_metric(config.metric))
    result = {
        "eval_exact_match": scores["num_exact"] / scores["num_scored"],
        "eval_character_error_rate": scores["character_error_rate"],
    }
    return result if scores["metric"] is None else result | {"eval_metric": scores["metric"]}


def held_out_answers(data: PlannedData, most: int) -> dict[int, str]:
    """Return, by its number, the answer of the first `most` planned samples that end in one.

    It is "" where a sample cannot be read; `_read_prompts` says why.
    """
    answers = {}
    for i in (i for numbers, _ in data.plan.groups for i in numbers.tolist()):
        if len(answers) == most:
            break
        try:
            prompt = read_prompt(data.samples.records, i, data.samples.encoder)
        except DataHaveChanged:
            raise
        except ValueError:
            answers[i] = ""
            continue
        if prompt.reference is not None:
            answers[i] = prompt.reasoning + prompt.reference
    return answers


def _read_prompts(data: PlannedData, numbers: list) -> tuple[list[Sample], list[str], list[str]]:
    """Return the samples of prompts, their references, and what is wrong with the others."""
    records, encoder = data.samples.records, data.samples.encoder
    samples, references, problems = [], [], []
    for i in numbers:
        try:
            prompt = read_prompt(records, i, encoder)
            samples.append(encode_prompt(prompt, encoder))
            references.append(prompt.reference)
        except DataHaveChanged:
            raise
        except ValueError as error:
            problems.append(f"{records.where(i)}: {error}")
    return samples, references, problems


@contextmanager
def _ready_to_answer(model):
    """Switch a model in training to generation, and back."""
    attention = model.config._attn_implementation
    if attention in PACKED:
        model.set_attn_implementation("sdpa")  # ours knows no padding and no cache
    model.eval()
    try:
        # Layers that were compiled for whole rows would be compiled again, for every new token.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train()
        model.set_attn_implementation(attention)


def generate(model, encoder, build_inputs, samples, max_new_tokens, synced_gpus=False) -> list[str]:
    """Return the greedy answers to prompts, generated as one batch, padded on the left.

    synced_gpus: ranks that share the model go on until the last of them is done.
    """
    inputs, own_config = _model_inputs(encoder, build_inputs, samples), model.generation_config
    # Of a model folder's settings only the ends of an answer count, and Qwen2.5-VL's penalty on
    # repetition. Others, such as more than one answer to a prompt, would go on below whatever
    # generate() is given.
    penalty = own_config.repetition_penalty
    ends = own_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    tokenizer = encoder.tokenizer
    ends = {end for end in ends if isinstance(end, int) and 0 <= end < len(tokenizer)}
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=sorted(ends | {tokenizer.convert_tokens_to_ids(encoder.end_of_turn)}),
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        repetition_penalty=penalty if isinstance(penalty, float) and 1 <= penalty < 2 else None,
    )
    try:
        with torch.no_grad():  # fully_shard cannot do with inference_mode
            output = model.generate(**inputs, do_sample=False, synced_gpus=synced_gpus)
    finally:
        model.generation_config = own_config
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [encoder.decode_answer(ids) for ids in new_tokens.tolist()]


def _model_inputs(encoder: SampleEncoder, build_inputs, samples: list[Sample]) -> dict:
    """Return prompts as plain transformers takes a batch of them, on the device."""
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
        media = [item for sample in samples for item in sample.media() if item[0] == kind]
        if media:
            _, grids, patches = zip(*media)
            inputs[grid_name] = torch.tensor(grids)
            inputs[pixel_name] = build_inputs.normalize(torch.cat(patches).to(device))
    seconds = [second for sample in samples for second in sample.second_per_grid_ts]
    if seconds and takes_seconds_per_grid(encoder.processor):
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def print_answer(prompt: Prompt, answer: str) -> None:
    """Print a prompt and its answer, in the same form for every model."""
    lines = [f"=== {prompt.id}"]
    for message in prompt.messages:
        items = [item for _, item in media_of([message])]
        media = [f"[{item['type']} {describe_media(item[item['type']])}] " for item in items]
        lines.append(f"{message['role']}: {''.join(media)}{text_of(message)}")
    lines.append(f"answer: {answer}")
    if prompt.reference is not None:
        lines.append(f"reference: {prompt.reference}")
    print(make_visible("\n".join(lines)) + "\n", flush=True)
