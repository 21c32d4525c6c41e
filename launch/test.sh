#!/usr/bin/env bash
# Install what the tests need and run them.
#   ./launch/test.sh [--checks] [--fast | --all] [pytest options, but not -m or -n]
# --checks  launch/check.sh first
# --fast    only what plain `pytest` runs
# --all     also races against this machine, which should have nothing else to do, and the kernels in Triton's
#           interpreter. With a GPU its tests always run.
# The last line sums up; the exit status is 0 only if nothing failed. SCALE_SFT_VENV: see single_a100.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

checks='' part=usual
while :; do
    case "${1:-}" in
        --checks) checks=1 ;;
        --fast) part=fast ;;
        --all) part=all ;;
        *) break ;;
    esac
    shift
done

use_venv test

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # small matrices, several processes: more threads only wait
export PATH="$venv/bin:$PATH"   # tests start `accelerate` and `scale-sft` by name
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
trap 'exit 130' INT TERM
failed=0 remark=''

# run_group NAME PYTEST-OPTIONS: one pytest run; its counts go to a file, for the last line.
run_group() {
    local name=$1 status=0
    shift
    printf '\n=== %s ===\n' "$name"
    (cd "$root" && "$python" -m pytest --junitxml "$results/$name.xml" "$@") || status=$?
    case $status in
        0 | 5) ;;   # 5: this group has no test
        *) failed=1 ;;
    esac
    # pytest itself did not get far enough to count
    [ -s "$results/$name.xml" ] ||
        echo '<testsuite tests="1" failures="0" errors="1" skipped="0"/>' > "$results/$name.xml"
}

if [ -n "$checks" ]; then
    printf '\n=== checks ===\n'
    SCALE_SFT_VENV=$venv "$root/launch/check.sh" || { failed=1; remark='; checks failed'; }
fi

# Every test is in one of these groups. Tests of several ranks share runs with the others of their file, so a worker
# takes a file at a time; their ranks wait for each other much of the time, and use what another worker leaves.
workers=$("$python" -c 'import os; print(min(4, os.cpu_count() or 1))')
if [ "$part" = fast ]; then
    run_group "fast tests" -n "$workers" --dist worksteal "$@"
else
    run_group "tests in parallel" -n "$workers" --dist worksteal "$@" \
        -m "not (distributed or slurm or hardware or interpreter or gpu)"
    run_group "tests of several ranks" -n "$workers" --dist loadfile "$@" \
        -m "(distributed or slurm) and not (hardware or interpreter or gpu)"
    if [ "$part" = all ]; then
        run_group "races and interpreter" -n 0 "$@" -m "(hardware or interpreter) and not gpu"
    fi
    if [ "$part" = all ] || has_gpu; then
        run_group "tests on a GPU" -n 0 "$@" -m gpu
    fi
fi

"$python" - "$results" "$remark" <<'EOF' || failed=1
import sys
from pathlib import Path
from xml.etree import ElementTree

suites = [suite for file in Path(sys.argv[1]).glob("*.xml") for suite in ElementTree.parse(file).iter("testsuite")]
tests, failures, errors, skipped = (
    sum(int(suite.get(key)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
)
print(f"{tests - failures - errors - skipped} passed, {failures + errors} failed, {skipped} skipped{sys.argv[2]}")
EOF
exit "$failed"
