"""Fine-tune Qwen2-VL on one device.

    python finetune.py --train_data train_data/data.json --batch_size 4

The whole training loop is in train(), and these are its words:

index         What is known of every sample before the first step: tokens, supervised tokens, media.
plan          The whole run laid out, a pure function of the index and the flags. Resuming needs
              nothing but a step number.
step          One optimizer step on --batch_size samples, over all GPUs.
micro-batch   What goes through the model at once: some samples of a step in one row, one after the
              other, without padding. --max_tokens is its longest, and sets memory, not mathematics:
              a step has as many of them as it takes.
dummy segment The smallest black picture, at the end of every micro-batch. It trains nothing, but
              lets every parameter take part in every forward pass, also where all samples are text.

finetune_distributed.py is this file with lines that end in "dist" behind a hash, in place of those
that end in "single" here.
"""

import util  # isort: skip # noqa: F401 (before torch: it says why)

import logging
import math
import time
from itertools import islice

import torch

from util.checkpoint import (
    begin_or_resume,
    compare_with_best,
    finish_run,
    load_checkpoint,
    open_run,
    save_checkpoint,
)
from util.config import UserError, parse_config
from util.data.batch import load_micro_batches, prepare_data, refuse_bad_samples
from util.logutil import RunLog
from util.model.inputs import InputBuilder
from util.model.load import (
    load_encoder,
    load_model,  # single
)
from util.model.loss import cross_entropy_sum
from util.optim import build_optimizer, set_learning_rate
from util.run import (
    StopSignal,
    choose_device,  # single
    run_main,  # single
)
from util.tools.flops import Throughput
from util.tools.generate import score_answers
from util.tools.planner import check_fits
from util.tools.scores import load_metric

logger = logging.getLogger("finetune")


def train(config, model, processor, data, eval_data, num_steps, device, checkpoint=None) -> list:
    """Train `model` in place for `num_steps` optimizer steps, from `checkpoint` or the start.

    config: the flags (util/config.py). data, eval_data: PlannedData (util/data/batch.py), the
    second may be None. checkpoint: a folder checkpoint-<step>. Raises UserError where the run
    cannot go on; what was done is saved then. Returns the names of what a full disk has cost.
    """
    build_inputs = InputBuilder(processor, model.config._attn_implementation, device)
    # Weights stay fp32; autocast takes matrix products in bf16. Its cache would keep a bf16 copy of
    # all weights, and each is used once here; autograd keeps those of layers that are not
    # checkpointed, until their backward pass.
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=config.uses_autocast, cache_enabled=False
    )
    model.train()
    optimizer = build_optimizer(model, config)
    first_step, eval_loss = 0, None
    if checkpoint:
        first_step, eval_loss = load_checkpoint(checkpoint, model, optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Worker processes decode, tokenize and pack ahead of the loop, in the order of the plan.
    micro_batches = load_micro_batches(data, first_step, num_steps, config, device)
    throughput = Throughput(model, data, config, device)
    log = RunLog(config, model, data, eval_data, first_step, num_steps, device)
    stop, num_bad_steps, is_saved = StopSignal(), 0, True

    # Also before the first step, to know where it began; and after a resume, where a signal had
    # left no time for an evaluation that was due.
    is_due = first_step % config.eval_steps == 0 or first_step == num_steps
    if eval_data and eval_loss is None and is_due:
        scores = evaluate(config, model, build_inputs, eval_data, autocast, device, stop)
        log.evaluation(first_step, scores)
        if stop.name:
            stop.end_process(first_step, bool(checkpoint), config.output_dir)
        eval_loss = scores["eval_loss"]
        save_checkpoint(first_step, model, optimizer, processor, config, data, eval_loss)
    if compare_with_best(first_step, eval_loss, config)[1]:
        num_steps = first_step

    for step in data.plan.steps(first_step, num_steps):
        started, global_step = time.perf_counter(), step.global_step + 1
        # A function of the step number: there is no scheduler whose state could be lost.
        lr = set_learning_rate(optimizer, step.global_step, num_steps, config)

        # The loss is added up on the device: to read it would be to wait for the device.
        loss, problems = torch.zeros((), device=device), []
        num_micro_batches = len(step.micro_batches[0])
        for micro_batch in islice(micro_batches, num_micro_batches):  # single
            # The arguments say where samples begin and end, so that no token attends to another
            # sample, and where logits are needed: (1, K, vocabulary) for K supervised tokens. For
            # all tokens, they would be most of the memory.
            with autocast:
                logits = model(**build_inputs(micro_batch)).logits
            targets = micro_batch.targets.to(device, non_blocking=True)
            # A further term on the logits is added to this sum, on the next line (and on the same
            # line of util/tools/planner.py, so that its memory is planned).
            loss_sum = cross_entropy_sum(logits, targets)
            # Backward writes the gradient over them, where nobody else holds them.
            del logits
            # One mean over the supervised tokens of the whole step, not a mean of means: so the
            # gradient is the same however the samples are packed.
            micro_batch_loss = loss_sum / step.num_supervised_tokens
            micro_batch_loss.backward()  # single
            loss += micro_batch_loss.detach()
            # Of samples that could not be decoded.
            problems += micro_batch.problems

        # The norm before clipping is what is logged.
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        # Here, once a step, the loop waits for the device: before the optimizer, since numbers that
        # are not finite must not reach the weights.
        loss, grad_norm = torch.stack([loss, grad_norm]).tolist()
        is_bad = not (math.isfinite(loss) and math.isfinite(grad_norm))
        num_bad_steps = num_bad_steps + 1 if is_bad else 0
        try:
            refuse_bad_samples(problems, config, len(step.samples))
            if num_bad_steps > config.skip_bad_steps:
                step.refuse(loss, grad_norm)
        except UserError:
            # The steps before this one, unless they are saved already.
            save_checkpoint(step.global_step, model, optimizer, processor, config, data, eval_loss)
            raise
        if is_bad:
            logger.warning(f"step {global_step} skipped: loss {loss}, gradient norm {grad_norm}")
        else:
            optimizer.step()
        # Set to None, gradients take no memory until the next backward pass.
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
        }
        log.step(metrics, problems)

        # A signal comes at any time, and to ranks at different times: it counts from here on.
        stop.agree()
        is_last = global_step == num_steps
        # A checkpoint holds the held-out loss of its own weights, or none, so that the best of them
        # can be kept.
        eval_loss = None
        if eval_data and not stop.name and (is_last or global_step % config.eval_steps == 0):
            try:
                scores = evaluate(config, model, build_inputs, eval_data, autocast, device, stop)
            except UserError:
                # Held-out data or a metric that fail are no reason to lose the steps done.
                save_checkpoint(global_step, model, optimizer, processor, config, data, None)
                raise
            eval_loss = scores.get("eval_loss")
            log.evaluation(global_step, scores)
        # With --early_stopping, what may be the best of the run is saved at once.
        is_best, is_over = compare_with_best(global_step, eval_loss, config)
        if stop.name or is_last or is_best or is_over or global_step % config.save_steps == 0:
            is_saved = save_checkpoint(
                global_step, model, optimizer, processor, config, data, eval_loss
            )
        if stop.name:
            stop.end_process(global_step, is_saved, config.output_dir)
        if is_over:
            num_steps = global_step
            break

    # What is saved is not written again; where a full disk has refused it, this is the last chance.
    lost = log.close(is_saved)
    if not save_checkpoint(num_steps, model, optimizer, processor, config, data, eval_loss):
        lost.append(f"checkpoint-{num_steps}")
    return lost


@torch.no_grad()
def evaluate(config, model, build_inputs, data, autocast, device, stop) -> dict:
    """Return the loss per supervised token of held-out data, and scores of generated answers.

    Nothing of the training changes: neither weights nor random states. A signal ends it, and
    nothing is returned: the resumed run makes up for it.
    """
    loss_sum, num_supervised_tokens = torch.zeros(2, device=device)
    problems = []
    # One epoch of a plan of its own: the same packing, the same loss as in training.
    num_steps = data.plan.num_steps_per_epoch
    for micro_batch in load_micro_batches(data, 0, num_steps, config, device):
        with autocast:
            logits = model(**build_inputs(micro_batch)).logits
        targets = micro_batch.targets.to(device, non_blocking=True)
        loss_sum += cross_entropy_sum(logits, targets)
        num_supervised_tokens += len(targets)
        problems += micro_batch.problems
        stop.agree()
        if stop.name:
            return {}
    refuse_bad_samples(problems, config)
    for problem in problems:
        logger.warning(f"left out   {problem}")
    result = {"eval_loss": (loss_sum / num_supervised_tokens).item()}
    if problems:
        result["num_bad_eval_samples"] = len(problems)
    if config.eval_generate:
        with autocast:
            result |= score_answers(config, model, build_inputs, data, stop)
    return {} if stop.name else result


def main() -> None:
    """Parse the flags, prepare, train, export."""
    config = parse_config()
    device = choose_device(config.device)  # single
    # The output folder, and with --resume_from the checkpoint in it.
    config, checkpoint = open_run(config, device)
    load_metric(config.metric)  # what is wrong with it is said now

    # Everything that can be wrong with the data is known before the model is loaded, and so is
    # whether it fits.
    folder, processor, encoder = load_encoder(config)
    data = prepare_data(config.train_data, encoder, config)
    eval_data = prepare_data(config.eval_data, encoder, config) if config.eval_data else None
    num_steps = data.plan.num_steps(config.num_epochs, config.max_steps)
    check_fits(folder, config, device)

    begin_or_resume(config, checkpoint, data, num_steps)
    torch.manual_seed(config.seed)
    model = load_model(folder, device, config)  # single
    started = time.perf_counter()
    lost = train(config, model, processor, data, eval_data, num_steps, device, checkpoint)
    finish_run(model, processor, config, started, lost)


if __name__ == "__main__":
    run_main(main)  # single
