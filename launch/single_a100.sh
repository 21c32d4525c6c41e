#!/usr/bin/env bash
# One 80 GB GPU, no DeepSpeed: makes .venv where it is missing, then trains.
#   ./launch/single_a100.sh [RECIPE] [--option value ...]     RECIPE: a shipped name or a file; default: llama2_7b_ag
#   ./launch/single_a100.sh --train_data my_data.jsonl --output_dir runs/mine
# SCALE_SFT_VENV: a virtual environment to use as it is. SCALE_SFT_ALLOW_CPU=1: run without a GPU.
# Paths are relative to the current folder.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

recipe=$root/scale_sft/recipes/llama2_7b_ag.yaml
case "${1:--}" in
    -*) ;;
    *) recipe=$1; shift ;;
esac
[ -f "$recipe" ] || [ -f "$root/scale_sft/recipes/$recipe.yaml" ] ||
    die "recipe $recipe: no such file (shipped ones: $root/scale_sft/recipes/)"

if [ -z "${SCALE_SFT_ALLOW_CPU:-}" ] && ! has_gpu; then
    die "no GPU here (nvidia-smi lists none): run it where there is one, or set SCALE_SFT_ALLOW_CPU=1 to use the CPU"
fi

use_venv ""

export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# Long and short batches take turns: without this the allocator keeps pieces that fit neither.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# Options of the caller come last, so they win.
exec "$python" "$root/scale_sft/distributed/launcher.py" --config_file "$root/launch/single_gpu.yaml" \
    "$root/scale_sft/train.py" --config "$recipe" --base_placement replicate "$@"
