#!/usr/bin/env bash
# Makes .venv out of locks/cpu.txt. Does nothing when that was done before; a broken-off run is simply done again.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/installed
log=$venv/install.log
wanted=3.11
needed_kib=$((6 * 1024 * 1024))
torch_index=https://download.pytorch.org/whl/cpu

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'echo "install: broken off; the same command goes on from here" >&2; exit 130' INT TERM

fail() {
    printf 'install: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python$wanted python3}; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$wanted" ]; then
            command -v "$candidate"
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        fail "PYTHON=$PYTHON is no Python $wanted, which locks/cpu.txt is for; name another, or leave it out"
    fi
    if command -v python3 >/dev/null 2>&1; then
        fail "locks/cpu.txt is for Python $wanted, but here is $(python3 --version 2>&1); install python$wanted" \
            "and name it: make install PYTHON=/path/to/python$wanted"
    fi
    fail "python3 is missing; on Debian: apt-get install python3 python3-venv"
}

# Shows pip's progress as a count; all that it says is in the log.
pip_install() {
    local what=$1 total
    shift
    total=$(grep -c '^[A-Za-z0-9._-]*==' "$what" || true)
    if ! "$venv/bin/python" -m pip install --no-deps --no-input "$@" 2>&1 | tee -a "$log" | awk -v total="$total" -v tty="$([ -t 1 ] && echo 1 || echo 0)" '
        /^(Collecting|Processing) / { n++; name = $2; sub(/.*\//, "", name); sub(/[=-][=0-9].*/, "", name)
                                      if (tty) printf "\r\033[K  fetching %d/%d %s", n, total, name
                                      else if (n % 25 == 0) printf "  fetching %d/%d\n", n, total
                                      fflush() }
        /^Installing collected/     { if (tty) printf "\r\033[K"
                                      if (n) printf "  unpacking %d packages\n", n; fflush() }
        END                         { if (tty) printf "\r\033[K" }'; then
        return 1
    fi
}

[ "$(uname -sm)" = "Linux x86_64" ] || fail "locks/cpu.txt is for Linux on x86-64, but this is $(uname -sm)"
python=$(find_python)

if command -v flock >/dev/null 2>&1; then
    exec 9<locks/install.sh
    flock --nonblock 9 || { echo "waiting for another installation in $venv"; flock 9; }
fi

key=$("$python" locks/lock.py key)
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    exit 0
fi
rm -f "$stamp"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian: apt-get install python3-venv"
    free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "$free_kib" -ge "$needed_kib" ] ||
        fail "$((free_kib / 1024 / 1024)) GiB are free in $PWD, but the environment needs about 6; free some space"
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" 2>"$scratch/venv" || {
        cat "$scratch/venv" >&2
        fail "$venv could not be made"
    }
fi

: >"$log"
echo "installing what locks/cpu.txt pins (1 GB to fetch, 4 GB on disk; some minutes the first time)"
failed() {
    tail -n 15 "$log" >&2
    fail "pip failed; its whole output is in $log; run the same command again to go on"
}
torch=$scratch/torch.txt
awk '/^[^ #]/ { ours = /^torch==/ } ours' locks/cpu.txt >"$torch"
# torch's CPU build lies on no ordinary index: first where pip was told to look, then where PyTorch keeps it.
pip_install "$torch" --require-hashes -r "$torch" ||
    pip_install "$torch" --require-hashes --extra-index-url "$torch_index" -r "$torch" || failed
pip_install locks/cpu.txt --require-hashes -r locks/cpu.txt || failed
"$venv/bin/python" -m pip install --no-deps --no-build-isolation --quiet -e . >>"$log" 2>&1 || failed
printf '%s\n' "$key" >"$stamp"
echo "installed in $venv"
