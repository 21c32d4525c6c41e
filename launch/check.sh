#!/usr/bin/env bash
# Check the code without running it: lint, format, types, and which package imports which.
#   ./launch/check.sh [lint] [format] [types] [floors]      default: all four
# All that are asked for run; the exit status is 0 only if every one passes. SCALE_SFT_VENV: see single_a100.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

use_venv test
cd "$root"
status=0

# run NAME COMMAND...: one check; its output is shown, its failure remembered.
run() {
    local name=$1
    shift
    if "$@"; then say "$name: passed"; else say "$name: FAILED"; status=1; fi
}

[ $# -gt 0 ] || set -- lint format types floors
for check; do
    case $check in
        lint) run lint "$python" -m ruff check . ;;
        format) run format "$python" -m ruff format --check . ;;
        types) run types "$python" -m mypy ;;
        floors) run floors "$venv/bin/lint-imports" ;;
        *) die "unknown check: got $check, expected lint, format, types or floors" ;;
    esac
done
exit "$status"
