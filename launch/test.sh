#!/usr/bin/env bash
# Install what the tests need and run them all: the fast ones first, then the marked ones.
#   ./launch/test.sh [--fast] [pytest options, but not -m]
# The last line sums up; the exit status is 0 only if nothing failed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

fast_only=
if [ "${1:-}" = --fast ]; then fast_only=1; shift; fi

ensure_venv test

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # small matrices, several processes: more threads only wait
export PATH="$venv/bin:$PATH"   # tests start `accelerate` and `scale-sft` by name
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
trap 'exit 130' INT TERM
failed=0

# run_group NAME PYTEST-OPTIONS: one pytest run; its counts go to a file, for the last line.
run_group() {
    local name=$1 status=0
    shift
    printf '\n=== %s tests ===\n' "$name"
    (cd "$root" && "$python" -m pytest --junitxml "$results/$name.xml" "$@") || status=$?
    case $status in
        0 | 5) ;;   # 5: this group has no test
        *) failed=1 ;;
    esac
    # pytest itself did not get far enough to count
    [ -s "$results/$name.xml" ] ||
        echo '<testsuite tests="1" failures="0" errors="1" skipped="0"/>' > "$results/$name.xml"
}

run_group fast "$@"
# A marked test may start several processes or a Slurm: more time each.
[ -n "$fast_only" ] ||
    run_group marked "$@" --timeout 600 -m "slow or distributed or slurm or gpu or quantized"

"$python" - "$results" <<'EOF' || failed=1
import sys
from pathlib import Path
from xml.etree import ElementTree

suites = [suite for file in Path(sys.argv[1]).glob("*.xml") for suite in ElementTree.parse(file).iter("testsuite")]
tests, failures, errors, skipped = (
    sum(int(suite.get(key)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
)
print(f"{tests - failures - errors - skipped} passed, {failures + errors} failed, {skipped} skipped")
EOF
exit "$failed"
