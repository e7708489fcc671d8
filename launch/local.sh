#!/usr/bin/env bash
# usage: launch/local.sh [NPROC] [OVERRIDE ...]
#
# One node: launch/node.sh with NPROC processes (default: $NPROC, else 4). The arguments after NPROC are Hydra overrides. Without
# any argument it prints this text and exits with 2.
set -euo pipefail

if (($# == 0)); then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
NPROC=${NPROC:-4}
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    NPROC=$1
    shift
fi
NPROC=$NPROC NNODES=1 exec "$(dirname "${BASH_SOURCE[0]}")/node.sh" "$@"
