#!/usr/bin/env bash
# GPT3-175B in setting 9 of the TeraPipe paper: 48 hosts of 8 GPUs, a process for each GPU.
#
#     sbatch launch/slurm.sh --config.data.train=/shared/tokens.bin --workdir=/shared/runs/gpt3_175b
#
# When the time of the job is up, the run saves, and the job queues again to go on. It also does if
# a host is lost. It ends when the run has finished or failed, or with scancel.
#
#SBATCH --nodes=48
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300 # before the time is up, for a last checkpoint
set -euo pipefail

# docs/clusters.md says why.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_command_buffer= --xla_disable_hlo_passes=collective-permute-motion"

# jax reads in Slurm's environment where process 0 is, how many there are and which one this is.
status=0
srun --kill-on-bad-exit=1 --cpu-bind=none python launch/multihost.py --config=configs/gpt3_175b.py "$@" || status=$?

saved_for_usr1=138 # 128 and the number of the signal
if [[ $status == "$saved_for_usr1" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
