#!/usr/bin/env bash
# usage: launch/slurm_sweep.sh [SWEEP ARGUMENT ...]
#
# A sweep as an array of SLURM jobs, one for each run, through Hydra's submitit launcher. Start it on a login node, in a folder
# shared by all nodes, and leave it running: it shows a dashboard and writes the report at the end.
#
#   launch/slurm_sweep.sh grid=table1_small hydra.launcher.gpus_per_node=1 hydra.launcher.cpus_per_task=4
#
# Every resource is a key of the launcher: hydra.launcher.{partition,timeout_min,mem_gb,cpus_per_task,gpus_per_node,
# array_parallelism,additional_parameters}. Ctrl+C cancels the jobs, each of which writes a checkpoint; the
# same command continues them. Needs `pip install hydra-submitit-launcher` in the environment.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${CONSENSUS_VENV:-$root/.venv}/bin/python
[[ -x $python ]] || python=python3

command=("$python" -m consensus.sweep hydra/launcher=submitit_slurm "$@")
{
    printf '%q ' "${command[@]}"
    printf '\n'
} >&2
exec "${command[@]}"
