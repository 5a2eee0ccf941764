"""Check training data as training would see it, without training.

    python check_data.py --train_data train_data/data.json
    python check_data.py --train_data train_data/data.json --show 3

Takes all flags of finetune.py: those on tokens and pixels decide what fits.
"""

import json

import torch

from util.config import UserError, fill_defaults, parse_config, run_main
from util.data_util import Records
from util.model_util import build_encoder, choose_device, find_model, load_processor
from util.plan_util import build_index, check_lengths, raise_problems
from util.sample_util import IGNORE, SampleEncoder


def show_sample(encoder: SampleEncoder, records: Records, i: int) -> None:
    """Print sample `i` as the model sees it, trained text between [[ and ]], then as JSON."""
    if not 0 <= i < len(records):
        raise UserError(f"--show {i}: there are samples 0 to {len(records) - 1}")
    try:
        sample = encoder.encode(records[i], records.folder(i))
    except ValueError as error:
        raise UserError(f"{records.where(i)}: {error}") from error
    input_ids, labels = sample.input_ids, sample.labels
    # Runs of tokens that are alike: one placeholder, or all trained, or all not.
    media = encoder.token_types(input_ids) * input_ids
    kinds = torch.stack([media, labels != IGNORE])
    starts = (kinds[:, 1:] != kinds[:, :-1]).any(0).nonzero()[:, 0] + 1
    for run in torch.arange(len(input_ids)).tensor_split(starts):
        ids = input_ids[run]
        if media[run[0]]:
            print(f"{encoder.tokenizer.decode(ids[:1])} x {len(ids)}", end="")
        else:
            text = encoder.tokenizer.decode(ids)
            print(f"[[{text}]]" if labels[run[0]] != IGNORE else text, end="")
    print(json.dumps({"input_ids": input_ids.tolist(), "labels": labels.tolist()}))


def main() -> None:
    config, extra = parse_config(
        extra=lambda parser: parser.add_argument(
            "--show", type=int, metavar="N", help="print sample N (from 0), trained text in [[ ]]"
        )
    )
    config = fill_defaults(config, choose_device(config.device).type)
    folder = find_model(config.model_name_or_path)
    encoder = build_encoder(folder, load_processor(folder, config), config)
    records = Records(config.train_data)
    if extra.show is not None:
        return show_sample(encoder, records, extra.show)
    index, problems = build_index(records, encoder)
    problems += check_lengths(records, index, config.max_tokens, encoder)
    raise_problems(problems, most=len(problems))
    print(f"all good: {index.summary()}")


if __name__ == "__main__":
    run_main(main)
