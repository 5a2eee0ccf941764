"""Answer test_data/prompts.json with the base model, to compare with the trained one.

    python test_on_official_model.py [--model_name_or_path Qwen/Qwen2-VL-2B-Instruct]

The base model and the pixel limits are those of the newest run under train_output (or
--model_dir), so that nothing but the weights differs.
"""

from util.config import fill_defaults
from util.run import choose_device, run_main
from util.tools.generate import answer_prompts, newest_run, parse_arguments, run_config


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0])
    config = run_config(newest_run(arguments.model_dir))
    config = fill_defaults(config, choose_device(arguments.device).type)
    answer_prompts(arguments.model_name_or_path or config.model_name_or_path, config, arguments)


if __name__ == "__main__":
    run_main(main)
