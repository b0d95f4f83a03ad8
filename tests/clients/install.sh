#!/usr/bin/env bash
# Puts the client programs beside their tests: a Python environment and node_modules, both ignored by git.
# Nothing is done when they are already those of the locks. Needs the project's own .venv (uv), node and npm.
set -euo pipefail
cd "$(dirname "$0")"
uv=../../.venv/bin/uv
stamp=$(cat requirements.txt package-lock.json install.sh | sha256sum)
[ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ] || exit 0
"$uv" venv -q --clear --python ../../.venv/bin/python .venv
VIRTUAL_ENV=$PWD/.venv "$uv" pip sync -q requirements.txt
npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
echo "$stamp" > .venv/stamp
