#!/usr/bin/env bash
# usage: launch/multinode.sh HOST[,HOST ...] [OVERRIDE ...]
#
# A run on plain hosts, without a scheduler: starts launch/node.sh on each host over ssh (keys, no passwords), in this folder,
# which must have the same path on all hosts. The rendezvous is on the first host. Ctrl+C or SIGTERM stops all hosts with a
# checkpoint. When one host fails, the others are stopped. The exit code is that of the first failure.
#
#   NPROC=4 INTERFACE=eth0 launch/multinode.sh node1,node2 resume=auto output.run_dir=runs/mine potential=tan
#
# A HOST is what ssh takes: a name, an address, user@host, or an alias of its configuration (which needs ADDRESS).
#
#   ADDRESS   address of the first host, as the others reach it; default: its name as given here, without user@
#   PORT      port of the rendezvous; default: 29400
#   REMOTE    program that runs a command on a host, as `REMOTE HOST COMMAND`; default: ssh, with BatchMode and a timeout
#   NPROC, INTERFACE, OMP_NUM_THREADS, CONSENSUS_VENV, MODULE    as for launch/node.sh, on every host
#
# ELASTIC=true: an elastic run (docs/elastic.md). A host that fails is named, and the others go on; only the first one, which keeps
# the store, is needed. The exit code is 0 if the run is complete.
set -euo pipefail

if [[ ${1:-} == '' || $1 == -* || $1 == *=* ]]; then
    printf 'usage: launch/multinode.sh HOST[,HOST ...] [OVERRIDE ...]\n' >&2
    exit 2
fi
IFS=, read -r -a hosts <<<"$1"
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck disable=SC2206 # REMOTE is several words
remote=(${REMOTE:-ssh -o BatchMode=yes -o ConnectTimeout=10})

elastic=
if [[ ${ELASTIC:-} == true && ${MODULE:-consensus.train} == consensus.train ]]; then elastic=yes; fi
# A connection to a host that is cut off would never end.
if [[ -n $elastic && -z ${REMOTE:-} ]]; then remote+=(-o ServerAliveInterval=10 -o ServerAliveCountMax=3); fi

address=${ADDRESS:-${hosts[0]##*@}}
if [[ $address == *:* && $address != \[* ]]; then address="[$address]"; fi # IPv6
variables=("NNODES=${#hosts[@]}" "RENDEZVOUS=$address:${PORT:-29400}" "RUN_ID=multinode-$(date +%s)-$$")
for name in NPROC INTERFACE OMP_NUM_THREADS CONSENSUS_VENV MODULE ELASTIC; do
    if [[ -n ${!name:-} ]]; then variables+=("$name=${!name}"); fi
done

# A remote command gets no signal from here. It watches its standard input, which stays open while this script runs. When it
# closes, the process group of launch/node.sh gets a SIGTERM. After 30 s the remaining processes are killed, such as a torchrun
# that waits for a lost host. In an elastic run SIGTERM would let a host leave; SIGUSR1 stops the whole run.
signal=TERM
if [[ -n $elastic ]]; then signal=USR1; fi
node=$(printf ' %q' env "${variables[@]}" "$root/launch/node.sh" "$@")
printf -v folder_here %q "$PWD"
script="cd $folder_here || exit 2
exec 3<&0
setsid$node </dev/null 3<&- & node=\$!
{ read -r -u 3; kill -$signal -- -\$node; sleep 30; kill -KILL -- -\$node; } >/dev/null 2>&1 & watch=\$!
wait \$node; code=\$?
kill \$watch 2>/dev/null
exit \$code"
command="exec bash -c '${script//\'/\'\\\'\'}'" # every remote shell can parse that

folder=$(mktemp -d)
pids=()
cleanup() {
    exec 9>&- # closes the input of the remote commands: SIGTERM to their nodes
    for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$folder"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mkfifo "$folder/open"
exec 9<>"$folder/open" # a pipe without data, closed at the end
for host in "${hosts[@]}"; do
    printf '%s:%s\n' "$host" "$node" >&2
    "${remote[@]}" "$host" "$command" <"$folder/open" 9>&- &
    pids+=($!)
done
# Not `wait -n`, which misses processes that ended before it is called.
first='' complete='' until=''
while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
        if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
        code=0
        wait "${pids[i]}" || code=$?
        unset "pids[i]"
        if ((code)) && [[ -z $elastic ]]; then exit "$code"; fi
        if ((code)); then
            printf 'launch/multinode.sh: %s: exit code %s\n' "${hosts[i]}" "$code" >&2
        else
            complete=yes
        fi
        first=${first:-$code}
    done
    # The other hosts of a complete run end with it, unless they are cut off.
    if [[ -n $elastic && -n $complete ]]; then
        until=${until:-$((SECONDS + 30))}
        if ((SECONDS >= until)); then break; fi
    fi
    sleep 0.2
done
if [[ -n $elastic && -z $complete ]]; then exit "$first"; fi
