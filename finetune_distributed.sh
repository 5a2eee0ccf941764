#!/usr/bin/env bash
# Fine-tune on several GPUs, of one machine or of several; without a GPU, two processes train the
# embedded tiny model on the CPU. Edit this block, then run ./finetune_distributed.sh, on each
# machine. What follows on the command line goes on to finetune_distributed.py and wins.

CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-all}"  # all, or as in 0,1,2,3: one process for each
NUM_MACHINES="${NUM_MACHINES:-1}"
MACHINE_RANK="${MACHINE_RANK:-0}"                   # 0 on the main machine, then 1, 2, ...
MAIN_PROCESS_IP="${MAIN_PROCESS_IP:-127.0.0.1}"     # the main machine, as the others reach it
MAIN_PROCESS_PORT="${MAIN_PROCESS_PORT:-29500}"     # a free port there
MODEL=""                            # empty: Qwen/Qwen2-VL-2B-Instruct; without a GPU: tiny
TRAIN_DATA="train_data/data.json"
BATCH_SIZE=4                        # samples in one optimizer step, over all GPUs
MAX_TOKENS=4096                     # tokens in one forward pass: lower it when memory runs out
SHARD_SIZE=""                       # GPUs that share one copy of the model; empty: a machine's
LEARNING_RATE=""                    # empty: 1e-5; tiny: 1e-3
NUM_EPOCHS=""                       # empty: 3; tiny: 60

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source util/setup_env.sh requirements.txt

if [[ "$CUDA_VISIBLE_DEVICES" == all ]]; then
    CUDA_VISIBLE_DEVICES="$({ nvidia-smi --query-gpu=index --format=csv,noheader || true; } \
        2>/dev/null | paste -sd,)"
    if [[ -z "$CUDA_VISIBLE_DEVICES" && -e /dev/nvidia0 ]]; then  # a container without nvidia-smi
        unset CUDA_VISIBLE_DEVICES
        CUDA_VISIBLE_DEVICES="$(python -c \
            'import torch; print(*range(max(1, torch.cuda.device_count())), sep=",")')"
    fi
fi
export CUDA_VISIBLE_DEVICES
# Smaller gaps in memory. PyTorch asks NVML first, which comes with nvidia-smi, and crashes without.
if command -v nvidia-smi > /dev/null; then
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
fi
IFS=, read -ra gpus <<< "$CUDA_VISIBLE_DEVICES"
if [[ ${#gpus[@]} -gt 1 ]]; then
    launcher=(accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no
        --num_processes $((${#gpus[@]} * NUM_MACHINES)) --num_machines "$NUM_MACHINES"
        --machine_rank "$MACHINE_RANK" --main_process_ip "$MAIN_PROCESS_IP"
        --main_process_port "$MAIN_PROCESS_PORT")
else
    # accelerate would start one process without joining it to those of other machines.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    launcher=(torchrun --nproc_per_node $((${#gpus[@]} ? 1 : 2)))
    if [[ "$NUM_MACHINES" -gt 1 ]]; then
        launcher+=(--nnodes "$NUM_MACHINES" --node_rank "$MACHINE_RANK"
            --master_addr "$MAIN_PROCESS_IP" --master_port "$MAIN_PROCESS_PORT")
    else
        launcher+=(--standalone)
    fi
fi

# Under nohup, SIGHUP is nothing for the launcher to handle either.
[[ -z "$(trap -p HUP)" ]] || export PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGQUIT"
# A signal lets the ranks finish their step and save; launchers would end them after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}"
export STOPPED_FILE="$(mktemp -u)"  # made by ranks that have saved
set -m  # a process group of its own, so that a signal reaches the launcher once
"${launcher[@]}" finetune_distributed.py \
    ${MODEL:+--model_name_or_path "$MODEL"} \
    --train_data "$TRAIN_DATA" \
    --batch_size "$BATCH_SIZE" \
    --max_tokens "$MAX_TOKENS" \
    ${SHARD_SIZE:+--shard_size "$SHARD_SIZE"} \
    ${LEARNING_RATE:+--learning_rate "$LEARNING_RATE"} \
    ${NUM_EPOCHS:+--num_epochs "$NUM_EPOCHS"} \
    "$@" &
trap 'kill -TERM %1' TERM
trap 'kill -INT %1' INT
# Of a terminal that is closed, which may send it several times; not under nohup, as bash has it.
trap 'trap "" HUP; kill -HUP %1' HUP
trap '' PIPE             # whoever reads what is printed may be gone
code=0
wait %1 || code=$?
while kill -0 %1 2> /dev/null; do  # a signal ended the waiting, not the launcher
    code=0
    wait %1 || code=$?
done
if [[ -e "$STOPPED_FILE" ]]; then
    rm "$STOPPED_FILE"
    echo "Stopped by a signal, and saved. With --resume_from latest, the run goes on." || true
    exit 75
fi
exit "$code"
