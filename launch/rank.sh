#!/usr/bin/env bash
# One rank of `moe train`, as torchrun.sh and deepspeed.sh have it started. Not to be called by hand.
#
#   rank.sh STATE OUT PYTHON CONFIG [key.path=value ...]
#
# STATE is the launcher's folder, where `moe train` looks for the signal that the launcher has got.
# The rank leaves there its process id, by RANK.HOST, whether it was preempted, and the code of the
# first rank that failed. The output goes to OUT/logs/rank-NNNNN.log; rank 0's is shown as well.
#
# A preempted rank (85) ends with 0 for the launcher above it: torchrun would take 85 for a failure
# and start the ranks again, DeepSpeed's launcher would kill those that are still saving.
set -euo pipefail
state=$1 out=$2 python=$3
shift 3
attempt=${TORCHELASTIC_RESTART_COUNT:-0}
log=$(printf '%s/logs/rank-%05d.log' "$out" "$RANK")
pid=$state/pid-$RANK.$HOSTNAME
: > "$pid"

# shellcheck source=launch/await.sh
. "$(dirname "${BASH_SOURCE[0]}")/await.sh"
trap : TERM INT USR1 # they reach the whole process group: the rank answers them
export MOE_LAUNCHER_STATE=$state
mkdir -p "$out/logs"
printf '== %s rank %s of %s on %s, attempt %s\n' \
    "$(date -u +%FT%TZ)" "$RANK" "$WORLD_SIZE" "$HOSTNAME" "$attempt" >> "$log"
# Before python has answers to signals it is to live on: it looks into STATE once it has begun, and
# then all ranks end together. One that died would have the others wait for it.
train() {
    trap '' TERM USR1 HUP
    exec "$python" -u -m moe.train "$@"
}
if [ "$RANK" = 0 ]; then
    train "$@" > >(trap '' TERM INT USR1 HUP && exec tee -p -a "$log") 2>&1 &
else
    train "$@" >> "$log" 2>&1 &
fi
process=$!
echo "$process" > "$pid"
await "$process"
rm -f "$pid"
case $code in
    0) exit 0 ;;
    85)
        touch "$state/preempted-$attempt"
        exit 0
        ;;
esac
if (set -o noclobber && echo "$code" > "$state/failed-$attempt") 2> /dev/null; then
    echo "error: rank $RANK on $HOSTNAME ended with $code. The end of $log:" >&2
    tail -n 5 "$log" | sed 's/^/  /' >&2
fi
exit "$code"
