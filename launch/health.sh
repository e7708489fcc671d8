#!/usr/bin/env bash
# usage: launch/health.sh
#
# Health check of the container: runs experiment=smoke on the CPU. Exit code 0, or 1 with the last lines of the run's output.
#
# It does not disturb a run beside it: one process with one thread at a low priority; no GPU; a folder of its own, which is
# removed; and no rank of a job, even if the environment names one. It takes about 5 s of a core and up to 1 GB of memory.
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

# Not above 5: beside processes that keep every core busy, it still gets a quarter of a core.
if ! nice -n 5 timeout --kill-after=10 240 "$python" -m consensus.train "${overrides[@]}" >log 2>&1; then
    tail -n 5 log >&2
    exit 1
fi
