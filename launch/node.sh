#!/usr/bin/env bash
# usage: [NAME=VALUE ...] launch/node.sh [OVERRIDE ...]
#
# What runs on every node of a job, and the one place that says how: starts NPROC processes of consensus.train under
# torchrun and prints the exact command first. The arguments are Hydra overrides. Runs in the folder you call it from.
#
#   NPROC             processes on this node; default: one for each GPU here, else 1
#   NNODES            nodes; default: 1
#   RENDEZVOUS        host:port of one of them, where they meet; needed with more than one
#   RUN_ID            a name that all nodes of this start share, and no other start has; default: consensus
#   INTERFACE         network interface between the nodes; becomes GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
#   OMP_NUM_THREADS   threads of a process; default: 1
#   MODULE            what each process runs; default: consensus.train. With consensus.doctor the job is looked at instead
#   CONSENSUS_VENV    environment; default: the checkout's .venv, else the python3 on PATH
#
# How long nodes wait for each other at the start, and ranks later, is the override group.timeout_s=SECONDS (600).
#
# Exit codes: 0 done. Else torchrun's own: 1 where a rank failed or was asked to stop, which prints its own code (75: it
# left a checkpoint, and resume=auto continues); 2 for a mistake in these variables.
set -euo pipefail

die() {
    printf 'launch/node.sh: %s\n' "$*" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${CONSENSUS_VENV:-$root/.venv}/bin/python
[[ -x $python ]] || python=python3

gpus() { nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true; }
nproc=${NPROC:-$(gpus)}
[[ $nproc != 0 || -n ${NPROC:-} ]] || nproc=1
nnodes=${NNODES:-1}
module=${MODULE:-consensus.train}
[[ $nproc =~ ^[1-9][0-9]*$ ]] || die "NPROC=$nproc: the number of processes is a whole number from 1"
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || die "NNODES=$nnodes: the number of nodes is a whole number from 1"

# Both ask the kernel through Python: `ip` is not in small images. IPv4 only; neither prints why it fails.
is_own_address() { # with a loopback address no other node could mean this one
    [[ $1 =~ ^[0-9.]+$ && $1 != 127.* ]] && "$python" - "$1" 2>/dev/null <<'PYTHON'
import socket, sys

socket.socket().bind((sys.argv[1], 0))
PYTHON
}
address_of() { # the first one of an interface
    "$python" - "$1" 2>/dev/null <<'PYTHON'
import fcntl, socket, struct, sys

SIOCGIFADDR = 0x8915
answer = fcntl.ioctl(socket.socket(), SIOCGIFADDR, struct.pack("256s", sys.argv[1].encode()))
print(socket.inet_ntoa(answer[20:24]))
PYTHON
}

# The ranks of one machine share its cores: with one thread each they do not fight over them. Set it yourself
# where there are more cores than ranks.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -n ${INTERFACE:-} ]]; then
    [[ -e /sys/class/net/$INTERFACE ]] || die "INTERFACE=$INTERFACE: this machine has $(ls -m /sys/class/net)"
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi

if ((nnodes == 1)); then
    # With a free port of its own: two runs on one machine do not meet by accident.
    meeting=(--standalone)
else
    [[ ${RENDEZVOUS:-} =~ ^[^:]+:[0-9]+$ ]] || die "RENDEZVOUS=${RENDEZVOUS:-}: $nnodes nodes meet at host:port"
    # How long anyone waits for another is one setting, of the run; torchrun wants whole seconds.
    timeout=600
    for argument in "$@"; do
        if [[ $argument =~ ^group\.timeout_s=([0-9]+)(\.[0-9]*)?$ ]]; then timeout=$((BASH_REMATCH[1] + 1)); fi
    done
    conf=join_timeout=$timeout
    # c10d: whichever node has that address keeps the store; no other service is needed.
    # torch knows a name of this machine as its own, but an address only where the name resolves to it.
    if is_own_address "${RENDEZVOUS%:*}"; then conf+=,is_host=true; fi
    meeting=(--nnodes="$nnodes" --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="${RUN_ID:-consensus}" --rdzv-conf="$conf")
    # Where names of hosts do not resolve from node to node, the address of the interface does.
    if [[ -n ${INTERFACE:-} ]] && address=$(address_of "$INTERFACE"); then meeting+=(--local-addr="$address"); fi
fi

command=(
    # torchrun as a module: certainly the one of this interpreter, whatever PATH says.
    "$python" -m torch.distributed.run
    "${meeting[@]}"
    # Processes. The workers are the config's matter (workers=8 on 4 processes is two workers each).
    --nproc-per-node="$nproc"
    # No --tee and no --local-ranks-filter: only rank 0 writes to the console anyhow, so whatever another rank
    # prints is a failure that must be seen; and rank 0 keeps the terminal, which --tee would take away.
    # No --max-restarts: whoever watches the run starts it again with resume=auto. With it, a rank that dies has
    # all of them restarted, and the run continues from its last checkpoint by itself.
    -m "$module" "$@"
)
line=
for name in OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME; do
    if [[ -n ${!name:-} ]]; then line+="$name=${!name} "; fi
done
printf -v line '%s%s' "$line" "$(printf '%q ' "${command[@]}")"
printf '%s\n' "$line" >&2 # at once: several nodes may write to one terminal
if [[ $module == consensus.doctor ]] && ((nnodes > 1)); then
    # What keeps the nodes apart keeps torchrun waiting: it is looked for first, without it.
    CONSENSUS_DOCTOR=nodes NNODES=$nnodes RENDEZVOUS=$RENDEZVOUS RUN_ID=${RUN_ID:-consensus} \
        "$python" -m consensus.doctor "$@"
fi
exec "${command[@]}"
