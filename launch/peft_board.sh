#!/usr/bin/env bash
# PEFT's MetaMathQA comparison (Llama 3.2 3B, 768 tokens, 5,000 steps of 4 sequences) with sparse deltas, on one GPU of
# 48 GB: makes the data, trains, exports the adapter to SHiRA's format, and measures accuracy and forgetting.
#   ./launch/peft_board.sh [trainer options]      installs as launch/quickstart.sh does; run it again to resume
# The base is gated: accept its licence on the hub, then `hf auth login`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

use_venv ""

export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
exec "$python" "$root/launch/peft_board.py" "$@"
