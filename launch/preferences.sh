#!/usr/bin/env bash
# Preference tuning on the shipped demo, in under three minutes on a CPU: two right answers are learned, then one of
# them is preferred.
#   ./launch/preferences.sh      installs as launch/quickstart.sh does; run it again to see its result again
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

use_venv ""

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

learned=$root/runs/demo_both_answers
preferred=$root/runs/demo_dpo

# "Write as one word: lock your price" has two right answers: lockYourPrice and lock_your_price.
"$python" "$root/scale_sft/train.py" --config "$root/scale_sft/recipes/demo_both_answers.yaml" --output_dir "$learned"

# Its adapter is the start and the reference; the shorter answer is preferred.
"$python" "$root/scale_sft/train.py" --config "$root/scale_sft/recipes/demo_dpo.yaml" --start_from "$learned/adapter" \
    --reference_adapter "$learned/adapter" --output_dir "$preferred"

# How many of the held-out questions get the preferred answer, exactly, by greedy generation?
"$python" - "$preferred/metrics.jsonl" <<'END'
import json, sys

found = [json.loads(line) for line in open(sys.argv[1])]
shares = [record["exact_match"] for record in found if "exact_match" in record]
print(f"preferred answers in generation: {shares[0]:.1%} before, {shares[-1]:.1%} after")
END
