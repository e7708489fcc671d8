#!/usr/bin/env bash
# usage: launch/health.sh
#
# Whether training works here: experiment=smoke, on the CPU. The health check of the Dockerfile. Exit code 0, or 1 with the
# last lines that the run printed.
#
# It leaves a run beside it alone: one process with one thread, which gives way to others; no GPU; a folder of its own, which
# is removed; and no place among the ranks of a job, should the environment name one. Some 5 s of a core, up to 1 GB of memory.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${CONSENSUS_VENV:-$root/.venv}/bin/python
[[ -x $python ]] || python=python3

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
overrides=(experiment=smoke device=cpu output.run_dir=run output.tensorboard=false output.checkpoint_every=null)

# Not nicer than 5: beside processes that keep every core busy it still gets a quarter of one.
if ! nice -n 5 timeout --kill-after=10 240 "$python" -m consensus.train "${overrides[@]}" >log 2>&1; then
    tail -n 5 log >&2
    exit 1
fi
