#!/usr/bin/env bash
# Puts the client programs beside their tests: a Python environment and node_modules, both ignored by git.
# Nothing is done for those that are already of their lock. Needs the project's own .venv (uv), node and npm.
set -euo pipefail
cd "$(dirname "$0")"
uv=../../.venv/bin/uv
# A stamp is written last: tests of what has none are skipped.
is_of() { [ "$(cat "$1/stamp" 2>/dev/null)" = "$2" ]; }

stamp=$(sha256sum requirements.txt)
if ! is_of .venv "$stamp"; then
  "$uv" venv -q --clear --python ../../.venv/bin/python .venv
  VIRTUAL_ENV=$PWD/.venv "$uv" pip sync -q requirements.txt
  echo "$stamp" > .venv/stamp
fi
stamp=$(sha256sum package-lock.json)
if ! is_of node_modules "$stamp"; then
  npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
  echo "$stamp" > node_modules/stamp
fi
