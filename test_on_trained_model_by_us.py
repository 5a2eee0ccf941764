"""Answer test_data/prompts.json with a model that finetune.py has trained.

    python test_on_trained_model_by_us.py [--model_dir train_output/20260101_120000]

Without a model, the newest run under train_output is taken.
"""

from pathlib import Path

from util.config import UserError, fill_defaults
from util.run import choose_device, run_main
from util.tools.generate import answer_prompts, newest_run, parse_arguments, run_config


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0])
    name = arguments.model_name_or_path or newest_run(arguments.model_dir)
    if name is None:
        raise UserError("train_output holds no finished run: train one first, or use --model_dir")
    config = run_config(Path(name) if Path(name).is_dir() else None)
    config = fill_defaults(config, choose_device(arguments.device).type)
    answer_prompts(str(name), config, arguments)


if __name__ == "__main__":
    run_main(main)
