#!/usr/bin/env bash
# A run on one machine with GPUs, or on several that reach each other.
#
#   launch/gpu.sh [OPTIONS] -- FLAGS OF jaxood.main
#
#   --gpus=0,1          only these GPUs of the machine (all)
#   --hosts=A,B,...     starts the run on each of these machines over ssh, and waits; the checkout lies
#                       at the same place on all of them. The first one coordinates
#   --port=PORT         where it does (9876); must be free, and reachable from the others
#   --platform=NAME     cuda, or cpu to try without a GPU (cuda)
#   --dry-run           prints the commands instead of running them
#
# One process a machine uses all its GPUs. With --hosts, all machines must see the same --workdir and
# the same data. To start them by hand, or from another scheduler, give each machine the flags that
# --dry-run shows.
#
#   launch/gpu.sh -- --config=configs/metric_mixup.py:cifar10 --workdir=runs/mixup
#   launch/gpu.sh --hosts=gpu1,gpu2 -- --config=configs/metric_mixup.py:cifar10 --workdir=/shared/runs/mixup
set -euo pipefail
# shellcheck source=launch/shared.sh
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"

gpus='' hosts=() port=9876 platform=cuda
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) help_of "$0"; exit ;;
    --gpus=*) gpus=${1#*=} ;;
    --hosts=*) IFS=, read -r -a hosts <<< "${1#*=}" ;;
    --port=*) port=${1#*=} ;;
    --platform=*) platform=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    *) refuse "$1 is not an option of launch/gpu.sh; flags of jaxood.main stand after --. See --help." ;;
  esac
  shift
done
[[ $gpus =~ ^([0-9]+(,[0-9]+)*)?$ ]] || refuse "--gpus=$gpus must be numbers with commas, e.g. 0,1."
whole_number --port "$port"
case $platform in
  cuda) extra=gpu ;;
  cpu) extra=core ;;
  *) refuse "--platform=$platform must be cuda or cpu." ;;
esac
main_flags "$@"

settings=(JAX_PLATFORMS="$platform") # or a broken driver would mean a run on the CPU
[ ! "$gpus" ] || settings+=(CUDA_VISIBLE_DEVICES="$gpus")

if [ ${#hosts[@]} = 0 ]; then
  prepare "$extra"
  cd "$here"
  run env "${settings[@]}" "$python" -m jaxood.main "$@"
  exit
fi

shared_workdir "the ${#hosts[@]} machines" "$@"
pids=()
end() { [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2> /dev/null || true; }
trap end EXIT # one that stops takes the others with it; ssh -tt: what it started ends with it
for i in "${!hosts[@]}"; do
  command=$(quote env "${settings[@]}" .venv/bin/python -m jaxood.main "$@" \
    --coordinator="${hosts[0]}:$port" --num_processes="${#hosts[@]}" --process_id="$i")
  command="cd $(quote "$here") && source launch/shared.sh && prepare $extra && exec $command"
  command=(ssh -tt "${hosts[$i]}" "bash -c $(quote "$command")")
  if [ "$dry_run" ]; then
    run "${command[@]}"
  else
    "${command[@]}" < /dev/null &
    pids+=($!)
  fi
done
for _ in ${pids[@]+"${pids[@]}"}; do
  wait -n
done
