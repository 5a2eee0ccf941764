"""Fine-tune Qwen2-VL on many GPUs: finetune.py's loop, the same curve on any number of ranks.

    ./finetune_distributed.sh --train_data train_data/data.json --batch_size 4

Lines that are extra or different here end in "dist" behind a hash, those that they replace in
finetune.py in "single"; a test compares the rest. util/distributed.py shards and starts.
"""

import logging
import math
import time
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState  # dist
from accelerate.utils import broadcast_object_list, reduce  # dist
from tqdm import tqdm

from util.checkpoint import (
    check_same_run,
    export_at_last,
    find_checkpoint,
    load_checkpoint,
    make_output_dir,
    missed_evaluation,
    rewind_files,
    save_checkpoint,
)
from util.config import (
    TINY_NOTICE,
    Config,
    UserError,
    fill_defaults,
    parse_config,
)
from util.data.batch import (
    PlannedData,
    Stopwatch,
    explain_bad_sample,
    explain_stop,
    first_fatal,
    load_micro_batches,
    prepare_data,
)
from util.distributed import (  # dist
    agree_on_signal,  # dist
    build_mesh,  # dist
    check_shared,  # dist
    export_sharded_model,  # dist
    gather_problems,  # dist
    load_sharded_model,  # dist
    main_process_metrics,  # dist
    rank_metrics,  # dist
    start_processes,  # dist
)  # dist
from util.logutil import (
    check_report_to,
    describe_evaluation,
    log_left_out,
    log_setup,
    peak_memory_gib,
    plot_loss,
    setup_logging,
)
from util.model.attention import (
    choose_attention,
)
from util.model.inputs import (
    InputBuilder,
)
from util.model.load import (
    build_encoder,
    find_model_to_train,
    load_processor,
)
from util.model.loss import (
    cross_entropy_sum,
)
from util.model.parts import (
    choose_autocast,
)
from util.optim import (
    build_optimizer,
    learning_rate_at,
    set_learning_rate,
)
from util.run import (
    StopSignal,
    choose_device,
    on_main_process,  # dist
    run_rank,  # dist
)
from util.tools.flops import (
    Throughput,
)
from util.tools.generate import (
    score_answers,
)
from util.tools.planner import (
    check_fits,
)
from util.tools.scores import (
    load_metric,
)

logger = logging.getLogger("finetune")


def train(
    config: Config,
    model,
    processor,
    data: PlannedData,
    eval_data: PlannedData | None,
    num_steps: int,
    device: torch.device,
    checkpoint: Path | None = None,
) -> None:
    """Train `model` in place for `num_steps` optimizer steps, from `checkpoint` or the start."""
    state = PartialState()  # dist
    metrics_file, rank = main_process_metrics(config), state.process_index  # dist
    build_inputs = InputBuilder(processor, model.config._attn_implementation, device)
    export = partial(export_sharded_model, model, processor)  # dist
    model.train()
    optimizer = build_optimizer(model, config)
    first_step = load_checkpoint(checkpoint, model, optimizer) if checkpoint else 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    autocast = choose_autocast(device, config.precision)
    micro_batches = Stopwatch(load_micro_batches(data, first_step, num_steps, config, device, rank))
    throughput = Throughput(model, data, config, device)
    quiet = None if state.is_main_process else True  # dist
    progress = tqdm(total=num_steps, initial=first_step, unit="step", disable=quiet)  # dist
    stop, eval_loss, num_bad_steps = StopSignal(), None, 0
    if data.problems and first_step == 0:
        metrics_file.append({"global_step": 0, "num_bad_samples": len(data.problems)})
    if eval_data and (not checkpoint or missed_evaluation(checkpoint, config, num_steps)):
        scores = evaluate(config, model, build_inputs, eval_data, autocast, device)
        metrics_file.append({"global_step": first_step, **scores})
        logger.info(f"step {first_step:>7,}/{num_steps:,}   {describe_evaluation(scores)}")

    for step in data.plan.steps(first_step, num_steps):
        started, global_step = time.perf_counter(), step.global_step + 1
        lr = learning_rate_at(
            step.global_step, num_steps, config.learning_rate, config.warmup_ratio
        )
        set_learning_rate(optimizer, lr)

        # The step's loss is one mean over all its supervised tokens, however the samples are
        # packed: every micro-batch adds its sum, divided by the count of the whole step.
        loss, problems = torch.zeros((), device=device), []
        num_micro_batches = len(step.micro_batches[0])
        for i, micro_batch in enumerate(islice(micro_batches, num_micro_batches)):  # dist
            # Shards add up their gradients after every micro-batch, so that no rank has  # dist
            # to hold them whole; replicas once a step.  # dist
            model.set_requires_all_reduce(i == num_micro_batches - 1)  # dist
            with autocast:
                logits = model(**build_inputs(micro_batch)).logits
            targets = micro_batch.targets.to(device, non_blocking=True)
            loss_sum = cross_entropy_sum(logits, targets)
            del logits  # or those of the next forward pass would be held beside them
            micro_batch_loss = loss_sum / step.num_supervised_tokens
            # What is wanted is the sum over the ranks; fully_shard takes the mean.  # dist
            (micro_batch_loss * state.num_processes).backward()  # dist
            loss += micro_batch_loss.detach()
            problems += micro_batch.problems

        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        grad_norm, loss = grad_norm.full_tensor(), reduce(loss, "sum")  # dist
        # Here, once a step, the loop waits for the device.
        loss, grad_norm = torch.stack([loss, grad_norm]).tolist()
        problems = gather_problems(problems, device)  # dist
        is_bad = not (math.isfinite(loss) and math.isfinite(grad_norm))
        num_bad_steps = num_bad_steps + 1 if is_bad else 0
        bad_sample = first_fatal(problems, config)
        if bad_sample or num_bad_steps > config.skip_bad_steps:
            save_checkpoint(
                step.global_step, model, optimizer, export, config, data.digest, eval_loss
            )
            raise explain_stop(step, loss, grad_norm, bad_sample)
        if is_bad:
            logger.warning(f"step {global_step} skipped: loss {loss}, gradient norm {grad_norm}")
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - started
        metrics = {
            "global_step": global_step,
            "epoch": step.epoch,
            "loss": None if is_bad else loss,
            "learning_rate": lr,
            "grad_norm": None if is_bad else grad_norm,
            "num_samples": len(step.samples) - len(problems),
            "num_bad_samples": len(problems),
            "num_micro_batches": num_micro_batches,
            "num_tokens": step.num_tokens,
            "num_supervised_tokens": step.num_supervised_tokens,
            "seconds": seconds,
            **throughput(step, seconds, micro_batches.take_seconds()),
            "peak_memory_gib": peak_memory_gib(device),
        }
        metrics |= rank_metrics(data.plan, step, config.max_tokens - data.plan.capacity)  # dist
        metrics_file.append(metrics)
        for problem in problems:
            logger.warning(f"left out   {problem}")
        line = f"loss {loss:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"
        progress.set_postfix_str(line)
        progress.update()
        if global_step % max(1, num_steps // 20) == 0:
            logger.info(f"step {global_step:>7,}/{num_steps:,}   {line}")

        agree_on_signal(stop, device)  # dist
        eval_loss = None  # else that of these very weights
        is_last = global_step == num_steps
        if eval_data and not stop.name and (is_last or global_step % config.eval_steps == 0):
            try:
                scores = evaluate(config, model, build_inputs, eval_data, autocast, device)
            except UserError:  # of the held-out data or --metric: no reason to lose the steps done
                model.reshard()  # dist
                save_checkpoint(global_step, model, optimizer, export, config, data.digest, None)
                raise
            eval_loss = scores["eval_loss"]
            metrics_file.append({"global_step": global_step, **scores})
            logger.info(f"step {global_step:>7,}/{num_steps:,}   {describe_evaluation(scores)}")
        if stop.name or is_last or global_step % config.save_steps == 0:
            is_saved = save_checkpoint(
                global_step, model, optimizer, export, config, data.digest, eval_loss
            )
        if stop.name:
            stop.end_process(global_step, is_saved, config.output_dir)
    progress.close()


@torch.no_grad()
def evaluate(config: Config, model, build_inputs, data: PlannedData, autocast, device) -> dict:
    """Return the loss per supervised token of held-out data, and scores of generated answers.

    Nothing of the training changes.
    """
    loss_sum, num_supervised_tokens = torch.zeros(2, device=device)
    problems = []
    num_steps = data.plan.num_steps_per_epoch
    rank = PartialState().process_index  # dist
    micro_batches = load_micro_batches(data, 0, num_steps, config, device, rank)
    for step in data.plan.steps(0, num_steps):
        for micro_batch in islice(micro_batches, len(step.micro_batches[0])):
            with autocast:
                logits = model(**build_inputs(micro_batch)).logits
            targets = micro_batch.targets.to(device, non_blocking=True)
            loss_sum += cross_entropy_sum(logits, targets)
            num_supervised_tokens += len(targets)
            problems += micro_batch.problems
    totals = torch.stack([loss_sum, num_supervised_tokens])  # dist
    loss_sum, num_supervised_tokens = reduce(totals, "sum")  # dist
    problems = gather_problems(problems, device)  # dist
    if bad_sample := first_fatal(problems, config):
        raise explain_bad_sample(bad_sample)
    for problem in problems:
        logger.warning(f"left out   {problem}")
    result = {"eval_loss": (loss_sum / num_supervised_tokens).item()}
    if problems:
        result["num_bad_eval_samples"] = len(problems)
    if config.eval_generate:
        with autocast:
            result |= score_answers(config, model, build_inputs, data)
    # Without a backward pass, the root's weights would stay gathered.  # dist
    model.reshard()  # dist
    return result


def main() -> None:
    """Parse the flags, prepare, train, export."""
    config = parse_config()
    device = choose_device(config.device)
    state = start_processes(config, device)  # dist
    device, world_size = state.device, state.num_processes  # dist
    mesh, is_main = build_mesh(state, config.shard_size), state.is_main_process  # dist
    if is_main and config.model_name_or_path is None and device.type == "cpu":  # dist
        tqdm.write(TINY_NOTICE)
    checkpoint = on_main_process(find_checkpoint, config) if config.resume_from else None  # dist
    config = fill_defaults(config, device.type, checkpoint and checkpoint.parent)
    # All ranks write into the main one's folder: their clocks need not agree.  # dist
    config = broadcast_object_list([config])[0]  # dist
    check_report_to(config.report_to)
    load_metric(config.metric)  # what is wrong with it is said now
    output_dir = on_main_process(make_output_dir, config, checkpoint)  # dist
    check_shared(output_dir)  # dist

    # Everything that can be wrong with the data is known before the model is loaded.
    folder = find_model_to_train(config.model_name_or_path)
    processor = load_processor(folder, config)
    encoder = build_encoder(folder, processor, config)
    data = prepare_data(config.train_data, encoder, config, world_size)  # dist
    eval_data = None
    if config.eval_data:
        eval_data = prepare_data(config.eval_data, encoder, config, world_size)  # dist
    num_steps = data.plan.num_steps_per_epoch * config.num_epochs
    num_steps = min(num_steps, config.max_steps or num_steps)
    check_fits(folder, config, device, mesh["shard"].size())  # dist

    if checkpoint:
        check_same_run(checkpoint, config, data.digest, num_steps)
        on_main_process(rewind_files, checkpoint)  # dist
    if is_main:  # dist
        config.save(output_dir / "config_used.json")  # dist
        setup_logging(output_dir)  # dist
    torch.manual_seed(config.seed)
    attention = choose_attention(device, config.precision)
    model = load_sharded_model(folder, attention, device, mesh, config)  # dist

    log_setup(config, model, data, eval_data, num_steps, device, checkpoint)
    replicas, shards = mesh["replicate"].size(), mesh["shard"].size()  # dist
    logger.info(f"ranks      {world_size}: {replicas} replicas, each over {shards}")  # dist

    started = time.perf_counter()
    train(config, model, processor, data, eval_data, num_steps, device, checkpoint)
    export_at_last(partial(export_sharded_model, model, processor), output_dir, num_steps)  # dist
    if is_main:  # dist
        plot_loss(output_dir / "metrics.jsonl", output_dir / "loss.png")  # dist
        log_left_out(output_dir / "metrics.jsonl")  # dist
    logger.info(
        f"done       in {time.perf_counter() - started:.0f} s. Compare: "
        f"python test_on_trained_model_by_us.py --model_dir {output_dir}"
    )


if __name__ == "__main__":
    run_rank(main)  # dist
