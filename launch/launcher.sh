# What torchrun.sh and deepspeed.sh share: checks of the machine, and ranks that are watched over.
# Sourced by them; needs ROOT. Sets BIN, PYTHON, RANKS, OUT and STATE.
# shellcheck shell=bash
# shellcheck source=launch/await.sh
. "$ROOT/launch/await.sh"

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit "$1"
}

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

# find_python: BIN is a folder that has this package; by default the repository's own, else PATH's
find_python() {
    if [ -z "${BIN:-}" ]; then
        BIN=$ROOT/.venv/bin
        [ -x "$BIN/python" ] || BIN=$(dirname "$(command -v python3 || echo /nowhere/python3)")
    fi
    PYTHON=$BIN/python
    [ -x "$PYTHON" ] || PYTHON=$BIN/python3
    [ -x "$PYTHON" ] || fail "$BIN has no python. Run \`make setup\`, or set BIN=DIR to the one with moe."
    "$PYTHON" -c 'import moe' 2> /dev/null ||
        fail "$PYTHON cannot import moe. Run \`make setup\`, or set BIN=DIR to the one with moe."
}

# read_config CONFIG [key.path=value ...]: check all of it, and set OUT from it
read_config() {
    local out
    [ -f "$1" ] || fail "CONFIG=$1 is not a file. Give a YAML file; see configs/train/."
    out=$("$PYTHON" - "$@" <<'END'
import sys
from pathlib import Path

from moe.config import load
from moe.errors import MoeError

try:
    print(load(Path(sys.argv[1]), sys.argv[2:]).out)
except MoeError as error:
    sys.exit(f"error: {error}")
END
    ) || exit 2
    OUT=$out
}

# gpus: how many this machine shows; 0 without a driver
gpus() {
    if ! command -v nvidia-smi > /dev/null || ! nvidia-smi -L > /dev/null 2>&1; then
        echo 0
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true
    else
        nvidia-smi -L | wc -l
    fi
}

# check_ranks: RANKS of this machine, by default one for each GPU, 1 where there is none
check_ranks() {
    local found
    found=$(gpus)
    [ -n "$RANKS" ] || RANKS=$((found > 0 ? found : 1))
    [[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "--ranks $RANKS is not a number from 1 on."
    [ "$found" -eq 0 ] || [ "$RANKS" -le "$found" ] || fail \
        "--ranks $RANKS: there are $found GPUs here (nvidia-smi, CUDA_VISIBLE_DEVICES), one a rank."
}

port_taken() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }

check_port() {
    [[ $1 =~ ^[0-9]+$ ]] && [ "$1" -lt 65536 ] || fail "port $1 is not a number below 65536."
    ! port_taken "$1" || fail "port $1 is taken on $HOSTNAME. Choose another one."
}

free_port() {
    local port
    for _ in {1..50}; do
        port=$((20000 + RANDOM % 12000))
        port_taken "$port" || break
    done
    echo "$port"
}

check_out() {
    mkdir -p "$OUT" 2> /dev/null && [ -w "$OUT" ] ||
        fail "out=$OUT cannot be written to. Choose another out, or mend its permissions."
}

# marker: what tells one preemption's marker from another's; empty where there is none
marker() { stat -c '%i %y' "$OUT/preempted" 2> /dev/null || true; }

# forward SIGNAL: to every rank here, once; before there are any, to the launcher itself
forward() {
    [ ! -e "$STATE/signal" ] || return 0
    echo "$1" > "$STATE/signal"
    echo "$(basename "$0"): SIG$1, passed on to the ranks, which save and end" >&2
    local file sent=''
    for file in "$STATE"/pid-*; do
        if [ -e "$file" ] && kill -s "$1" "$(< "$file")" 2> /dev/null; then sent=1; fi
    done
    [ -n "$sent" ] || kill -s TERM "$agent" 2> /dev/null || true
}

# watch COMMAND...: run it until it ends, and exit with 85 where the run was preempted, else with
# the code of the first rank that failed
watch() {
    local before code failed
    before=$(marker)
    agent=''
    trap 'rm -rf "$STATE"' EXIT
    trap 'forward TERM' TERM
    trap 'forward USR1' USR1
    trap 'kill -s INT "$agent"' INT
    setsid "$@" & # in a session of its own, signals to this one's group do not reach it as well
    agent=$!
    await "$agent"
    trap '' TERM USR1 INT # SLURM ends the other nodes where one has another code than 0
    if preempted "$before"; then
        echo "$(basename "$0"): preempted; the run goes on where it was when it is started again" >&2
        exit 85
    fi
    failed=$(find "$STATE" -name 'failed-*' | sort -V | tail -n 1)
    if [ "$code" -ne 0 ] && [ -n "$failed" ]; then code=$(< "$failed"); fi
    exit "$code"
}

# preempted MARKER: whether the run was since then. The marker is rank 0's, of whichever node; a rank
# of this one says the same by itself. Where a rank has failed, launchers end the others by SIGTERM,
# which these take for a preemption: what comes after a failure, and no signal to us, is none.
preempted() {
    local last failed
    last=$(find "$STATE" -name '*-*' -printf '%f\n' | sed -n 's/^\(failed\|preempted\)-//p' | sort -n | tail -n 1)
    failed=$STATE/failed-$last
    [ -e "$STATE/preempted-$last" ] || { [ -n "$(marker)" ] && [ "$(marker)" != "$1" ]; } || return 1
    [ ! -e "$failed" ] || [ -e "$STATE/signal" ] ||
        { [ -e "$OUT/preempted" ] && [ "$OUT/preempted" -ot "$failed" ]; }
}

# launch COMMAND...: what it will run, and unless DRY_RUN is set, run it
launch() {
    printf '+'
    printf ' %q' "$@"
    echo
    [ -z "$DRY_RUN" ] || exit 0
    watch "$@"
}

# prepare: STATE, where ranks leave what their launcher has to know
prepare() {
    if [ -n "$DRY_RUN" ]; then
        STATE=$OUT/launch.XXXXXX
        return
    fi
    check_out
    STATE=$(mktemp -d "$OUT/launch.XXXXXX")
}
