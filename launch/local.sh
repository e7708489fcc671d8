#!/usr/bin/env bash
# usage: launch/local.sh [NPROC] [OVERRIDE ...]
#
# One node: launch/node.sh with NPROC processes (default: $NPROC, else 4). The arguments after NPROC are Hydra overrides.
set -euo pipefail

NPROC=${NPROC:-4}
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    NPROC=$1
    shift
fi
NPROC=$NPROC NNODES=1 exec "$(dirname "${BASH_SOURCE[0]}")/node.sh" "$@"
