# Waiting for a child while signals come. Sourced by the launchers and by every rank's script.
# shellcheck shell=bash disable=SC2034 # `code` is used where it is sourced

# await PID: until that child has ended; its exit code is in `code`. A trapped signal ends `wait` with
# the signal's number, at times before its trap has run: only the process itself says that it is over.
await() {
    while kill -0 "$1" 2> /dev/null; do
        wait "$1" || true
    done
    code=0
    wait "$1" || code=$?
}
