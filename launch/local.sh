#!/usr/bin/env bash
# usage: launch/local.sh [NPROC] [OVERRIDE ...]
#
# One node: starts NPROC processes (default: $NPROC, else 4) of consensus.train under torchrun and prints the
# exact command first. The arguments after NPROC are Hydra overrides. Runs in the folder you call it from.
# The interpreter is that of CONSENSUS_VENV, else of the checkout's .venv, else the python3 on PATH.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${CONSENSUS_VENV:-$root/.venv}/bin/python
[[ -x $python ]] || python=python3

nproc=${NPROC:-4}
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    nproc=$1
    shift
fi
if [[ ! $nproc =~ ^[1-9][0-9]*$ ]]; then
    printf 'launch/local.sh: NPROC=%s: the number of processes is a whole number from 1\n' "$nproc" >&2
    exit 2
fi

# The ranks of one machine share its cores: with one thread each they do not fight over them. Set it yourself
# where there are more cores than ranks.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

command=(
    # torchrun as a module: certainly the one of this interpreter, whatever PATH says.
    "$python" -m torch.distributed.run
    # One node, with a free port of its own: two runs on one machine do not meet by accident.
    --standalone
    # Processes. The workers are the config's matter (workers=8 on 4 processes is two workers each).
    --nproc-per-node="$nproc"
    # No --tee and no --local-ranks-filter: only rank 0 writes to the console anyhow, so whatever another rank
    # prints is a failure that must be seen; and rank 0 keeps the terminal, which --tee would take away.
    # No --max-restarts: whoever watches a run on one machine starts it again with resume=auto. With it, a rank
    # that dies has all of them restarted, and the run continues from its last checkpoint by itself.
    -m consensus.train "$@"
)
{
    printf 'OMP_NUM_THREADS=%s' "$OMP_NUM_THREADS"
    printf ' %q' "${command[@]}"
    printf '\n'
} >&2
exec "${command[@]}"
