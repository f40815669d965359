# shellcheck shell=bash
# Sourced by the scripts beside it: one way to print commands instead of running them, to refuse what
# cannot work, and to make .venv.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$here/.venv/bin/python
dry_run=

# run COMMAND ...: runs it, or with --dry-run prints it so that it can be pasted into a shell.
run() {
  if [ "$dry_run" ]; then quote "$@"; else "$@"; fi
}

# note TEXT ...: what a person should know; a comment between the commands of a dry run.
note() {
  if [ "$dry_run" ]; then echo "# $*"; else echo "jaxood: $*" >&2; fi
}

# refuse TEXT ...: one message and exit code 2, for what the user can mend.
refuse() {
  echo "jaxood: $*" >&2
  exit 2
}

# help_of SCRIPT: its first comment, as the text of --help.
help_of() {
  sed -n '2,/^[^#]/ { s/^# \{0,1\}//p; }' "$1"
}

# quote WORD ...: the words as a line of shell, each quoted only where it must be; --flag='a b', too.
quote() {
  local word flag line=
  for word in "$@"; do
    flag=
    case $word in
      --*=*) flag=${word%%=*}= word=${word#*=} ;;
    esac
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/\'\\\'\'}'" ;;
    esac
    line+=" $flag$word"
  done
  echo "${line# }"
}

# whole_number FLAG VALUE: refuses what is none, or 0.
whole_number() {
  case $2 in
    '' | 0* | *[!0-9]*) refuse "$1=$2 must be a whole number of at least 1." ;;
  esac
}

# main_flags FLAG ...: refuses flags of jaxood.main that name no config or no workdir; a dry run only
# says that the workdir is missing.
main_flags() {
  [[ " $*" == *" --config="?* ]] || refuse "the flags of jaxood.main stand after --, e.g." \
    "-- --config=configs/quickstart.py --workdir=FOLDER; got: ${*:-nothing}."
  [[ " $*" == *" --workdir="?* ]] && return
  [ "$dry_run" ] || refuse "which workdir? Add --workdir=FOLDER after --."
  note "still to add: --workdir=FOLDER"
}

# shared_workdir WHO FLAG ...: says that WHO, several machines, write into one workdir.
shared_workdir() {
  local who=$1
  shift
  [[ " $*" == *" --workdir="[a-z]*://* ]] ||
    note "$who must all see the same --workdir: a bucket (gs://) or a mounted folder"
}

# prepare EXTRA: .venv in the checkout, with jaxood and an extra of pyproject.toml in it; 'core' for none.
# What was installed is remembered by the contents of pyproject.toml, so that a second call takes no time.
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
    run "$found" -m venv --clear "$here/.venv"
  fi
  echo "jaxood: installing packages into $here/.venv (about 1.3 GB on disk, a few minutes the first time)" >&2
  local target=$here
  [ "$extra" = core ] || target+="[$extra]"
  run "$python" -m pip install --quiet --disable-pip-version-check --editable "$target"
  run cp "$here/pyproject.toml" "$stamp"
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
