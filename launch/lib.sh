# shellcheck shell=bash
# Shared by the scripts of this folder: find a Python, make the virtual environment, install the pinned packages.
# Sourced, not run. Bash 3.2 is enough, so that it also works on a Mac.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
install_log=$root/install.log

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*"; }
die() { say "$*" >&2; exit 1; }

# Print the first Python >= 3.10 that can make a virtual environment. $PYTHON, where set, is the only candidate.
find_python() {
    local candidate found='' candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        # Run it instead of looking for it: version managers put names on the path that do not start.
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
        found=$candidate
        "$candidate" -c 'import venv, ensurepip' 2>/dev/null || continue
        echo "$candidate"
        return
    done
    if [ -n "$found" ]; then
        die "$found cannot make virtual environments: install its venv module (Debian: apt install python3-venv)"
    elif [ -n "${PYTHON:-}" ]; then
        die "PYTHON=$PYTHON is not a Python 3.10 or newer: set it to one, or unset it"
    fi
    die "no Python 3.10 or newer found: install one, or name it: PYTHON=/path/to/python3 $0"
}

# Free space for torch and the rest. The CUDA build of torch, which pip takes on Linux unless it is told of another,
# needs the larger figure; without a GPU only the smaller one is insisted upon.
check_disk() {
    local needed_gb=3 free_kb
    if command -v nvidia-smi >/dev/null 2>&1; then needed_gb=12; fi
    needed_gb=${SCALE_SFT_REQUIRED_GB:-$needed_gb}
    free_kb=$(df -Pk "$root" | awk 'NR == 2 { print $4 }')
    [ $((free_kb / 1048576)) -ge "$needed_gb" ] ||
        die "not enough disk space in $root: $((free_kb / 1048576)) GB free, $needed_gb GB needed"
}

# What is installed, in one line: where, with which extra ("" or "test"), and a checksum of what was asked for.
stamp_line() { echo "$root [$1] $(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"; }

# One line that says what went wrong, out of pip's many: its last error, and the network's where there was one.
explain_install_failure() {
    local reason network
    reason=$(grep -E '^ *(ERROR|error|Error)' "$install_log" | grep -v subprocess-exited | tail -n 1 || true)
    [ -n "$reason" ] || reason=$(grep -v '^[[:space:]]*$' "$install_log" | tail -n 1 || true)
    network=$(grep -oE 'Temporary failure in name resolution|Name or service not known|Network is unreachable|Connection refused|Read timed out|CERTIFICATE_VERIFY_FAILED' "$install_log" | tail -n 1 || true)
    reason=$(printf '%s' "$reason" | sed 's/^ *//' | cut -c 1-300)
    die "the installation failed: $reason${network:+; network: $network} (whole log: $install_log)"
}

# Say what pip is doing, out of its log, until killed: on a terminal one line that changes, else a line now and then.
show_install() {
    local line began=$SECONDS said=$SECONDS
    while kill -0 $$ 2>/dev/null; do
        sleep 1 >/dev/null 2>&1
        line=$(grep -E '^ *(Collecting|Downloading|Using cached|Building|Preparing|Installing)' "$install_log" |
            tail -n 1 | sed 's/^ *//' | cut -c 1-60 || true)
        if [ -t 1 ]; then
            printf '\r\033[K%s s  %s' $((SECONDS - began)) "$line"
        elif [ $((SECONDS - said)) -ge 15 ]; then
            said=$SECONDS
            say "$((SECONDS - began)) s  $line"
        fi
    done
}

# ensure_venv EXTRA: after it, $python runs in an environment that holds the pinned packages and this project.
ensure_venv() {
    local extra=$1 stamp=$venv/.installed unfinished=$venv/.unfinished base shower status=0
    if [ ! -e "$unfinished" ] && [ -x "$python" ] && grep -qxF "$(stamp_line "$extra")" "$stamp" 2>/dev/null; then
        return
    fi
    base=$(find_python)
    check_disk
    { : > "$install_log"; } 2>/dev/null || die "cannot write to $root"
    # Start from nothing if an earlier installation was cut off, the folder was moved (a virtual environment holds
    # absolute paths) or its Python no longer runs. Any other environment is brought up to date in place.
    if [ -e "$unfinished" ] || ! "$python" -m pip --version >/dev/null 2>&1 ||
        { [ -e "$stamp" ] && ! grep -qF "$root [" "$stamp"; }; then
        say "making a virtual environment in $venv"
        "$base" -m venv --clear "$venv" >> "$install_log" 2>&1 || explain_install_failure
    fi
    touch "$unfinished"
    say "installing the pinned packages: a few minutes (log: $install_log)"
    show_install & shower=$!
    trap 'kill "$shower" 2>/dev/null; say "interrupted while installing: run it again to start over" >&2; exit 130' INT TERM
    PIP_USER=0 "$python" -m pip install --no-input --disable-pip-version-check --progress-bar off \
        --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}" >> "$install_log" 2>&1 || status=$?
    kill "$shower" 2>/dev/null || true
    wait "$shower" 2>/dev/null || true
    if [ -t 1 ]; then printf '\r\033[K'; fi
    [ "$status" -eq 0 ] || explain_install_failure
    trap - INT TERM
    # The test extra contains the plain installation.
    { stamp_line ""; if [ -n "$extra" ]; then stamp_line "$extra"; fi; } > "$stamp"
    rm -f "$unfinished"
}

# use_venv EXTRA: as ensure_venv, but $SCALE_SFT_VENV, where set, is used as it is.
use_venv() {
    if [ -n "${SCALE_SFT_VENV:-}" ]; then
        venv=$SCALE_SFT_VENV
        python=$venv/bin/python
        [ -x "$python" ] || die "SCALE_SFT_VENV=$SCALE_SFT_VENV holds no bin/python"
    else
        ensure_venv "$1"
    fi
}

# Does this machine have a GPU that the driver knows?
has_gpu() { nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; }
