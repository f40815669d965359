"""The bench runs small, with and without something to stand beside."""

import functools
import importlib
import json

import jax.numpy as jnp
import pytest

from jaxood import bench, parallel
from jaxood.bench import lfdn, measure, scaling, stable_diffusion, unet
from jaxood.models.stable_diffusion import fresh
from jaxood.scores import SCORES

SMALL = ['--bank=400', '--queries=60', '--dim=12', '--rounds=1', '--steps=2', '--images=6']
TINY = {
    unet: dict(channels=8, multipliers=(1,), num_blocks=1, attention_sizes=()),
    lfdn: ((4, 8), 8, 1),
    stable_diffusion: {
        'text_encoder': fresh.text_config(
            vocab_size=20, positions=77, width=8, layers=1, heads=2, projection=8
        ),
        'unet': fresh.unet_config(size=4, channels=(8,), layers=1, heads=2, groups=2, width=8),
        'vae': fresh.vae_config(size=4, image_channels=3, channels=(8,), layers=1, groups=2),
    },
}
ROWS = {  # what each suite says, of small numbers
    'unet': ['training, small, batch 8', 'DDIM of 2 steps, small, batch 8'],
    'stable_diffusion': ['DDIM of 2 steps, 4 pixels, small, batch 8'],
    'lfdn': ['scoring at depth 3, small, 12 channels'],
    'knn': ['k=50, 400 x 12'],
    'loading': [
        'folder, JPEG 256 to 224, in memory',
        'folder, JPEG 256 to 224, streamed',
        '.npz of 32 x 32',
    ],
}


@pytest.fixture(autouse=True)
def _forgotten():
    """Flags outlive a call of `main`, which a process makes only once."""
    yield
    for name in bench.FLAGS:
        bench.FLAGS[name].unparse()


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """(suites, *flags) -> the JSON that is written; no PyTorch."""
    monkeypatch.setattr(measure, 'has', lambda *packages: False)
    monkeypatch.setitem(measure.SIDE, 'cpu', 64)
    monkeypatch.setattr(parallel, 'setup', functools.partial(parallel.setup, num_devices=1))
    for module, size in TINY.items():
        monkeypatch.setitem(module.SIZES, 'small', size)

    def measured(suites, *more):
        out = tmp_path / 'bench.json'
        assert bench.main(['bench', *SMALL, f'--suite={suites}', f'--out={out}', *more]) == 0
        return json.loads(out.read_text())

    return measured


def test_every_score_of_outputs_is_measured(measured, capsys):
    found = measured('scores')
    rows = {row['what']: row for row in found['suites']['scores']}
    for name, entry in SCORES.items():
        assert (f'{name}, score, s' in rows) == (entry.needs in ('logits', 'features'))
    assert all(row['ours'] > 0 and row['theirs'] is None for row in rows.values())
    assert found['peak_bytes'] > 2**20
    assert {'date', 'processor', 'cores', 'devices', 'versions', 'flags'} < set(found)
    assert 'knn, score, s' in capsys.readouterr().out


@pytest.mark.slow
def test_every_suite_says_images_a_second(measured):
    found = measured(','.join(ROWS), '--batch=8')
    for suite, whats in ROWS.items():
        rows = found['suites'][suite]
        assert [row['what'] for row in rows] == [f'{what}, images/s' for what in whats]
        assert all(row['ours'] > 0 for row in rows)
        assert all((row['share'] is None) == (suite == 'loading') for row in rows)


def test_every_suite_is_a_module():
    for name in bench.SUITES:
        assert callable(importlib.import_module(f'jaxood.bench.{name}').rows)


def test_an_earlier_run_stands_beside(measured, tmp_path, capsys):
    found = measured('knn')
    (row,) = found['suites']['knn']
    row['ours'] /= 2.0
    (tmp_path / 'old.json').write_text(json.dumps(found | {'cores': 1000}))
    measured('knn', f'--compare={tmp_path / "old.json"}')
    said = capsys.readouterr().out
    assert 'x earlier' in said
    assert 'the earlier run had other cores' in said
    assert bench.better(row, row['ours'] / 3.0) == pytest.approx(3.0)
    seconds = measure.row('fit', 's', 2.0, 3.0, 'theirs')
    assert seconds['ratio'] == 1.5
    assert bench.better(seconds, 8.0) == 4.0


@pytest.mark.parametrize('kind', scaling.KINDS)
def test_work_of_any_size_is_timed(kind, monkeypatch):
    monkeypatch.setattr(parallel, 'setup', functools.partial(parallel.setup, num_devices=1))
    assert 0.0 < scaling.KINDS[kind](600) < 60.0


def test_ours_and_theirs_take_turns():
    order = []
    a, b = measure.take_turns(lambda: order.append('a'), lambda: order.append('b'), 2)
    assert order == ['a', 'b'] * 3  # the first time warms up
    assert a >= 0
    assert b >= 0


def test_operations_are_counted_as_they_are():
    """2 n m k for a product of matrices, whatever its compiled form is called."""
    a, b = jnp.zeros((3, 5)), jnp.zeros((5, 7))
    assert measure.flops(measure.jax.jit(lambda a, b: a @ b), a, b) == 2 * 3 * 5 * 7


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--suite=scors'], "Did you mean 'scores'"),
        (['--suite=classifiers'], '--weights=CHECKPOINT'),
        (['--rouds=2'], "Did you mean 'rounds'"),
        (['--rounds=0'], '--rounds=0 must be at least 1'),
        (['--counts=10,many'], '--counts=many must be a whole number'),
        (['--compare=nowhere.json'], '--compare=nowhere.json is not there'),
        (['--compare=README.md'], 'is not a file that --out wrote'),
        (['scores'], "'scores' is not a flag"),
    ],
)
def test_flags_that_are_refused(more, message, capsys):
    assert bench.main(['bench', *more]) == 2
    assert message in capsys.readouterr().err
