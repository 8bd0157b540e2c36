#!/usr/bin/env bash
# A training stage by torchrun, on one node or several.
#
#   experiments/cluster/torchrun.sh <experiment> <stage1|stage2> [options of `python -m moma_lightning fit`]
#
#   one GPU    GPUS=1 experiments/cluster/torchrun.sh sd15_llava7b stage2
#   8 GPUs     experiments/cluster/torchrun.sh sd15_llava7b stage2
#   64 GPUs    on each of 8 nodes: NODES=8 MASTER=<first node> experiments/cluster/torchrun.sh sd15_llava7b stage2
#
# GPUS: processes a node. NODES, MASTER, PORT: how the nodes find each other; on one node a free port is found, so that
# several trainings can share it. RESTARTS: how often torchrun starts all
# processes again when one died; they go on from the last checkpoint. DRY_RUN=1 prints the command.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ $# -lt 2 ] || [ ! -f "experiments/$1/$2.yaml" ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
# shellcheck source=experiments/cluster/nccl.sh
source experiments/cluster/nccl.sh

experiment=$1 stage=$2
shift 2
gpus=${GPUS:-8} nodes=${NODES:-1}
[ "$nodes" = 1 ] && port=${PORT:-0} || port=${PORT:-29500}
command=("${PYTHON:-.venv/bin/python}" -m torch.distributed.run
    --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts "${RESTARTS:-3}"
    --rdzv-backend c10d --rdzv-endpoint "${MASTER:-localhost}:$port" --rdzv-id "$experiment-$stage"
    -m moma_lightning fit --config "experiments/$experiment/$stage.yaml"
    --trainer.devices "$gpus" --trainer.num_nodes "$nodes" "$@")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
