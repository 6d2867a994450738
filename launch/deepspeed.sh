#!/usr/bin/env bash
# Trains with DeepSpeed's launcher: one node here, the nodes of a hostfile over ssh, or under SLURM
# this node's part of many. torchrun.sh runs engine=deepspeed just as well, and restarts ranks.
#
#   launch/deepspeed.sh [options] CONFIG [key.path=value ...]
#
#   --ranks N              ranks on each node; default: this one's GPUs, 1 without any; a hostfile's slots
#   --hostfile FILE        nodes to start over ssh, as lines "HOST slots=GPUS"; OUT must be shared
#   --nodes N              nodes of the run, started each by this script (1)
#   --node-rank N          which of them this is; default SLURM_NODEID
#   --rendezvous HOST:PORT where they meet, on node 0; needed for more than one node. With a hostfile
#                          the default is its first host, and a free port of this machine
#   --dry-run              print what would be run, and run nothing
#   --help
#
# SIGTERM, SIGUSR1, SIGHUP and Ctrl-C are passed on to the ranks once, on all nodes: they find it in
# OUT, save and end. So they do where this script is killed, if one of them is on its node. A second
# Ctrl-C ends all at once, unsaved. Exit codes: 85 where the run was preempted (start it again), 130
# after a second Ctrl-C, else that of the first rank that failed. OUT/logs has a file for every rank.
# BIN=DIR names the folder of the python to use. For NCCL_… see torchrun.sh --help.
set -euo pipefail
EARLY='' # the signal that has come before there is anything to pass it on to
trap 'EARLY=TERM' TERM
trap 'EARLY=USR1' USR1
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/launcher.sh
. "$ROOT/launch/launcher.sh"
RANKS='' NODES=1 NODE_RANK=${SLURM_NODEID:-0} RENDEZVOUS='' HOSTFILE='' DRY_RUN=''

while [ $# -gt 0 ]; do
    case $1 in
        --ranks | --hostfile | --nodes | --node-rank | --rendezvous)
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
[[ $NODES =~ ^[1-9][0-9]*$ ]] || fail "--nodes $NODES is not a number from 1 on."
[[ $NODE_RANK =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$NODES" ] ||
    fail "--node-rank $NODE_RANK: the $NODES nodes are 0 to $((NODES - 1))."
[ -z "$HOSTFILE" ] || [ "$NODES" = 1 ] || fail "--hostfile names the nodes: leave out --nodes."
[ -z "$HOSTFILE" ] || [ -f "$HOSTFILE" ] || fail "--hostfile $HOSTFILE is not a file."
find_python
read_config "$@"
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("deepspeed"))' ||
    fail "$PYTHON has no deepspeed. pip install 'moe-stack[deepspeed]', or use launch/torchrun.sh."
places=()
if [ -n "$HOSTFILE" ]; then # what is not given, DeepSpeed finds there
    [ -z "$RANKS" ] || { check_count && places+=(--num_gpus "$RANKS"); }
    [ -z "$RENDEZVOUS" ] || { check_rendezvous && places+=(--master_addr "${RENDEZVOUS%:*}"); }
    RENDEZVOUS=${RENDEZVOUS:-:$(free_port)}
else
    check_ranks
    [ -n "$RENDEZVOUS" ] || [ "$NODES" = 1 ] ||
        fail "--nodes $NODES needs --rendezvous HOST:PORT, HOST being node 0."
    RENDEZVOUS=${RENDEZVOUS:-127.0.0.1:$(free_port)}
    check_rendezvous
    [ "$NODE_RANK" != 0 ] || [ -n "$DRY_RUN" ] || check_port "${RENDEZVOUS##*:}"
fi

# DeepSpeed wants {"node": [0, 1, ...], ...} in base64
world() {
    local node slots
    slots=$(seq -s , 0 $((RANKS - 1)))
    for node in $(seq 0 $((NODES - 1))); do
        printf '%s"node-%s": [%s]' "$([ "$node" = 0 ] || echo ', ')" "$node" "$slots"
    done | sed 's/.*/{&}/' | base64 -w 0
}
prepare
rank=(--no_python --no_local_rank "$ROOT/launch/rank.sh" "$STATE" "$OUT" "$PYTHON" "$@")
if [ -n "$HOSTFILE" ]; then
    launch "$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" \
        ${places[@]+"${places[@]}"} --master_port "${RENDEZVOUS##*:}" "${rank[@]}"
fi
launch "$PYTHON" -m deepspeed.launcher.launch "--world_info=$(world)" "--node_rank=$NODE_RANK" \
    "--master_addr=${RENDEZVOUS%:*}" "--master_port=${RENDEZVOUS##*:}" "${rank[@]}"
