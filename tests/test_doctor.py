"""The doctor: a machine that works, and one line for what does not."""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest
from etils import epath

from jaxood import doctor, machine, parallel
from jaxood.errors import UserError


@pytest.fixture(autouse=True)
def _forgotten():
    """Flags outlive a call of `main`, which a process makes only once."""
    yield
    for name in list(doctor.FLAGS):
        if name.startswith('config.'):
            delattr(doctor.FLAGS, name)
        else:
            doctor.FLAGS[name].unparse()


@pytest.fixture
def call(monkeypatch, capsys):
    """(exit code, check -> findings) of a call."""

    def call(*arguments):
        argv = ['doctor', '--json', *arguments]
        monkeypatch.setattr(doctor.sys, 'argv', argv)  # config_flags looks there
        code = doctor.main()
        found = {}
        for row in json.loads(capsys.readouterr().out)['checks']:
            found.setdefault(row['check'], []).append(row)
        return code, found

    return call


def test_a_machine_that_works(call, tmp_path):
    where = tmp_path / 'runs' / 'new'
    code, found = call(f'--workdir={where}', '--config=configs/quickstart.py')
    assert code == 0
    assert not where.exists()  # it leaves nothing behind
    for check in ('packages', 'devices', 'workdir', 'collective', 'training', 'config', 'data'):
        assert [row['state'] for row in found[check]] == ['ok']
    assert f'all devices ({jax.device_count()})' in found['collective'][0]['found']
    assert 'from disk' in found['compilation'][0]['found']
    assert found['data'][0]['found'].startswith('756 training, 316 test')


def test_what_fails_is_said_with_how_to_mend_it(call, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('in the way')
    monkeypatch.setattr(machine, 'memory', lambda: (8 * doctor.GIB, doctor.GIB))

    def setup(*a):
        raise RuntimeError('no such device\nand more')

    monkeypatch.setattr(parallel, 'setup', setup)
    code, found = call(f'--workdir={tmp_path / "file"}')
    assert code == 1
    (row,) = found['workdir']
    assert row['state'] == 'fail'
    assert row['mend'] == 'Choose a folder that can be written.'
    assert found['memory'][0]['state'] == 'warn'
    assert found['collective'][0]['found'] == 'RuntimeError: no such device'


def test_data_that_is_not_there(call, tmp_path):
    code, found = call('--config=configs/metric_mixup.py:cifar10', f'--config.data.root={tmp_path}')
    assert code == 1
    assert [row['state'] for row in found['config']] == ['ok', 'fail']
    assert 'cifar10_train.npz is not there' in found['config'][1]['found']


@pytest.mark.slow
def test_two_processes_find_each_other(tmp_path):
    with socket.socket() as probe:
        probe.bind(('', 0))
        port = probe.getsockname()[1]
    flags = [
        f'--coordinator=localhost:{port}',
        '--num_processes=2',
        f'--workdir={tmp_path / "run"}',
    ]
    command = [sys.executable, '-m', 'jaxood.doctor', '--json', *flags]
    environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
    both = [
        subprocess.Popen(
            [*command, f'--process_id={i}'], stdout=subprocess.PIPE, text=True, env=environment
        )
        for i in range(2)
    ]
    for i, process in enumerate(both):
        said = process.communicate(timeout=300)[0]
        found = json.loads(said[said.index('{\n') :])  # the network's library speaks first
        assert process.returncode == 0
        assert (found['process'], found['of'], found['ok']) == (i, 2, True)
        rows = {row['check']: row['found'] for row in found['checks']}
        assert rows['hosts'] == f'process {i} of 2, same versions'
        assert 'all devices (4)' in rows['collective']
        assert rows['workdir'] == 'all processes see what the first one writes'


def test_a_plugin_of_another_version(monkeypatch):
    installed = {'jax': '0.10.2', 'jaxlib': '0.10.2', 'jax-cuda13-plugin': '0.10.1'}
    monkeypatch.setattr(machine, 'version_of', lambda name: installed.get(name))
    plugins = [f for f in doctor.packages() if f.check == 'plugins']
    assert [f.state for f in plugins] == ['fail']
    assert "'jax[cuda13]==0.10.2'" in plugins[0].mend


def test_a_folder_that_forgets(monkeypatch, tmp_path):
    monkeypatch.setattr(type(epath.Path(tmp_path)), 'read_bytes', lambda self: b'')
    assert doctor._folder('workdir', tmp_path).state == 'fail'


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--wrkdir=x'], "Did you mean 'workdir'"),
        (['--config=configs/quickstrat.py'], 'quickstart.py'),
        (['--config=configs/quickstart.py', '--config.sampler.step=5'], "Did you mean 'steps'"),
        (['now'], "'now' is not a flag"),
    ],
)
def test_flags_that_are_refused(more, message, capsys, monkeypatch):
    monkeypatch.setattr(doctor.sys, 'argv', ['doctor', *more])
    assert doctor.main() == 2
    assert message in capsys.readouterr().err


def test_errors_of_the_user_keep_their_message():
    def check():
        raise UserError('say this')
        yield

    (finding,) = doctor.guarded('name', check)
    assert (finding.state, finding.found) == ('fail', 'say this')
