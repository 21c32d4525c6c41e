#!/usr/bin/env bash
# From a fresh machine to a trained adapter: makes .venv, installs the pinned packages, trains the shipped demo.
#   ./launch/quickstart.sh [trainer options]      needs Python 3.10+ and nothing else; a CPU is enough
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

use_venv ""

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

# The caller may name another folder.
previous=''
for argument; do
    case "$argument" in --output_dir=* | --output-dir=*) output_dir=${argument#*=} ;; esac
    case "$previous" in --output_dir | --output-dir) output_dir=$argument ;; esac
    previous=$argument
done

# In a process group of its own (set -m), with signals passed on: Ctrl-C and SIGTERM reach the trainer once.
# Options of the caller come last, so they win.
set -m
"$python" "$root/scale_sft/distributed/launcher.py" --config_file "$root/launch/single_gpu.yaml" \
    "$root/scale_sft/train.py" --config "$root/scale_sft/recipes/demo.yaml" --output_dir "$output_dir" "$@" &
trainer=$!
trap 'interrupted=1; kill -INT "$trainer" 2>/dev/null || true' INT
trap 'interrupted=1; kill -TERM "$trainer" 2>/dev/null || true' TERM
interrupted=1
while [ -n "$interrupted" ]; do # a signal ends the wait, not the trainer: wait again
    interrupted='' status=0
    wait "$trainer" || status=$?
done
if [ "$status" -ne 0 ] || [ ! -d "$output_dir/merged" ]; then exit "$status"; fi

cat <<END

What next? These work as they are:

  source '$venv/bin/activate'

  # ask the tuned model
  python -c "from transformers import pipeline; ask = pipeline('text-generation', '$output_dir/merged'); \
print(ask('Write as camelCase: send many dry letters\n', return_full_text=False)[0]['generated_text'])"

  # see what was learned
  scale-sft inspect '$output_dir/adapter'

  # train with another method; --train_data FILE.jsonl takes your own data
  scale-sft train --config demo --method ma --learning_rate 0.05 --output_dir '$output_dir-ma'
END
