#!/usr/bin/env bash
# Linters, type checker and tests, in .venv. Arguments go to pytest: bash launch/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

ensure_environment test
echo "ruff"
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --quiet --check . || {
    echo "these files are not formatted; run: .venv/bin/ruff format" >&2
    .venv/bin/ruff format --check . >&2 || true
    exit 1
}
echo "mypy"
.venv/bin/mypy
# A worker for each core, up to four, because tests start ranks and clusters of their own.
exec .venv/bin/python -m pytest --numprocesses logical --maxprocesses 4 --no-loadscope-reorder "$@"
