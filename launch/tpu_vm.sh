#!/usr/bin/env bash
# A run on Cloud TPU VMs, one or many workers, from this machine (needs gcloud and a project with TPUs).
#
#   launch/tpu_vm.sh [OPTIONS] VERB [-- FLAGS OF jaxood.main]
#
#   create    asks for the TPU by a queued resource, and waits until it is there
#   setup     copies this checkout to all workers and installs it there
#   run       setup, then starts jaxood.main on all workers; it goes on when this machine disconnects
#   logs      follows what worker 0 says (--worker=1, --worker=all for others)
#   status    the state of the TPU, and whether the run goes on
#   watch     create, run, and wait; after a pre-emption or a lost worker all of it again, and the run
#             goes on where it was
#   stop      ends the run; the TPU stays
#   delete    gives the TPU back; nothing costs afterwards
#
#   --name=NAME        of the queued resource and of the TPU ($TPU_NAME; jaxood)
#   --zone=ZONE        e.g. us-central2-b ($TPU_ZONE)
#   --project=PROJECT  of Google Cloud ($TPU_PROJECT; gcloud's own default)
#   --type=TYPE        of accelerator: v4-32, v5litepod-16, v6e-8 ... ($TPU_TYPE; v5litepod-8)
#   --version=VERSION  of the runtime image (that of the type)
#   --spot             may be pre-empted, costs less: then `watch` instead of `run`
#   --worker=N         for logs: a number, or all (0)
#   --every=SECONDS    how often to look while waiting (60)
#   --dry-run          prints the commands instead of running them
#
# All workers write into one workdir: --workdir=gs://BUCKET/FOLDER (in the TPU's region; its service
# account must be allowed to write there), or a folder that all have mounted. Data likewise.
#
#   launch/tpu_vm.sh --zone=us-central2-b --type=v4-32 --spot watch -- \
#     --config=configs/metric_mixup.py:cifar10 --workdir=gs://BUCKET/mixup
set -euo pipefail
# shellcheck source=launch/shared.sh
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"

name=${TPU_NAME:-jaxood} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-} type=${TPU_TYPE:-v5litepod-8}
version='' spot='' worker=0 every=60 verb=''
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) help_of "$0"; exit ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=1 ;;
    --worker=*) worker=${1#*=} ;;
    --every=*) every=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    -*) refuse "$1 is not an option of launch/tpu_vm.sh; flags of jaxood.main stand after --. See --help." ;;
    create | setup | run | logs | status | watch | stop | delete)
      [ ! "$verb" ] || refuse "one verb at a time: $verb or $1?"
      verb=$1
      ;;
    *) refuse "'$1' is no verb. Known: create, setup, run, logs, status, watch, stop, delete. See --help." ;;
  esac
  shift
done
[ "$verb" ] || refuse "what to do? One of create, setup, run, logs, status, watch, stop, delete. See --help."
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] ||
  refuse "--name='$name' must begin with a letter and have only a-z, 0-9 and - in it."
[ "$zone" ] || [ "$dry_run" ] ||
  refuse "which zone? Add --zone=ZONE, e.g. us-central2-b, or set TPU_ZONE."
whole_number --every "$every"
case $worker in
  all) ;;
  '' | *[!0-9]*) refuse "--worker=$worker must be a worker's number, or all." ;;
esac
case $verb in
  run | watch) main_flags "$@"; shared_workdir 'the workers of a TPU' "$@" ;;
  *) [ $# = 0 ] || refuse "$verb takes no flags of jaxood.main; only run and watch do." ;;
esac
if [ ! "$version" ]; then  # https://cloud.google.com/tpu/docs/runtimes
  case $type in
    v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) refuse "--type=$type: which runtime does it boot? Add --version=VERSION, or choose a v4, v5litepod," \
      "v5p or v6e." ;;
  esac
fi

[ "$zone" ] || note "still to add: --zone=ZONE"
place=(--zone="${zone:-ZONE}")
[ ! "$project" ] || place+=(--project="$project")
tpus=(gcloud compute tpus)

# on WORKER COMMAND: COMMAND, a line of shell, on one worker or all.
on() { run "${tpus[@]}" tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"; }

# look: sets `now` to the state of the queued resource, ABSENT where there is none.
look() {
  local command=("${tpus[@]}" queued-resources describe "$name" "${place[@]}" --format='value(state.state)')
  if [ "$dry_run" ]; then
    run "${command[@]}"
    now=ACTIVE
  elif now=$("${command[@]}" 2>&1); then
    now=${now:-UNKNOWN}
  elif [[ $now == *NOT_FOUND* ]]; then
    now=ABSENT
  else
    refuse "$now"
  fi
}

ask_for_it() {
  run "${tpus[@]}" queued-resources create "$name" "${place[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}
  note "every $every s, until it says ACTIVE; that takes minutes, or longer where none is free:"
  while look; [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPEND* | ABSENT)
        refuse "the request for $type in $zone is $now. Its reasons:" \
          "gcloud compute tpus queued-resources describe $name --zone=$zone." \
          "Then '$0 --name=$name --zone=$zone delete', and ask again." ;;
    esac
    note "$name is $now"
    sleep "$every"
  done
}

give_back() { run "${tpus[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet; }

# The images' own Python is older than jaxood needs, so uv brings one.
install() {
  local archive=${TMPDIR:-/tmp}/$name.tar.gz
  run tar --create --gzip --file="$archive" --directory="$here" \
    pyproject.toml README.md configs jaxood &&
    run "${tpus[@]}" tpu-vm scp "$archive" "$name:jaxood.tar.gz" "${place[@]}" --worker=all &&
    on all "set -e; mkdir -p jaxood; tar -xzf jaxood.tar.gz -C jaxood; cd jaxood; \
python3 -m pip install --quiet --user uv; \
[ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.12 .venv; \
python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'"
}

# The same command on all workers: jax.distributed finds the others by itself. It outlives the ssh
# session, and leaves its exit code in a file.
start() {
  local command
  command="$(quote .venv/bin/python -m jaxood.main "$@"); echo \$? > exit"
  on all "cd jaxood; rm -f exit; nohup setsid bash -c $(quote "$command") > run.log 2>&1 < /dev/null & echo \$! > pid"
}

# A word a worker: its exit code, running, or lost (where the worker itself was started anew).
# shellcheck disable=SC2016 # for the worker's shell
ask='cd jaxood; if [ -f exit ]; then cat exit; elif kill -0 $(cat pid) 2> /dev/null; then echo running; else echo lost; fi'

# going: whether a run goes on there already.
going() { [ ! "$dry_run" ] && words=$(on all "$ask" 2> /dev/null) && [[ $words == *running* ]]; }

follow() { on "$1" 'tail -n 100 -F jaxood/run.log'; }

# await: until the run has ended on all workers -> 0; 1 where it broke off, 3 where the TPU was taken away.
await() {
  note "every $every s, until all workers have an exit code:"
  while look; [ "$now" = ACTIVE ]; do
    if [ "$dry_run" ]; then
      on all "$ask"
      return
    fi
    if words=$(on all "$ask") && [[ $words != *running* ]]; then
      case " ${words//$'\n'/ } " in
        *' 2 '*) refused ;;
        *[!\ 0]*) return 1 ;;
        *) return 0 ;;
      esac
    fi
    sleep "$every"
  done
  return 3
}

refused() {
  on 0 'tail -n 5 jaxood/run.log' >&2
  refuse "the run ended with code 2: what is said above is to be mended first. The TPU is still there;" \
    "'$0 delete' gives it back."
}

# A run that breaks off by itself is started again three times; a TPU that is taken away, always.
watch() {
  local broken=0 ended
  if [ "$dry_run" ]; then
    ask_for_it
    install
    start "$@"
    await
    note "if the TPU is taken away meanwhile: this, and all of the above again"
    give_back
    return
  fi
  while true; do
    look
    case $now in
      ACTIVE) ;;
      ABSENT) ask_for_it ;;
      FAILED | SUSPEND*) note "$name was taken away; asking anew"; give_back; continue ;;
      *) note "$name is $now"; sleep "$every"; continue ;;
    esac
    ended=0
    { going || { install && start "$@"; }; } && await || ended=$?
    case $ended in
      0) note "the run has ended on all workers; '$0 delete' gives the TPU back"; return ;;
      3) continue ;;
    esac
    broken=$((broken + 1))
    [ $broken -le 3 ] || refuse "the run broke off $broken times; see '$0 logs --worker=all'."
    note "the run broke off; starting it again"
    sleep "$every"
  done
}

now='' words=''
case $verb in
  create) ask_for_it ;;
  setup) install ;;
  run)
    look
    [ "$now" = ACTIVE ] || refuse "$name in $zone is $now, and must be ACTIVE: '$0 create' asks for it."
    ! going || refuse "a run goes on there already: '$0 logs' follows it, '$0 stop' ends it."
    install
    start "$@"
    note "the run goes on when this is interrupted"
    follow 0
    ;;
  logs) follow "$worker" ;;
  status) look; [ "$dry_run" ] || echo "$now"; [ "$now" != ACTIVE ] || on all "$ask" ;;
  watch) watch "$@" ;;
  stop) on all "kill -- -\$(cat jaxood/pid)" ;;
  delete) give_back ;;
esac
