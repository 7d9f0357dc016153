#!/usr/bin/env bash
# GPT3-175B in setting 9 of the TeraPipe paper: 48 hosts of 8 GPUs, a process for each GPU.
#
#     launch/mpi.sh hosts.txt --config.data.train=/shared/tokens.bin --workdir=/shared/runs/gpt3_175b
#
# hosts.txt names a host a line, as "host-1 slots=8"; process 0 runs on the first. For Open MPI, whose
# versions from 5 on jax does not recognise by itself: hence the flags.
set -euo pipefail

hosts=$1
shift
read -r first _ <"$hosts"
export COORDINATOR="$first:${PORT:-29500}"

# docs/clusters.md says why.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_command_buffer= --xla_disable_hlo_passes=collective-permute-motion"

# shellcheck disable=SC2016 # Each process expands its own variables.
exec mpirun --hostfile "$hosts" --map-by slot -x COORDINATOR -x XLA_FLAGS bash -c '
  exec python launch/multihost.py --config=configs/gpt3_175b.py --coordinator="$COORDINATOR" \
    --num-processes="$OMPI_COMM_WORLD_SIZE" --process-id="$OMPI_COMM_WORLD_RANK" \
    --local-device-ids "$OMPI_COMM_WORLD_LOCAL_RANK" "$@"' mpi.sh "$@"
