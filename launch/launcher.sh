# What torchrun.sh and deepspeed.sh share: checks of the machine, and ranks that are watched over.
# Sourced by them; needs ROOT and EARLY. Sets BIN, PYTHON, RANKS, OUT and STATE.
# shellcheck shell=bash
# shellcheck source=launch/await.sh
. "$ROOT/launch/await.sh"
STATE='' PATIENCE=20 # seconds for ranks to begin once a signal has come
trap '' PIPE         # where the reader of what we print has gone, ranks are still to be told
trap leave EXIT

# leave: on EXIT. A signal before anything was started has disturbed what is begun when we come again
leave() {
    [ ! -d "$STATE" ] || rm -rf "$STATE"
    [ -z "$EARLY" ] || {
        say "SIG$EARLY before any rank was started: nothing is lost"
        exit 85
    }
}

say() { echo "$(basename "$0"): $*" >&2 || true; }

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

check_count() { [[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "--ranks $RANKS is not a number from 1 on."; }

# check_ranks: RANKS of this machine, by default one for each GPU, 1 where there is none
check_ranks() {
    local found
    found=$(gpus)
    [ -n "$RANKS" ] || RANKS=$((found > 0 ? found : 1))
    check_count
    [ "$found" -eq 0 ] || [ "$RANKS" -le "$found" ] || fail \
        "--ranks $RANKS: there are $found GPUs here (nvidia-smi, CUDA_VISIBLE_DEVICES), one a rank."
}

port_taken() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }

check_rendezvous() {
    [[ $RENDEZVOUS =~ ^.+:[0-9]{1,9}$ ]] || fail "--rendezvous $RENDEZVOUS is not HOST:PORT."
    [ "$((10#${RENDEZVOUS##*:}))" -gt 0 ] && [ "$((10#${RENDEZVOUS##*:}))" -lt 65536 ] ||
        fail "--rendezvous $RENDEZVOUS: a port is a number from 1 to 65535."
}

check_port() {
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

# forward SIGNAL: to every rank, once. They look for it themselves, at each step and while they start,
# whichever node they are on; a number of a process would be another's there.
forward() {
    (set -o noclobber && echo "SIG$1" > "$STATE/signal") 2> /dev/null || return 0
    if begun; then
        say "SIG$1, passed on to the ranks, which save and end"
        return 0 # in a trap, a plain one gives the code that the trap came upon
    fi
    say "SIG$1 before any rank has begun: they end as soon as they do"
    ( # the nodes to meet may never come
        exec {ALIVE}>&- > /dev/null 2>&1
        sleep "$PATIENCE"
        [ ! -d "$STATE" ] || begun || kill -s TERM "$agent"
    ) &
}

# begun: whether any rank has
begun() {
    local file
    for file in "$STATE"/pid-*; do
        [ ! -e "$file" ] || return 0
    done
    return 1
}

# interrupt: Ctrl-C is a signal like others; the next one ends the run at once, unsaved
interrupt() {
    [ -e "$STATE/signal" ] || {
        forward INT
        return 0
    }
    INTERRUPTED=1
    local file
    for file in "$STATE"/pid-*."$HOSTNAME"; do # a number counts on its own node
        [ ! -e "$file" ] || kill -s KILL "$(< "$file")" 2> /dev/null || true
    done
    kill -s TERM "$agent" 2> /dev/null || true
}

# watch COMMAND...: run it until it ends, and exit with 85 where the run was preempted, else with
# the code of the first rank that failed
watch() {
    local before code failed agent=''
    INTERRUPTED=''
    before=$(marker)
    trap 'forward TERM' TERM
    trap 'forward USR1' USR1
    trap 'forward HUP' HUP # a terminal or an ssh that is closed
    trap 'interrupt' INT
    [ -z "$EARLY" ] || exit 85
    # in a session of its own, signals to this one's group do not reach it as well. SLURM sends USR1
    # to every process: what has no answer to it is not to die of it, nor a rank before it has one
    (trap '' USR1 HUP && exec setsid "$@" {ALIVE}>&-) &
    agent=$!
    await "$agent"
    trap '' TERM USR1 HUP INT # SLURM ends the other nodes where one has another code than 0
    [ -z "$INTERRUPTED" ] || exit 130
    failed=$(find "$STATE" -name 'failed-*' | sort -V | tail -n 1)
    if preempted "$before" || { [ "$code" -ne 0 ] && [ -e "$STATE/signal" ] && [ -z "$failed" ]; }; then
        say "preempted; the run goes on where it was when it is started again"
        exit 85
    fi
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
    # while we live it is open for writing, by nobody else: ranks end, saved, where it is not
    if mkfifo "$STATE/alive" 2> /dev/null; then
        exec {ALIVE}<> "$STATE/alive"
    else
        exec {ALIVE}< /dev/null # a file system without them: ranks outlive a killed launcher
    fi
}
