#!/usr/bin/env bash
# A run as a job of Slurm: writes the batch script, and hands it to sbatch.
#
#   launch/slurm.sh [OPTIONS] -- FLAGS OF jaxood.main
#
#   --nodes=N            machines (1)
#   --gpus=N             GPUs of each (1); each gets a process of its own, as jax.distributed expects
#   --cpus=N             CPU cores for each process (8)
#   --mem=SIZE           memory of each machine, e.g. 200G (the cluster's default)
#   --time=D-HH:MM:SS    until the job is interrupted and queued again (1-00:00:00)
#   --partition=NAME     (the cluster's default)
#   --account=NAME       (the cluster's default)
#   --name=NAME          of the job (jaxood)
#   --logs=FOLDER        for what the job says (runs/slurm in the checkout)
#   --sbatch=OPTION      any further option of sbatch, e.g. --sbatch=--constraint=a100; may be repeated
#   --dry-run            prints the commands and the batch script instead
#
# Queued again after a pre-emption, a lost machine or its time limit, the job goes on where it was; it
# ends when the run does. The checkout (with its .venv), data and --workdir lie on a file system that
# all machines share, or the workdir and data in a bucket.
#
#   launch/slurm.sh --nodes=2 --gpus=8 --partition=gpu -- \
#     --config=configs/metric_mixup.py:cifar10 --workdir=/shared/runs/mixup
set -euo pipefail
# shellcheck source=launch/shared.sh
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"

nodes=1 gpus=1 cpus=8 mem='' time=1-00:00:00 name=jaxood logs=$here/runs/slurm more=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) help_of "$0"; exit ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --mem=*) mem=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --partition=* | --account=*) more+=("$1") ;;
    --name=*) name=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --sbatch=*) more+=("${1#*=}") ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    *) refuse "$1 is not an option of launch/slurm.sh; flags of jaxood.main stand after --. See --help." ;;
  esac
  shift
done
whole_number --nodes "$nodes"
whole_number --gpus "$gpus"
whole_number --cpus "$cpus"
[[ $time =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] ||
  refuse "--time=$time is no time of Slurm's: minutes, HH:MM:SS or D-HH:MM:SS."
main_flags "$@"
[ "$nodes" = 1 ] || shared_workdir "the $nodes machines" "$@"

# The batch script. No --gpus-per-task: a process sees all GPUs of its machine, takes the one of its
# number among them, and can talk to the others directly.
batch() {
  local option
  cat <<EOF
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --output=$logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
EOF
  for option in ${mem:+"--mem=$mem"} ${more[@]+"${more[@]}"}; do
    echo "#SBATCH $option"
  done
  cat <<EOF

# three minutes before the time limit: back into the queue, and on from there
trap 'scontrol requeue "\$SLURM_JOB_ID"' USR1

export JAX_PLATFORMS=cuda # or a broken driver would mean a run on the CPU
export SRUN_CPUS_PER_TASK=$cpus # which srun no longer takes from the job, since 22.05
cd $(quote "$here")
srun --kill-on-bad-exit=1 $(quote .venv/bin/python -m jaxood.main "$@") &
wait \$!
EOF
}

prepare gpu
run mkdir -p "$logs"
if [ "$dry_run" ]; then
  echo "sbatch <<'END'"
  batch "$@"
  echo END
else
  batch "$@" | sbatch
  note "its log: $logs; squeue --me shows the job, scancel ends it"
fi
