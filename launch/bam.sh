#!/usr/bin/env bash
# Branch, attend, mix: from one dense seed to a mixture of branches, and what it is worth.
#
#   launch/bam.sh --seed DIR --text DIR --out DIR [--general NAME] [--ranks N] [key.path=value ...]
#
# DIR of --text has a folder per domain, each with train/ (.py, .rst, .txt or .md files) and held-out/
# (.txt or .py files). The domain that --general names (general) is the seed's own kind of text: a
# tenth of every branch's tokens, and no branch of its own. Overrides go to every training, of
# branches and mixtures: train.steps=200 optimizer.lr=5e-5
#
# Makes OUT/branch-DOMAIN, OUT/btx, OUT/bam and OUT/bam-shared, all mixtures trained on the same
# tokens, the last two with btx's compute too (OUT/bam-same-compute, OUT/bam-shared-same-compute), and
# OUT/evaluation: perplexity per domain for all of them. What is there already is not done again.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
BIN=${BIN:-$ROOT/.venv/bin}
SEED='' TEXT='' OUT='' GENERAL=general RANKS=1 OVERRIDES=()

usage() {
    sed -n 's/^# \{0,1\}//p' "$0" | sed -n 2,13p
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --seed | --text | --out | --general | --ranks)
            [ $# -ge 2 ] || usage
            declare "$(tr '[:lower:]' '[:upper:]' <<< "${1#--}")=$2"
            shift 2
            ;;
        *=*)
            OVERRIDES+=("$1")
            shift
            ;;
        *) usage ;;
    esac
done
[ -n "$SEED" ] && [ -n "$TEXT" ] && [ -n "$OUT" ] || usage
[ -d "$TEXT/$GENERAL/train" ] || {
    echo "error: $TEXT/$GENERAL/train is not a folder: name the seed's domain with --general." >&2
    exit 2
}
DOMAINS=()
for folder in "$TEXT"/*/; do
    name=$(basename "$folder")
    [ "$name" = "$GENERAL" ] || DOMAINS+=("$name")
done
[ ${#DOMAINS[@]} -gt 0 ] || {
    echo "error: $TEXT has no domain beside $GENERAL: there is nothing to branch into." >&2
    exit 2
}

say() { printf '\n== %s\n' "$*"; }

# step RESULT COMMAND...: show and run the command, unless its result is there already
step() {
    local result=$1
    shift
    if [ -e "$result" ]; then
        echo "$result is there already"
        return
    fi
    echo "\$ ${*//$BIN\//}"
    "$@"
}

# tune NAME CONFIG MODEL DATA [OVERRIDE]: train MODEL, and its last checkpoint becomes OUT/NAME
tune() {
    local name=$1 config=$2 model=$3 data=$4 last
    if [ -e "$OUT/$name" ]; then
        echo "$OUT/$name is there already"
        return
    fi
    local arguments=("$ROOT/configs/bam/$config.yaml" "model=$model" "out=$OUT/runs/$name"
        "data.train=$data" ${OVERRIDES[@]+"${OVERRIDES[@]}"} "${@:5}")
    if [ "$RANKS" -gt 1 ]; then
        step "$OUT/$name" "$BIN/torchrun" --standalone --nproc-per-node "$RANKS" \
            -m moe.train "${arguments[@]}"
    else
        step "$OUT/$name" "$BIN/moe" train "${arguments[@]}"
    fi
    last=$(find "$OUT/runs/$name/checkpoints" -name 'step-*' ! -name '*.partial' | sort -V | tail -n 1)
    step "$OUT/$name" "$BIN/moe" export "$last" --to hf --out "$OUT/$name"
}

# flops MODEL: floating-point operations of training it on one token
flops() {
    "$BIN/moe" inspect "$1" --json | grep -o '"flops_per_token": [0-9]*' | grep -o '[0-9]*$'
}

mkdir -p "$OUT/data" "$OUT/held-out/text"
say "data"
for domain in "$GENERAL" "${DOMAINS[@]}"; do
    step "$OUT/data/$domain.json" "$BIN/moe" data prepare "$TEXT/$domain/train" \
        --tokenizer "$SEED" --out "$OUT/data/$domain"
    [ -e "$OUT/held-out/text/$domain" ] ||
        ln -s "$(realpath "$TEXT/$domain/held-out")" "$OUT/held-out/text/$domain"
done

all="{path: $OUT/data/$GENERAL, weight: 1}"
sources=()
for domain in "${DOMAINS[@]}"; do
    say "branch: $domain"
    tune "branch-$domain" branch "$SEED" \
        "[{path: $OUT/data/$domain, weight: 0.9}, {path: $OUT/data/$GENERAL, weight: 0.1}]"
    sources+=(--source "$OUT/branch-$domain")
    all="$all, {path: $OUT/data/$domain, weight: 1}"
done
sources+=(--source "$SEED")

for mixture in btx bam bam-shared; do
    say "attend and mix: $mixture"
    case $mixture in
        bam-shared) recipe=(bam --kv shared) ;;
        *) recipe=("$mixture") ;;
    esac
    step "$OUT/$mixture-0" "$BIN/moe" upcycle "${recipe[@]}" "${sources[@]}" --out "$OUT/$mixture-0"
    tune "$mixture" mix "$OUT/$mixture-0" "[$all]"
done

say "the same compute as btx, fewer tokens"
steps=$(grep -o '^  steps: [0-9]*' "$OUT/runs/btx/config.yaml" | grep -o '[0-9]*$')
for mixture in bam bam-shared; do
    fewer=$((steps * $(flops "$OUT/btx-0") / $(flops "$OUT/$mixture-0")))
    tune "$mixture-same-compute" mix "$OUT/$mixture-0" "[$all]" "train.steps=$fewer" \
        "checkpoint.every=$fewer"
done

say "perplexity of each domain"
baselines=()
for name in bam-shared bam-same-compute bam-shared-same-compute btx "${DOMAINS[@]/#/branch-}"; do
    baselines+=(--baseline "$OUT/$name")
done
[ ! -e "$OUT/evaluation" ] || cat "$OUT/evaluation/results.md"
step "$OUT/evaluation" "$BIN/moe" eval "$OUT/bam" "${baselines[@]}" --baseline "$SEED" \
    --tasks local_perplexity --data "$OUT/held-out" --out "$OUT/evaluation"
for name in "$SEED" "${DOMAINS[@]/#/$OUT/branch-}" "$OUT/btx" "$OUT/bam" "$OUT/bam-shared"; do
    "$BIN/moe" inspect "$name" | sed -n 1,2p
done
