#!/usr/bin/env bash
# Trains with torchrun: one node here, or this node's part of many.
#
#   launch/torchrun.sh [options] CONFIG [key.path=value ...]
#
#   --ranks N              ranks on this node; default: its GPUs, 1 without any
#   --nodes N | MIN:MAX    nodes of the run, started each by this script (1)
#   --rendezvous HOST:PORT where they meet, on one of them; needed for more than one node
#   --id NAME              of the run, the same on every node (moe)
#   --max-restarts N       start all ranks again up to N times when one has died (0)
#   --dry-run              print what would be run, and run nothing
#   --help
#
# SIGTERM, SIGUSR1, SIGHUP and Ctrl-C are passed on to the ranks once: they save and end, as they do
# where this script is killed. A second Ctrl-C ends all at once, unsaved. Exit codes: 85 where the run
# was preempted (start it again), 130 after a second Ctrl-C, else that of the first rank that failed.
# OUT/logs has a file for every rank. BIN=DIR names the folder of the python to use.
#
# Read by the libraries: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network interface where
# the wrong one is taken, NCCL_IB_HCA the InfiniBand adapters, NCCL_DEBUG=INFO shows what was found.
set -euo pipefail
EARLY='' # the signal that has come before there is anything to pass it on to
trap 'EARLY=TERM' TERM
trap 'EARLY=USR1' USR1
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/launcher.sh
. "$ROOT/launch/launcher.sh"
RANKS='' NODES=1 RENDEZVOUS='' ID=moe MAX_RESTARTS=0 DRY_RUN=''

while [ $# -gt 0 ]; do
    case $1 in
        --ranks | --nodes | --rendezvous | --id | --max-restarts)
            [ $# -ge 2 ] || fail "$1 needs a value."
            name=$(tr '[:lower:]-' '[:upper:]_' <<< "${1#--}")
            declare "$name=$2"
            shift 2
            ;;
        --dry-run)
            DRY_RUN=1
            shift
            ;;
        -h | --help) usage 0 ;;
        -*) fail "$1 is not an option. See --help." ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || fail "CONFIG is missing. See --help."
[[ $NODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "--nodes $NODES is neither N nor MIN:MAX."
[ "${NODES%:*}" -le "${NODES#*:}" ] || fail "--nodes $NODES: MIN is larger than MAX."
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "--max-restarts $MAX_RESTARTS is not a number."
find_python
read_config "$@"
check_ranks

if [ -z "$RENDEZVOUS" ]; then
    [ "$NODES" = 1 ] || fail "--nodes $NODES needs --rendezvous HOST:PORT, HOST being one of them."
    RENDEZVOUS=localhost:0 # any free port
else
    check_rendezvous
fi
meeting=(--rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$ID")
if [ -n "${SLURM_NODEID:-}" ] && [ "$NODES" != 1 ]; then
    # by itself torchrun finds out who hosts the meeting from names, which not every cluster resolves
    first=$([ "$SLURM_NODEID" = 0 ] && echo true || echo false)
    [ "$first" = false ] || [ -n "$DRY_RUN" ] || check_port "${RENDEZVOUS##*:}"
    meeting+=(--rdzv-conf "is_host=$first")
fi
own_store=()
if [ "$MAX_RESTARTS" != 0 ]; then
    # ranks that start again find their dead peers' addresses in the agent's store, and may wait for
    # these until parallel.timeout: each attempt needs a store of its own
    own_store=(env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
fi
prepare
launch ${own_store[@]+"${own_store[@]}"} "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$RANKS" \
    "${meeting[@]}" --max-restarts "$MAX_RESTARTS" \
    --no-python "$ROOT/launch/rank.sh" "$STATE" "$OUT" "$PYTHON" "$@"
