# What the batch scripts share: the container, a step that is watched over.
# Sourced by them. Needs ROOT, DRY_RUN and EARLY; sets NODES, SRUN, CONTAINER, MOE, signalled and code.
# shellcheck shell=bash disable=SC2034 # what it sets is used where it is sourced
# shellcheck source=launch/await.sh
. "$ROOT/launch/await.sh"

NODES=${SLURM_NNODES:-1}
CONTAINER=()

usage() {
    sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$0"
    exit "$1"
}

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

# head_node: the first of the job's nodes
head_node() {
    local nodes=$HOSTNAME
    if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    fi
    echo "${nodes%%$'\n'*}"
}

# find_container: the prefix of a step's command, and srun's options, that run it in MOE_CONTAINER
find_container() {
    SRUN=(srun --nodes "$NODES" --ntasks "$NODES" --ntasks-per-node 1 --kill-on-bad-exit=1)
    local mounts="$ROOT:$ROOT${MOE_MOUNTS:+,$MOE_MOUNTS}"
    case ${MOE_CONTAINER:-} in
        '') ;;
        *.sif | docker://* | oras://*)
            CONTAINER=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$MOE_CONTAINER")
            ;;
        *) SRUN+=("--container-image=$MOE_CONTAINER" "--container-mounts=$mounts"
            "--container-workdir=$PWD") ;;
    esac
}

# forward: tell the step, once, whatever signal came: srun hands USR1 to every task
forward() {
    [ -z "$signalled" ] || return 0
    signalled=$1
    [ -n "$step" ] || return 0
    echo "SIG$1 after $SECONDS s: passed on to the step as SIG$2" >&2
    kill -s "$2" "$step" 2> /dev/null || true
}

# run_step SIGNAL COMMAND...: run it, SIGTERM and SIGUSR1 passed on as SIGNAL; sets `code`, and
# `signalled` where one came. After an EARLY one there is no step: `code` is that of one that died of it
run_step() {
    local passed=$1
    shift
    printf '+'
    printf ' %q' "$@"
    echo
    code=0 signalled='' step=''
    [ -z "$DRY_RUN" ] || return 0
    # shellcheck disable=SC2064 # the signal is known now
    trap "forward TERM $passed" TERM
    # shellcheck disable=SC2064
    trap "forward USR1 $passed" USR1
    signalled=${signalled:-$EARLY}
    if [ -n "$signalled" ]; then
        echo "SIG$signalled before the step was started" >&2
        code=143
        return
    fi
    # bash runs no trap while it waits for a command in the foreground
    "$@" &
    step=$!
    [ -z "$signalled" ] || kill -s "$passed" "$step" 2> /dev/null || true # it came just now
    await "$step"
}

# stopped: whether the step has ended of a signal that came to this job. It may before it answers any:
# while srun, a container or a shell is still starting
stopped() { [ -n "$signalled" ] && [[ $code =~ ^(138|143)$ ]]; }

# requeue: put this job into the queue again and end with 85
requeue() {
    trap '' TERM USR1 # SLURM ends what is requeued
    echo "preempted: scontrol requeue $SLURM_JOB_ID" >&2
    scontrol requeue "$SLURM_JOB_ID" ||
        echo "error: job $SLURM_JOB_ID was not requeued: submit it again, and it goes on." >&2
    exit 85
}

# find_moe: the command `moe`, of BIN, else of the repository's environment, else the container's or
# PATH's
find_moe() {
    local bin=${BIN:-$ROOT/.venv/bin}
    MOE=("$bin/moe")
    if [ -n "${MOE_CONTAINER:-}" ] && [ -z "${BIN:-}" ]; then
        MOE=(moe)
    elif [ ! -x "$bin/moe" ]; then
        [ -z "${BIN:-}" ] || fail "BIN=$BIN has no moe."
        command -v moe > /dev/null || fail "no moe in $bin or PATH. Run \`make setup\`, or set BIN=DIR."
        MOE=(moe)
    fi
}
