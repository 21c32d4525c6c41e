#!/usr/bin/env bash
# From a fresh machine to a trained adapter: makes .venv, installs the pinned packages, trains the shipped demo.
#   ./launch/quickstart.sh [trainer options]      needs Python 3.10+ and nothing else; a CPU is enough
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

ensure_venv ""

# Everything the demo needs is in the package: ask no hub.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"
export HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}" HF_HUB_DISABLE_TELEMETRY=1
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# The demo's matrices are too small for more threads: on a busy machine two were 6 to 30 times slower than one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Each run has a folder of its own; an earlier one is never touched.
output_dir=$root/runs/demo
number=2
while [ -e "$output_dir" ]; do
    output_dir=$root/runs/demo-$number
    number=$((number + 1))
done

# Options of the caller come last, so they win.
exec "$python" -m accelerate.commands.launch --config_file "$root/launch/single_gpu.yaml" \
    "$root/scale_sft/train.py" --config "$root/scale_sft/recipes/demo.yaml" --output_dir "$output_dir" "$@"
