"""Several hosts, as local processes of one CPU device each: the numbers of one, and none hangs."""

import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from etils import epath

from jaxood import artefacts, console, hosts, main, parallel
from jaxood.errors import UserError
from jaxood.train import checkpoint, loop, state

HERE = pathlib.Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('', 0))
        return s.getsockname()[1]


def launch(count: int, code: str, *arguments: str, timeout: float = 300):
    """Runs `code` in `count` processes that have met -> (exit codes, what each said)."""
    begin = f'import sys; sys.path.insert(0, {str(HERE)!r}); from jaxood import hosts, main\n'
    meet = f'("localhost:{free_port()}", {count}, int(sys.argv[1]))'
    environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}
    environment['PYTHONPATH'] = os.pathsep.join([str(HERE.parent), *sys.path])
    running = [
        subprocess.Popen(
            [sys.executable, '-c', f'{begin}MEET = {meet}\n{code}', str(i), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        said = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], said


# ---- what they say to each other --------------------------------------------------------------

TALK = """
import json, os, pathlib
from etils import epath
hosts.start(*MEET)
from jaxood.errors import UserError
from jaxood.train import checkpoint
import jax, numpy as np
from jaxood import artefacts, parallel
folder, me = epath.Path(sys.argv[2]), hosts.index()
said = {}

def message(name, function):
    try:
        function()
    except UserError as e:
        said[name] = str(e)

def fail():
    with hosts.one_for_all():
        if me == 1:
            raise UserError('no such folder')

said['count'] = hosts.count()
said['all'] = hosts.gather({'me': me, 'text': 'x' * 300 * me})
said['one'] = hosts.agree([me, None, 'a'])
message('fails', fail)
message('same', lambda: hosts.compare({'jax': 1, 'config.a.b': (0.5, None)}))
message('differ', lambda: hosts.compare({'jax': '0.10', 'config.sampler.steps': 50 - 25 * me}))
message('seen', lambda: hosts.check_folder(folder))
message('unseen', lambda: hosts.check_folder(folder / f'mount{me}'))
message('pmap', lambda: parallel.setup('pmap'))
message('few', lambda: parallel.setup('jit', 1))
devices = parallel.setup()
rows = np.arange(8)
said['own'] = rows[devices.own(8)].tolist()
doubled = devices.compile_rows(lambda shared, x: shared['w'] * x)
shared = devices.replicate({'w': np.int64(2), 'key': jax.random.key(3)})
said['rows'] = devices.gather(doubled({'w': shared['w']}, devices.shard(rows))).tolist()
joined = devices.join(rows[devices.own(8)] + 100)
said['joined'] = devices.gather(doubled({'w': shared['w']}, devices.shard(joined))).tolist()
with artefacts.lock(folder / 'held'):
    artefacts.save(folder / 'a.npz', x=np.arange(3) + me)
    artefacts.save_rows(folder / 't/x.npy', iter([np.ones((2, 2)), np.zeros((1, 2))]), 3)
    said['saved'] = artefacts.load(folder / 'a.npz')['x'].tolist()
    said['table'] = artefacts.load_table(folder / 't')['x'].tolist()
    said['there'] = [artefacts.exists(folder / 'a.npz'), artefacts.exists(folder / 'b.npz')]
import test_hosts
said['losses'] = test_hosts.adam(devices, folder / 'adam')
(folder / f'said{me}.json').write_text(json.dumps(said))
hosts.run(lambda: 0)
"""


def adam(devices, folder) -> list[float]:
    """The losses of 20 steps of Adam, with a checkpoint at the tenth."""
    x, w = (np.random.default_rng(k).normal(size=(32, 4)).astype(np.float32) for k in range(2))

    def loss_fn(params, extra, data, batch, key, step):
        error = jnp.tanh(data['x'][batch['index']] @ params['a']) @ params['b'] - batch['y']
        loss = jnp.mean(jnp.square(error))
        return loss, (extra, {'loss': loss})

    def feed(n):
        for m in itertools.count(n):
            rows = np.random.default_rng(m).permutation(32)[:16]
            yield {'index': rows.astype(np.int32), 'y': np.sin(x[rows].sum(axis=1))}

    tx = optax.adam(0.02)
    loop.fit(
        state.create({'a': w[:4], 'b': w[4]}, tx, {}, ema=False),
        devices.compile_step(functools.partial(loop.train_step, loss_fn=loss_fn, tx=tx)),
        devices.replicate({'x': x}),
        feed,
        jax.random.key(0),
        steps=20,
        devices=devices,
        folder=folder,
        what='adam',
        images_per_step=16,
        log_every=1,
        checkpoint_every=10,
    )
    hosts.barrier()
    return [row['loss'] for row in console.read_log(folder / 'log.jsonl')]


def test_what_two_hosts_say_to_each_other(tmp_path):
    for me in range(2):
        (tmp_path / f'mount{me}').mkdir()
    losses = adam(parallel.setup('jit', 1), epath.Path(tmp_path / 'alone'))
    assert losses[-1] < 0.8 * losses[0]
    codes, said = launch(2, TALK, str(tmp_path))
    assert codes == [0, 0], said
    for me in range(2):
        heard = json.loads((tmp_path / f'said{me}.json').read_text())
        assert heard['count'] == 2
        assert heard['all'] == [{'me': 0, 'text': ''}, {'me': 1, 'text': 'x' * 300}]
        assert heard['one'] == [0, None, 'a']
        assert heard['fails'] == 'host 1: no such folder'
        assert 'host 1 has config.sampler.steps=25, host 0 50. Start all' in heard['differ']
        assert 'mount' in heard['unseen']
        assert 'is not visible from host 1. Give a --workdir that all' in heard['unseen']
        assert not {'same', 'seen'} & {*heard}
        assert "mode='pmap' works on one host, and these are 2" in heard['pmap']
        assert 'num_devices=1 leaves devices of some hosts idle' in heard['few']
        assert heard['own'] == [[0, 1, 2, 3], [4, 5, 6, 7]][me]
        assert heard['rows'] == [0, 2, 4, 6, 8, 10, 12, 14]
        assert heard['joined'] == [200 + 2 * i for i in range(8)]
        assert heard['saved'] == [0, 1, 2]
        assert heard['table'] == [[1, 1], [1, 1], [0, 0]]
        assert heard['there'] == [True, False]
        np.testing.assert_allclose(heard['losses'], losses, rtol=1e-4)
    assert [p.name for p in tmp_path.glob('.seen*')] == []


# ---- flags ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for variable in (*hosts.ENVIRONMENT.values(), *hosts.CLUSTERS):
        monkeypatch.delenv(variable, raising=False)


def test_a_process_on_its_own_meets_nobody(monkeypatch):
    hosts.start()
    monkeypatch.setenv('SLURM_PROCID', '0')
    monkeypatch.setenv('SLURM_NTASKS', '1')
    hosts.start(num_processes=1)
    assert not jax.distributed.is_initialized()
    assert (hosts.index(), hosts.count(), hosts.first()) == (0, 1, True)
    assert hosts.agree('x') == 'x'


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('a:1', None, None), '--num_processes and --process_id not set, for several hosts'),
        ((None, 2, 0), '--coordinator not set'),
        (('a:b', 2, 0), '--coordinator=a:b must be HOST:PORT'),
        (('a', 2, 0), '--coordinator=a must be HOST:PORT'),
        (('a:1', 2, 2), r'--process_id=2 must lie in 0\.\.1 for --num_processes=2'),
    ],
)
def test_flags_that_do_not_belong_together(flags, message):
    with pytest.raises(UserError, match=message):
        hosts.start(*flags)


def test_the_environment_says_what_flags_do_not(monkeypatch):
    monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', '10.0.0.1:1234')
    monkeypatch.setenv('JAX_NUM_PROCESSES', '4')
    monkeypatch.setenv('JAX_PROCESS_ID', '3')
    given = hosts._given(None, None, 1)
    assert given['coordinator_address'] == '10.0.0.1:1234'
    assert (given['num_processes'], given['process_id']) == (4, 1)
    monkeypatch.setenv('JAX_NUM_PROCESSES', 'four')
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='four' must be a whole number"):
        hosts.start()


def test_a_port_in_use_is_named():
    with socket.socket() as s:
        s.bind(('', 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(UserError, match=f'port {port} cannot be opened .* Choose another'):
            hosts.start(f'localhost:{port}', 2, 0)


# ---- the chain --------------------------------------------------------------------------------


def config(**changes):
    return tiny.config(
        arms=dict(diffusion=dict()),
        backbone=dict(name='cnn', widths=(4, 8)),
        scores=dict(msp={}),
        detector__steps=20,
        **{'parallel__num_devices': None, **changes},
    )


CHAIN = """
import os, signal
import tiny, test_hosts
from jaxood import artefacts
from jaxood.train import checkpoint
workdir, stages, victim, what, which = sys.argv[2:]
left = int(which)

def dying(function, name):
    def save(place, *args, **kwargs):
        global left
        left -= what == name and ('shards/' in str(place) or name == 'checkpoint')
        if left == 0 and hosts.index() == int(victim):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(place, *args, **kwargs)
    return save

artefacts.save = dying(artefacts.save, 'shard')
checkpoint.Checkpoints.save = dying(checkpoint.Checkpoints.save, 'checkpoint')
execute = lambda argv: main.execute(test_hosts.config(), workdir, stages.split(','), MEET)
hosts.run(lambda: main.run_command(lambda argv: (argv,), execute, sys.argv))
"""
AFTER = 'synthesise,train_detector,score,report'
LOST = 'has lost another host, which was stopped or failed'


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """The same in one process on one device."""
    folder = tmp_path_factory.mktemp('hosts') / 'alone'
    main.execute(config(parallel__num_devices=1), str(folder))
    return folder


def beginning(alone, folder):
    """A workdir that has the diffusion model and the judges of another."""
    for stage in ('train_diffusion', 'train_judges'):
        shutil.copytree(alone / 'artefacts' / stage, folder / 'artefacts' / stage)
    return str(folder)


def made(folder, stage):
    (place,) = epath.Path(folder / 'artefacts' / stage).iterdir()
    return place


def assert_same_detector(folder, alone):
    """After 20 steps of SGD."""
    a, b = (checkpoint.load_weights(made(f, 'train_detector') / 'weights') for f in (folder, alone))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def assert_same_work(folder, alone):
    """The same outliers from the same weights, the same detector, and nothing half-written."""
    ours, theirs = (made(f, 'synthesise') for f in (folder, alone))
    a, b = (artefacts.load_table(f / 'outliers')['images'].astype(int) for f in (ours, theirs))
    assert np.abs(a - b).max() <= 1
    a, b = ((f / 'index.jsonl').read_text().splitlines() for f in (ours, theirs))
    for row, other in zip(map(json.loads, a), map(json.loads, b), strict=True):
        assert (row['candidate'], row['outlier']) == (other['candidate'], other['outlier'])
    assert_same_detector(folder, alone)
    rows = [json.loads((f / 'results.json').read_text())['rows'] for f in (folder, alone)]
    for row, other in zip(*rows, strict=True):
        assert row['auroc'] == pytest.approx(other['auroc'], abs=1e-3)
    left = {p.name for p in folder.rglob('*') if p.name in ('checkpoints', 'shards')}
    assert left == set()
    assert [p for p in folder.rglob('*') if '.part' in p.name or '-tmp' in p.name] == []


def test_two_hosts_work_as_one_also_when_each_is_killed(alone, tmp_path):
    """Host 1 dies as it makes the second shard, host 0 at the detector's third checkpoint."""
    folder = beginning(alone, tmp_path)
    codes, said = launch(2, CHAIN, folder, AFTER, '1', 'shard', '2')
    assert codes == [2, -signal.SIGKILL], said[0]
    assert f'host 0 of 2 {LOST}' in said[0]
    assert (made(tmp_path, 'synthesise') / 'shards').exists()  # some, not all of the work
    codes, said = launch(2, CHAIN, folder, AFTER, '0', 'checkpoint', '3')
    assert codes[0] == -signal.SIGKILL, said
    assert codes[1] in (2, -signal.SIGABRT)  # by our message or, if it comes first, JAX's
    codes, said = launch(2, CHAIN, folder, AFTER, '-1', 'none', '1')
    assert codes == [0, 0], said
    log = (made(tmp_path, 'train_detector') / 'log.jsonl').read_text().splitlines()
    steps = [json.loads(line)['step'] for line in log]
    assert steps.count(4) == 1  # it went on from a checkpoint
    assert_same_work(tmp_path, alone)


@pytest.mark.slow
def test_four_hosts_train_as_one(alone, tmp_path):
    folder = beginning(alone, tmp_path)
    shutil.copytree(alone / 'artefacts/synthesise', tmp_path / 'artefacts/synthesise')
    codes, said = launch(4, CHAIN, folder, 'train_detector', '-1', 'none', '1')
    assert codes == [0] * 4, said
    assert_same_detector(tmp_path, alone)
