"""Fine-tune Qwen2-VL on one device.

    python finetune.py --train_data train_data/data.json --batch_size 4

The whole training loop is in train(). What it stands on: util/data_util.py turns conversations
into packed micro-batches, util/model_util.py loads the model. README.md shows the way of the data.
"""

import logging
import math
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from util.config import Config, UserError, fill_defaults, parse_config, run_main
from util.data_util import load_records
from util.logutil import (
    append_metrics,
    check_report_to,
    open_reporter,
    peak_memory_gib,
    plot_loss,
    setup_logging,
)
from util.model_util import (
    InputBuilder,
    build_encoder,
    choose_attention,
    choose_device,
    export_model,
    find_model,
    load_model,
    load_processor,
)
from util.optim_util import build_optimizer, learning_rate_at
from util.plan_util import (
    Plan,
    SampleDataset,
    build_index,
    check_lengths,
    load_micro_batches,
    raise_problems,
)

logger = logging.getLogger("finetune")


def train(config: Config, model, build_inputs, dataset, plan, num_steps, device, output_dir):
    """Train `model` in place for `num_steps` optimizer steps of `plan`."""
    model.train()
    optimizer = build_optimizer(model, config.weight_decay)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # fp32 weights either way; under autocast the matrix products run in bf16.
    autocast = (
        torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()
    )
    micro_batches = load_micro_batches(
        dataset, plan.steps(0, num_steps), 0, config.num_workers, device.type == "cuda"
    )
    report = open_reporter(config, output_dir)
    progress = tqdm(total=num_steps, unit="step", dynamic_ncols=True, disable=None)

    for step in plan.steps(0, num_steps):
        started = time.perf_counter()
        lr = learning_rate_at(
            step.global_step, num_steps, config.learning_rate, config.warmup_ratio
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The step's loss is one mean over all its supervised tokens, however the samples are
        # packed: every micro-batch adds its sum, divided by the count of the whole step.
        loss = torch.zeros((), device=device)
        num_micro_batches = len(step.micro_batches[0])
        for micro_batch in islice(micro_batches, num_micro_batches):
            with autocast:
                logits = model(**build_inputs(micro_batch)).logits[0]
            targets = micro_batch.targets.to(device, non_blocking=True)
            loss_sum = F.cross_entropy(logits.float(), targets, reduction="sum")
            micro_batch_loss = loss_sum / step.num_supervised_tokens
            micro_batch_loss.backward()
            loss += micro_batch_loss.detach()

        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        # The only place where the step waits for the device.
        loss, grad_norm = torch.stack([loss, grad_norm]).tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(
                f"step {step.global_step + 1}: loss {loss}, gradient norm {grad_norm}: stopped "
                f"before the weights change. Samples of this step: {step.samples}. Look at them "
                "(check_data.py --show N), lower --learning_rate, or try --precision fp32"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - started
        metrics = {
            "global_step": step.global_step + 1,
            "epoch": step.epoch,
            "loss": loss,
            "learning_rate": lr,
            "grad_norm": grad_norm,
            "num_samples": len(step.samples),
            "num_micro_batches": num_micro_batches,
            "num_tokens": step.num_tokens,
            "num_supervised_tokens": step.num_supervised_tokens,
            "seconds": seconds,
            "tokens_per_second": step.num_tokens / seconds,
            "peak_memory_gib": peak_memory_gib(device),
        }
        append_metrics(output_dir / "metrics.jsonl", metrics)
        report(metrics)
        line = f"loss {loss:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"
        progress.set_postfix_str(line)
        progress.update()
        if (step.global_step + 1) % max(1, num_steps // 20) == 0:
            logger.info(f"step {step.global_step + 1:>7,}/{num_steps:,}   {line}")
    progress.close()


def main() -> None:
    """Parse the flags, prepare, train, export."""
    config = parse_config()
    device = choose_device(config.device)
    if config.model_name_or_path is None and device.type == "cpu":
        tqdm.write(
            "*** No NVIDIA device: training the embedded TINY model, a toy with random weights.\n"
            "*** For the real one: --model_name_or_path Qwen/Qwen2-VL-2B-Instruct (or a folder)."
        )
    config = fill_defaults(config, device.type)
    check_report_to(config.report_to)
    output_dir = Path(config.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir}: exists and is not an empty folder")

    # Everything that can be wrong with the data is known before the model is loaded.
    folder = find_model(config.model_name_or_path)
    processor = load_processor(folder, config)
    encoder = build_encoder(folder, processor, config, config.train_data)
    records = load_records(config.train_data)
    index, problems = build_index(config.train_data, records, encoder)
    problems += check_lengths(config.train_data, index, config.max_tokens, encoder)
    raise_problems(problems)
    capacity = config.max_tokens - encoder.num_dummy_tokens
    plan = Plan(index, config.batch_size, capacity, config.seed, world_size=1)
    num_steps = plan.num_steps_per_epoch * config.num_epochs
    num_steps = min(num_steps, config.max_steps or num_steps)

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        config.save(output_dir / "config_used.json")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written: {error}") from error
    setup_logging(output_dir)
    torch.manual_seed(config.seed)
    attention = choose_attention(device, config.precision)
    model = load_model(folder, attention, device)

    logger.info(
        f"model      {config.model_name_or_path}: {model.num_parameters() / 1e6:,.1f} M "
        f"parameters on {device}, {config.precision}, attention {attention}"
    )
    logger.info(f"data       {config.train_data}: {index.summary()}")
    logger.info(
        f"steps      {num_steps} of {config.batch_size} samples ({plan.num_steps_per_epoch} an "
        f"epoch), in micro-batches of at most {config.max_tokens:,} tokens; learning rate "
        f"{config.learning_rate:g}"
    )
    logger.info(f"output     {output_dir}")

    started = time.perf_counter()
    build_inputs = InputBuilder(processor, attention, device)
    dataset = SampleDataset(config.train_data, records, index, encoder)
    train(config, model, build_inputs, dataset, plan, num_steps, device, output_dir)
    export_model(model, processor, output_dir)
    plot_loss(output_dir / "metrics.jsonl", output_dir / "loss.png")
    logger.info(
        f"done       in {time.perf_counter() - started:.0f} s. Compare: "
        f"python test_on_trained_model_by_us.py --model_dir {output_dir}"
    )


if __name__ == "__main__":
    run_main(main)
