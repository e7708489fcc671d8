#!/usr/bin/env bash
# usage: [NAME=VALUE ...] launch/node.sh [OVERRIDE ...]
#
# Starts one node of a job: NPROC processes of consensus.train under torchrun, or of an elastic run under consensus.elastic. All
# other launchers call this script. It prints the exact command first. The arguments are Hydra overrides. It runs in the current
# folder.
#
#   NPROC             processes on this node; default: one for each GPU that CUDA_VISIBLE_DEVICES leaves visible, else 1
#   NNODES            nodes; default: 1
#   RENDEZVOUS        host:port of the rendezvous, on one of the nodes; required with more than one node; [address]:port for IPv6
#   RUN_ID            a name common to all nodes of this start, and different from that of other starts; default: consensus
#   INTERFACE         network interface between the nodes; becomes GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
#   OMP_NUM_THREADS   threads of a process; default: 1
#   MODULE            the module that each process runs; default: consensus.train; consensus.doctor: preflight checks instead
#   CONSENSUS_VENV    environment; default: the checkout's .venv, else the python3 on PATH
#   ELASTIC           true: processes of an elastic run, which go on when others are lost, and may join later (docs/elastic.md). The
#                     run begins with NPROC * NNODES of them, in a store at RENDEZVOUS. One more node later: NNODES=1 and RENDEZVOUS
#   SERVE             true, false: whether this node keeps the store of an elastic run; default: true if RENDEZVOUS is its address
#
# Under nohup, the end of the terminal's session does not stop the run.
#
# The override group.timeout_s=SECONDS (600) is the timeout of nodes at the start and of ranks later.
#
# Exit codes: 0 complete; 2 for a mistake in these variables; otherwise that of torchrun: 1 where a rank failed or was stopped.
# torchrun prints the code of the rank (75: stopped with a checkpoint, and resume=auto continues). With ELASTIC=true that of
# consensus.elastic: 0 complete, 75 left the run or stopped with a checkpoint.
set -euo pipefail

die() {
    printf 'launch/node.sh: %s\n' "$*" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${CONSENSUS_VENV:-$root/.venv}/bin/python
[[ -x $python ]] || python=python3

gpus() { # those that the processes will see
    local total seen=0 id
    total=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    if [[ -z ${CUDA_VISIBLE_DEVICES+set} || $total == 0 ]]; then
        printf '%s' "$total"
        return
    fi
    for id in ${CUDA_VISIBLE_DEVICES//,/ }; do # as CUDA reads it: the first invalid entry hides the rest
        [[ $id =~ ^(GPU|MIG)- ]] || { [[ $id =~ ^[0-9]+$ ]] && ((10#$id < total)); } || break
        seen=$((seen + 1))
    done
    printf '%s' "$seen"
}
nproc=${NPROC:-$(gpus)}
[[ $nproc != 0 || -n ${NPROC:-} ]] || nproc=1
nnodes=${NNODES:-1}
module=${MODULE:-consensus.train}
[[ $nproc =~ ^[1-9][0-9]*$ ]] || die "NPROC=$nproc: the number of processes is a whole number from 1"
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || die "NNODES=$nnodes: the number of nodes is a whole number from 1"
for name in ELASTIC SERVE; do
    [[ ${!name:-true} =~ ^(true|false)$ ]] || die "$name=${!name}: allowed are true and false"
done
elastic=${ELASTIC:-false}
[[ $module == consensus.train ]] || elastic=false # the doctor looks at the nodes of both kinds of runs under torchrun

# These use Python, since small images have no `ip`. They print no errors.
is_own_address() { # not a loopback address, which no other node could reach
    [[ $1 =~ ^[0-9.]+$ || $1 == *:* ]] && ! is_loopback "$1" && "$python" - "$1" 2>/dev/null <<'PYTHON'
import socket, sys

family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
socket.socket(family).bind((sys.argv[1], 0))
PYTHON
}
is_loopback() { [[ $1 == 127.* || $1 == ::1 ]]; }
is_here() { # whether a name or an address is that of this machine
    "$python" - "$1" >/dev/null 2>&1 <<'PYTHON'
import socket, sys

for family, kind, protocol, _, address in socket.getaddrinfo(sys.argv[1], 0, type=socket.SOCK_STREAM):
    try:
        socket.socket(family, kind, protocol).bind(address)
        sys.exit(0)
    except OSError:
        pass
sys.exit(1)
PYTHON
}
address_of() { # address_of INTERFACE HOST: the first address of an interface, of the family of a host
    "$python" - "$@" 2>/dev/null <<'PYTHON'
import fcntl, socket, struct, sys

name, host = sys.argv[1:]
if ":" in host:  # a name may resolve to either family; torch's own choice is IPv4
    with open("/proc/net/if_inet6") as file:
        rows = [line.split() for line in file]
    found = [row[0] for row in rows if row[5] == name and row[3] == "00"]  # global scope
    print(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(found[0])))
else:
    SIOCGIFADDR = 0x8915
    answer = fcntl.ioctl(socket.socket(), SIOCGIFADDR, struct.pack("256s", name.encode()))
    print(socket.inet_ntoa(answer[20:24]))
PYTHON
}

# The ranks of one machine share its cores, so each has one thread by default. Set it where there are more cores than ranks.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ -n ${INTERFACE:-} ]]; then
    [[ -e /sys/class/net/$INTERFACE ]] || die "INTERFACE=$INTERFACE: this machine has $(ls -m /sys/class/net)"
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi

# nohup ignores SIGHUP for this process and its children, but torchrun would handle it and stop the run.
if [[ $(trap -p HUP) == "trap -- '' "* ]]; then export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGQUIT}; fi

place='^([^]:[]+|\[[0-9a-fA-F:.]+\]):[0-9]+$'
if ((nnodes > 1)) || [[ $elastic == true && -n ${RENDEZVOUS:-} ]]; then
    [[ ${RENDEZVOUS:-} =~ $place ]] ||
        die "RENDEZVOUS=${RENDEZVOUS:-}: $nnodes nodes meet at host:port, or [address]:port for IPv6"
    host=${RENDEZVOUS%:*}
    host=${host#[} host=${host%]}
    # One setting of the run is the timeout everywhere. torchrun needs whole seconds.
    timeout=600
    for argument in "$@"; do
        if [[ $argument =~ ^group\.timeout_s=([0-9]+)(\.[0-9]*)?$ ]]; then timeout=$((BASH_REMATCH[1] + 1)); fi
    done
fi
if [[ $elastic == true ]]; then
    meeting=()
    if [[ -n ${RENDEZVOUS:-} ]]; then
        meeting=(--store="$RENDEZVOUS" --run="${RUN_ID:-consensus}" --wait="$timeout")
        if [[ -z ${SERVE:-} ]] && is_here "$host"; then SERVE=true; fi
        if [[ ${SERVE:-} == true ]]; then meeting+=(--serve); fi
    fi
elif ((nnodes == 1)); then
    # torchrun chooses a free port, so that two runs on one machine stay apart. The ranks meet at the loopback address, since
    # the name of the machine need not resolve.
    meeting=(--standalone --local-addr=127.0.0.1)
else
    conf=join_timeout=$timeout
    # c10d: the node with that address hosts the store; no other service is needed.
    # torch recognizes a name of this machine, but an address only where the name resolves to it.
    if is_own_address "$host"; then conf+=,is_host=true; fi
    meeting=(--nnodes="$nnodes" --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="${RUN_ID:-consensus}" --rdzv-conf="$conf")
    # The address of the interface works where host names do not resolve between nodes.
    if [[ -n ${INTERFACE:-} ]]; then
        if address=$(address_of "$INTERFACE" "$host"); then meeting+=(--local-addr="$address"); fi
    elif is_loopback "$host"; then # all nodes are this machine
        meeting+=(--local-addr="$host")
    fi
fi

command=(
    # torchrun as a module belongs to this interpreter, whatever is on PATH.
    "$python" -m torch.distributed.run
    "${meeting[@]}"
    # Processes, not workers: workers=8 on 4 processes is two workers each.
    --nproc-per-node="$nproc"
    # No --tee and no --local-ranks-filter: only rank 0 writes to the console, except for failures, which must be
    # visible. Rank 0 keeps the terminal, which --tee would take away.
    # No --max-restarts: a supervisor starts the run again with resume=auto. With --max-restarts torchrun restarts
    # all ranks when one dies, and the run continues from its last checkpoint.
    -m "$module" "$@"
)
if [[ $elastic == true ]]; then
    command=("$python" -m consensus.elastic --processes="$nproc" --expected=$((nproc * nnodes)) ${meeting[@]+"${meeting[@]}"} "$@")
fi
line=
for name in OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME; do
    if [[ -n ${!name:-} ]]; then line+="$name=${!name} "; fi
done
printf -v line '%s%s' "$line" "$(printf '%q ' "${command[@]}")"
printf '%s\n' "$line" >&2 # in one write, since several nodes may share a terminal
if [[ $module == consensus.doctor ]] && ((nnodes > 1)); then
    # Network faults would keep torchrun waiting, so they are checked first, without torchrun.
    CONSENSUS_DOCTOR=nodes NNODES=$nnodes RENDEZVOUS=$RENDEZVOUS RUN_ID=${RUN_ID:-consensus} \
        "$python" -m consensus.doctor "$@"
fi
exec "${command[@]}"
