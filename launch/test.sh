#!/usr/bin/env bash
# Installs what the tests need into .venv and runs lint and all tests. Further arguments go to pytest, e.g.
#   launch/test.sh -m 'not slow' -k diffusion
# Real data is read from the folder that JAXOOD_TEST_DATA names; without it those tests skip and say so.
set -euo pipefail
# shellcheck source=launch/shared.sh
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"
prepare test
cd "$here"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# a file's tests stay together: they share what its fixtures trained
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
