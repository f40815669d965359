"""Whether an image costs the same time, and a run the same memory, however many there are.

Each figure is taken in a process of its own, whose peak memory is what the system says.
"""

import functools
import json
import subprocess
import sys
import tempfile
import time

import numpy as np

from jaxood import artefacts, machine, parallel
from jaxood.bench import measure
from jaxood.data.examples import Examples, Lazy
from jaxood.errors import UserError

SHAPE, ROWS, WIDTH = (32, 32, 3), 256, 64


def rows(flags):
    counts = [int(count) for count in flags.counts]
    for what in KINDS:
        first = None
        for count in counts:
            found = _apart(what, count)
            each = count / found['seconds']
            yield measure.row(f'{what}, {count:,} images', 'images/s', each)
            yield measure.row(f'{what}, {count:,} images, memory', 'MiB', found['peak'] / 2**20)
            first = first or found
        if len(counts) > 1:
            yield measure.row(
                f'{what}, {counts[-1]:,} over {counts[0]:,}, memory',
                'x',
                found['peak'] / first['peak'],
            )


def _apart(what, count) -> dict:
    command = [sys.executable, '-m', 'jaxood.bench.scaling', what, str(count)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise UserError(f'scaling, {what}: {found.stderr.strip()[-2000:]}')
    return json.loads(found.stdout.splitlines()[-1])


def scoring(count) -> float:
    """Seconds of a small network's pass over images that come from files, and of MSP and energy."""
    import jax

    from jaxood.models import Classifier
    from jaxood.models.backbones.cnn import CNN
    from jaxood.models.heads import Linear
    from jaxood.models.initial import compile_init
    from jaxood.scores import SCORES
    from jaxood.stages.parts import networks

    model = Classifier(CNN(widths=(8, 16)), Linear(10))
    init = compile_init(functools.partial(model.init, train=False))
    variables = jax.device_get(init(jax.random.key(0), np.zeros((1, *SHAPE), np.float32)))
    look = {'mean': (0.5,), 'std': (0.5,)}
    network = networks.Network(model, variables, look, 'scaling', parallel.setup(), ROWS)

    def score(count, store):
        outputs = network.features(store, _images(count), 'scaling')
        for name in ('msp', 'energy'):
            params = SCORES[name].fit({}, network.head)
            for part in network.outside(SCORES[name].score, params, outputs):
                part.sum()

    return _timed(score, count)


def knn(count) -> float:
    """Seconds of the distances of feature vectors to a bank of 10,000."""
    from jaxood.scores import SCORES
    from jaxood.stages.parts import networks

    rng = np.random.default_rng(0)
    bank = rng.normal(size=(10_000, WIDTH)).astype(np.float32)
    params = SCORES['knn'].fit({'features': bank, 'labels': np.zeros(len(bank), np.int32)}, {})
    head = {'kernel': np.zeros((WIDTH, 2), np.float32), 'bias': np.zeros(2, np.float32)}
    network = networks.Network(None, {'params': {'head': head}}, {}, '', parallel.setup(), ROWS)

    def score(count, store):
        store.root.mkdir(parents=True)
        place = store.root / f'{count}.npy'
        blocks = (rng.normal(size=(min(1000, count), WIDTH)) for _ in range(-(-count // 1000)))
        artefacts.save_rows(place, (b.astype(np.float32) for b in blocks), count)
        outputs = {'features': artefacts.load_rows(place)}
        outputs['logits'] = np.broadcast_to(np.float32(0), (count, 2))
        for part in network.outside(SCORES['knn'].score, params, outputs):
            part.sum()

    return _timed(score, count)


def synthesis(count) -> float:
    """Seconds of the stage `synthesise` with a strategy that costs nothing itself."""
    from jaxood.bench import quickstart
    from jaxood.main import load_config
    from jaxood.stages import common
    from jaxood.stages import synthesise as stage

    config = load_config(str(quickstart.CONFIG))
    with config.unlocked():
        config.outliers = dict(name='uniform_noise', count=0, shard_size=1024)
        config.filter = dict(name='none')
    data, devices = common.load_data(config), parallel.setup()

    def make(count, store):
        config.outliers.count = count
        artefact = store.find('synthesise', str(count))
        stage.run(
            common.Context(config, data, devices, artefact, {}, store, 'scaling', runs=[], repro={})
        )

    return _timed(make, count)


def _images(count):
    """Images that are computed as they are asked for, as from files."""
    decode = lambda i: np.full(SHAPE, i % 256, np.uint8)
    marks = [''] * count
    return Examples(Lazy(decode, marks, np.arange(count), SHAPE, look=str(count)))


def _timed(f, count) -> float:
    """Seconds of f(count, an empty store), once what it needs is compiled."""
    with tempfile.TemporaryDirectory() as place:
        f(ROWS, artefacts.Store(artefacts.place(place) / 'first'))
        started = time.perf_counter()
        f(count, artefacts.Store(artefacts.place(place) / 'second'))
        return time.perf_counter() - started


KINDS = {'scoring': scoring, 'knn': knn, 'synthesis': synthesis}

if __name__ == '__main__':
    seconds = KINDS[sys.argv[1]](int(sys.argv[2]))
    print(json.dumps({'seconds': seconds, 'peak': machine.peak()}))
