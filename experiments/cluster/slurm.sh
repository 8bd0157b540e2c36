#!/usr/bin/env bash
# A training stage as a SLURM job that survives its time limit and preemption.
#
#   one GPU    sbatch --gpus-per-node=1 --ntasks-per-node=1 experiments/cluster/slurm.sh sd15_llava7b stage2
#   8 GPUs     sbatch experiments/cluster/slurm.sh sd15_llava7b stage2
#   64 GPUs    sbatch --nodes=8 experiments/cluster/slurm.sh sd15_llava7b stage2
#
# What follows the stage are options of `python -m moma_lightning fit`. Add --partition and --account as your cluster asks.
# One task a GPU, so --ntasks-per-node and --gpus-per-node are the same number. DRY_RUN=1 prints the command.
# The log goes to runs/, which SLURM does not make: where it is missing the job ends without a word (`make fetch` makes it).
#
#SBATCH --job-name=moma
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=runs/slurm-%j.log
#SBATCH --open-mode=append
# Preempted jobs go back into the queue by themselves; three minutes before the time limit this script gets SIGUSR1, and passes it on.
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ $# -lt 2 ] || [ ! -f "experiments/$1/$2.yaml" ]; then
    echo "slurm.sh <experiment> <stage1|stage2> [options]: no experiments/${1:-}/${2:-}.yaml in $PWD (submit from the repository)" >&2
    exit 2
fi
# shellcheck source=experiments/cluster/nccl.sh
source experiments/cluster/nccl.sh

experiment=$1 stage=$2
shift 2
# srun takes a task's processors from sbatch no longer (SLURM 22.05 and later): without them the loading workers would share one.
command=(srun --kill-on-bad-exit=1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-8}" "${PYTHON:-.venv/bin/python}" -m moma_lightning fit
    --config "experiments/$experiment/$stage.yaml"
    --trainer.devices "${SLURM_NTASKS_PER_NODE:-8}" --trainer.num_nodes "${SLURM_JOB_NUM_NODES:-1}"
    --trainer.enable_progress_bar false "$@")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
# srun hands the signal to every task: they save and exit. Its own exit code does not tell this from a crash, as it is the largest of all tasks'.
# The trap comes first: a signal before it would end this script and leave the step.
time_is_up="" step="" code=0
trap 'time_is_up=1; [ -z "$step" ] || kill -USR1 "$step" || true' USR1
"${command[@]}" &
step=$!
[ -z "$time_is_up" ] || kill -USR1 "$step"
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # the signal ended the wait, not the step
    code=0
    wait "$step" || code=$?
done
if [ -n "$time_is_up" ] && [ "$code" -ne 0 ]; then # back into the queue; the same command goes on from the checkpoint
    echo "time is up: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
