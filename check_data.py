"""Check training data as training would see it, without training.

    python check_data.py --train_data train_data/data.json
    python check_data.py --train_data train_data/data.json --show 3
    python check_data.py --train_data train_data/data.json --page data.html
    python check_data.py --train_data train_data/data.json --plan 24

Exit code 1 when something is wrong. Takes all flags of finetune.py: those on tokens and pixels
decide what fits.
"""

import util  # isort: skip # noqa: F401 (before torch: it says why)

import hashlib
import json
from collections import Counter

import numpy as np
import transformers

from util.config import (
    TINY_NOTICE,
    Config,
    UserError,
    fill_defaults,
    make_visible,
    parse_config,
)
from util.data.batch import PlannedData, prepare_data
from util.data.conversation import parse_conversation, text_of
from util.data.files import Records
from util.data.index import Index, build_index, check_lengths, decode_all
from util.data.keys import ignored_keys
from util.data.sample import Sample, SampleEncoder
from util.media.image import Remark
from util.model.load import (
    build_encoder,
    empty_model,
    find_model,
    find_model_to_train,
    load_encoder,
    load_processor,
)
from util.run import choose_device, run_main
from util.tools.data_page import CheckedFiles, make_cards, token_runs, write_data_page
from util.tools.flops import PUBLISHED_SHAPES, FlopCounter, published_config
from util.tools.planner import fitting_flags, plan_memory

REMARKS = {
    Remark.MORE_PAGES: "pictures of several pages or frames, of which the first is read",
    Remark.DARK: "pictures of 16 bits whose brightest pixel is below 4,096: nearly black",
    Remark.HDR: "clips in HDR (PQ or HLG), which is read as it is, with pale colours",
}


def show_sample(encoder: SampleEncoder, records: Records, i: int) -> Sample:
    """Print sample `i` as the model sees it, trained text between [[ and ]], and return it."""
    if not 0 <= i < len(records):
        raise UserError(f"--show {i}: there are samples 0 to {len(records) - 1}")
    try:
        sample = encoder.encode(records[i], records.folder(i))
    except ValueError as error:
        raise UserError(f"{records.where(i)}: {error}") from error
    for ids, media_type, is_trained in token_runs(encoder, sample):
        if media_type:
            print(f"{encoder.tokenizer.decode(ids[:1])} x {len(ids)}", end="")
        else:
            text = make_visible(encoder.tokenizer.decode(ids))
            print(f"[[{text}]]" if is_trained else text, end="")
    return sample


def print_lengths(index: Index) -> None:
    """Print a histogram of the lengths of samples, and what the tokens are."""
    lengths = index.num_tokens[index.num_tokens > 0]
    counts, edges = np.histogram(lengths, bins=min(10, len(np.unique(lengths))))
    print("length in tokens")
    for count, low, high in zip(counts, edges, edges[1:]):
        bar = "#" * round(50 * count / counts.max())
        print(f"  {low:8,.0f} to {high:8,.0f}  {count:9,}  {bar}")
    total = int(lengths.sum())
    images, videos = int(index.num_image_tokens.sum()), int(index.num_video_tokens.sum())
    print(
        f"tokens: {100 * (total - images - videos) / total:.1f} % text, "
        f"{100 * images / total:.1f} % images, {100 * videos / total:.1f} % videos; "
        f"{100 * int(index.num_supervised_tokens.sum()) / total:.1f} % are supervised"
    )


def print_oddities(records: Records, index: Index, most: int = 10) -> None:
    """Print which records repeat an earlier one, empty answers, odd media, and keys not read."""
    first, repeats, empty, ignored = {}, [], [], Counter()
    for i in range(len(records)):
        try:
            record = records[i]
            messages = parse_conversation(record)
        except ValueError:
            continue
        ignored.update(ignored_keys(record))
        answers = [text_of(m) for m in messages if m["role"] == "assistant"]
        empty += [i] if not all(answer.strip() for answer in answers) else []
        said = json.dumps([messages, record.get("objects")], sort_keys=True, default=hash)
        key = hashlib.sha256(said.encode()).digest()
        if first.setdefault(key, i) != i:
            repeats.append((i, first[key]))
    print(f"duplicates: {len(repeats)}")
    for i, earlier in repeats[:most]:
        print(f"  {records.where(i)} repeats {records.where(earlier)}")
    found = {"empty answers, which train the end of the turn alone": empty}
    for remark, text in REMARKS.items():
        found[f"samples with {text}"] = np.flatnonzero(index.remarks & remark).tolist()
    for text, samples in found.items():
        print(f"{text}: {len(samples)}\n" * bool(samples), end="")
        for i in samples[:most]:
            print(f"  {records.where(i)}")
    if ignored:
        counts = ", ".join(f"{key} ({count:,})" for key, count in ignored.most_common(3 * most))
        print(make_visible(f"keys that are not read: {counts}"))


def check_files(names: list[str], encoder: SampleEncoder, config: Config, extra) -> CheckedFiles:
    """Print all that is wrong with the data files `names`, and return it."""
    records = Records(names)
    index, problems = build_index(records, encoder)
    problems += check_lengths(records, index, config.max_tokens, encoder)
    if extra.decode:
        problems += decode_all(records, index, config.max_tokens, encoder)
    cards, found = [], []
    if extra.page:
        cards, found = make_cards(records, problems, encoder, extra.page_samples)
    if index.num_tokens.any():
        print(make_visible(f"{' '.join(names)}: {index.summary()}"))
        print_lengths(index)
    print_oddities(records, index)
    for problem in problems + found:
        print(make_visible(f"problem: {problem}"))
    return CheckedFiles(records, index, problems + found, cards)


def load_for_plan(config: Config):
    """Return processor, encoder and model configuration; no weights are needed.

    A published model that is not on this machine is planned with the embedded tokenizer.
    """
    try:
        folder = find_model_to_train(config.model_name_or_path, with_weights=False)
        model_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UserError:
        if config.model_name_or_path not in PUBLISHED_SHAPES:
            raise
        print(
            f"{config.model_name_or_path} is not on this machine: its published shape is taken, "
            "and the embedded tokenizer, which makes more tokens of the same text"
        )
        folder = find_model("tiny")
        model_config = published_config(config.model_name_or_path)
        own = transformers.AutoConfig.from_pretrained(folder)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id"):
            setattr(model_config, name, getattr(own, name))
    processor = load_processor(folder, config)
    return processor, build_encoder(folder, processor, config), model_config


def print_plan(config: Config, limit_gib: float) -> None:
    """Print what a step needs on the GPU, and how much the run has to compute."""
    processor, encoder, model_config = load_for_plan(config)
    data = prepare_data(config.train_data, encoder, config)
    shard_size = config.shard_size or 1
    needed = plan_memory(model_config, processor, config, data, shard_size)
    print(make_visible(f"{' '.join(config.train_data)}: {data.index.summary()}"))
    print_lengths(data.index)
    print_compute(model_config, config, data)
    where = f" on each of {shard_size} GPUs" if shard_size > 1 else ""
    num_samples, num_tokens = needed.pop("num_samples"), needed.pop("num_tokens")
    print(
        f"memory of a step{where}; its largest micro-batch has {num_samples} samples, "
        f"{num_tokens:,} tokens:"
    )
    for name, gib in needed.items():
        print(f"  {name.removesuffix('_gib'):12} {gib:8.2f} GiB")
    needed["fits"] = needed["peak_gib"] <= limit_gib
    if not needed["fits"]:
        found = fitting_flags(model_config, processor, config, data, shard_size, limit_gib)
        print(
            f"with {found[0]}: {found[1]:.2f} GiB"
            if found
            else f"no flags bring it under {limit_gib:g} GiB: lower --max_tokens, use more GPUs "
            "(--shard_size), or a smaller model"
        )
    print(json.dumps(needed))


def print_compute(model_config, config: Config, data: PlannedData) -> None:
    """Print epochs, steps and operations of the run; what is recomputed does not count."""
    samples = np.flatnonzero(data.index.num_tokens > 0)
    num_steps = data.plan.num_steps(config.num_epochs, config.max_steps)
    num_epochs = num_steps / data.plan.num_steps_per_epoch
    rounds = num_epochs * data.plan.num_samples_per_epoch / len(samples)
    pflop = FlopCounter(empty_model(model_config), data.index, config)(samples) * rounds / 1e15
    print(f"compute: {num_epochs:g} epochs, {num_steps:,} steps, {pflop:,.3g} PFLOP")


def add_flags(parser) -> None:
    """Add the flags that finetune.py does not have."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", type=int, metavar="N", help="print sample N (from 0) and end")
    what.add_argument(
        "--plan", type=float, metavar="GIB", help="tell what a step needs on a card of so much"
    )
    what.add_argument("--page", metavar="FILE.html", help="write samples as the model gets them")
    parser.add_argument("--page_samples", type=int, default=50, metavar="N", help="the first N")
    parser.add_argument("--decode", action="store_true", help="decode all media, every frame used")


def main() -> None:
    config, extra = parse_config(extra=add_flags)
    device = choose_device(config.device)
    if config.model_name_or_path is None and device.type == "cpu":
        print(TINY_NOTICE)
    config = fill_defaults(config, device.type)
    reading = (
        f"as {config.model_name_or_path} reads it: images of {config.min_pixels} to "
        f"{config.max_pixels} pixels, video frames up to {config.video_max_pixels} at "
        f"{config.video_fps:g} a second, at most {config.max_tokens:,} tokens a sample"
    )
    print(reading)
    if extra.plan is not None:
        return print_plan(config, extra.plan)
    *_, encoder = load_encoder(config, with_weights=False)
    if extra.show is not None:
        sample = show_sample(encoder, Records(config.train_data), extra.show)
        ids = {"input_ids": sample.input_ids.tolist(), "labels": sample.labels.tolist()}
        return print(json.dumps(ids))
    files = [names for names in (config.train_data, config.eval_data) if names]
    checked = [check_files(names, encoder, config, extra) for names in files]
    if extra.page:
        write_data_page(extra.page, checked, reading, config.max_tokens - encoder.num_dummy_tokens)
    if num_problems := sum(len(part.problems) for part in checked):
        count = f"{num_problems} problem{'s' if num_problems > 1 else ''}"
        raise UserError(f"{count}: correct the data, or train with --on_bad_sample skip")
    print("all good. Sample 0, what is trained in [[ ]]:")
    show_sample(encoder, Records(config.train_data), 0)


if __name__ == "__main__":
    run_main(main)
