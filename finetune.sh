#!/usr/bin/env bash
# Fine-tune on one GPU; without one, the embedded tiny model learns on the CPU in about a minute.
# Edit this block, then run ./finetune.sh. What follows on the command line goes on to finetune.py
# and wins: ./finetune.sh --max_steps 5. All flags: python finetune.py --help

export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
MODEL=""                            # empty: Qwen/Qwen2-VL-2B-Instruct; without a GPU: tiny
TRAIN_DATA="train_data/data.json"
BATCH_SIZE=4                        # samples in one optimizer step
MAX_TOKENS=4096                     # tokens in one forward pass: lower it when memory runs out
LEARNING_RATE=""                    # empty: 1e-5; tiny: 1e-3
NUM_EPOCHS=""                       # empty: 3; tiny: 60

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source util/setup_env.sh requirements.txt
# Smaller gaps in memory. PyTorch asks NVML first, which comes with nvidia-smi, and crashes without.
if command -v nvidia-smi > /dev/null; then
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
fi

exec python finetune.py \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    --train_data "$TRAIN_DATA" \
    --batch_size "$BATCH_SIZE" \
    --max_tokens "$MAX_TOKENS" \
    ${LEARNING_RATE:+--learning_rate "$LEARNING_RATE"} \
    ${NUM_EPOCHS:+--num_epochs "$NUM_EPOCHS"} \
    "$@"
