# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv in the checkout and installs jaxood into it, once.
#   prepare EXTRA   an extra of pyproject.toml, e.g. prepare test; 'core' for none
# What was installed is remembered by the contents of pyproject.toml, so that a second call takes no time.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$here/.venv/bin/python

prepare() {
  local extra=$1 stamp=$here/.venv/.jaxood-$1
  if [ -x "$python" ] && cmp -s "$stamp" "$here/pyproject.toml"; then
    echo "jaxood: using $here/.venv" >&2
    return
  fi
  if ! "$python" -m pip --version >/dev/null 2>&1; then  # not there, or cut off while it was made
    local found
    found=$(find_python) || {
      echo "jaxood: needs Python 3.11 or newer, and found none on PATH. Install one (python.org, your" \
        "distribution, or 'uv python install 3.12'), or name it: PYTHON=/path/to/python $0" >&2
      exit 2
    }
    echo "jaxood: making $here/.venv with $("$found" --version)" >&2
    "$found" -m venv --clear "$here/.venv"
  fi
  echo "jaxood: installing packages into $here/.venv (about 1.3 GB on disk, a few minutes the first time)" >&2
  local target=$here
  [ "$extra" = core ] || target+="[$extra]"
  "$python" -m pip install --quiet --disable-pip-version-check --editable "$target"
  cp "$here/pyproject.toml" "$stamp"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}
