#!/usr/bin/env bash
# Everything that is measured on one GPU, in pieces of under nine minutes each.
#
#     benchmarks/gpu.sh --list
#     benchmarks/gpu.sh --data FOLDER --models FOLDER [--out FOLDER] PIECE ...
#     benchmarks/gpu.sh --dry-run [PIECE ...]          each piece on a CPU, on random images, with tiny sizes
#
# FOLDER of --data holds cifar10/ and mnist/ as tensors (benchmarks/tensors.py makes them beforehand), that of --models
# trained weights; run folders go to --out. It takes neither a network nor wandb nor datasets. Results are
# benchmarks/results/*.json. An accuracy piece that is not done in time exits with 75; the same command goes on.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")

BENCHMARKS=(update step topologies two-four)
jobs=$(python "$root/benchmarks/accuracy.py" --list)
mapfile -t JOBS <<< "$jobs"
data=data models=weights out=runs/gpu dry="" pieces=()
while (($#)); do
    case $1 in
        --list) printf '%s\n' "${BENCHMARKS[@]}" "${JOBS[@]}"; exit ;;
        --data) data=$(realpath "$2"); shift 2 ;;
        --models) models=$(realpath "$2"); shift 2 ;;
        --out) out=$(realpath -m "$2"); shift 2 ;;
        --dry-run) dry=1; shift ;;
        -*) echo "gpu.sh: no option $1; see the head of this file" >&2; exit 2 ;;
        *) pieces+=("$1"); shift ;;
    esac
done
cd "$root"
if [[ $dry ]]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
    data=$out/data models=$out/data/weights
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
    python benchmarks/tensors.py --random --out "$data"
    ((${#pieces[@]})) || pieces=("${BENCHMARKS[@]}" "${JOBS[@]}")
fi
if ! ((${#pieces[@]})); then
    echo "gpu.sh: name a piece, or --list" >&2
    exit 2
fi

for piece in "${pieces[@]}"; do
    echo "== $piece"
    case $piece in
        update) if [[ $dry ]]; then python benchmarks/update.py --weights tiny --rounds 2 --no-write
                else python benchmarks/update.py --device cuda --rounds 15; fi ;;
        step) if [[ $dry ]]; then python benchmarks/step.py --rounds 2 --steps 2 --no-write
              else python benchmarks/step.py --rounds 9; fi ;;
        topologies) python benchmarks/topologies.py --data "$data" --models "$models" --out "$out/topologies" ${dry:+--tiny} ;;
        two-four) python benchmarks/two_four.py ;;
        *) python benchmarks/accuracy.py "$piece" --data "$data" --models "$models" --out "$out/accuracy" \
               --minutes 8 ${dry:+--tiny --seeds 1} ;;
    esac
done
