#!/usr/bin/env bash
# From a fresh clone to a report: makes .venv, installs, trains both families on the embedded text.
# Arguments are passed on: bash launch/quickstart.sh seeds='[0,1]'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

ensure_environment
exec .venv/bin/python -m launch quickstart "$@"
