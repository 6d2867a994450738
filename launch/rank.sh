#!/usr/bin/env bash
# One rank of `moe train`, as torchrun.sh and deepspeed.sh have it started. Not to be called by hand.
#
#   rank.sh STATE OUT PYTHON CONFIG [key.path=value ...]
#
# STATE is the launcher's folder: the rank leaves its process id there for signals, whether it was
# preempted, and the code of the first rank that failed. The output goes to OUT/logs/rank-NNNNN.log; rank 0's is shown as well.
#
# A preempted rank (85) ends with 0 for the launcher above it: torchrun would take 85 for a failure
# and start the ranks again, DeepSpeed's launcher would kill those that are still saving.
set -euo pipefail
state=$1 out=$2 python=$3
shift 3
attempt=${TORCHELASTIC_RESTART_COUNT:-0}
log=$(printf '%s/logs/rank-%05d.log' "$out" "$RANK")
[ ! -e "$state/signal" ] || exit 143 # a run that is to end is not started again

# shellcheck source=launch/await.sh
. "$(dirname "${BASH_SOURCE[0]}")/await.sh"
trap : TERM INT USR1 # they reach the whole process group: the rank answers them
mkdir -p "$out/logs"
printf '== %s rank %s of %s on %s, attempt %s\n' \
    "$(date -u +%FT%TZ)" "$RANK" "$WORLD_SIZE" "$HOSTNAME" "$attempt" >> "$log"
if [ "$RANK" = 0 ]; then
    "$python" -u -m moe.train "$@" > >(trap '' TERM INT USR1 && exec tee -a "$log") 2>&1 &
else
    "$python" -u -m moe.train "$@" >> "$log" 2>&1 &
fi
process=$!
echo "$process" > "$state/pid-$RANK"
await "$process"
rm -f "$state/pid-$RANK"
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
