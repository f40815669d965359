"""What programs take, and what is said when a device is full."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxood import main, memory, parallel
from jaxood.errors import UserError


def program(w, x):
    """Holds w and x, and needs x w meanwhile: 4 · B · 512 bytes."""
    return jnp.sum(jnp.sort(x @ w, axis=-1)[:, :3])


SHAPES = jax.ShapeDtypeStruct((64, 512), np.float32), jax.ShapeDtypeStruct((256, 64), np.float32)


def test_what_a_program_takes():
    found = memory.need(jax.jit(program), *SHAPES)
    assert found.held == pytest.approx(4 * (64 * 512 + 256 * 64 + 1), abs=64)
    assert found.meanwhile >= 4 * 256 * 512
    assert found.flops >= 2 * 256 * 64 * 512
    twice = memory.need(jax.jit(program), SHAPES[0], jax.ShapeDtypeStruct((512, 64), np.float32))
    assert twice.meanwhile == pytest.approx(2 * found.meanwhile, rel=0.1)


@pytest.mark.parametrize(
    ('limit', 'rows'), [(1100, 96), (1500, 496), (10**6, 496), (1000, 8), (0, 8)]
)
def test_rows_that_would_fit(monkeypatch, limit, rows):
    """1000 rows need 1000 bytes meanwhile, beside 1000 that are held anyway; on 8 devices."""
    monkeypatch.setattr(memory, 'limit', lambda: limit / 0.9)
    assert memory.fitting(1000, 8, memory.Need(1000, 1000, 0.0)) == rows
    assert memory.fitting(1000, 8, None) == 496


def full(*arguments):
    raise jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.'
    )


def test_a_full_device_says_how_much_would_fit(monkeypatch):
    ask = functools.partial(memory.need, jax.jit(program), *SHAPES)
    found = ask()
    monkeypatch.setattr(memory, 'limit', lambda: (found.held + found.meanwhile / 4) / 0.9)
    match = (
        r'train: a device is out of memory with config.a.batch_size=256.* About 6[0-4] would fit'
    )
    with (
        pytest.raises(UserError, match=match),
        memory.watched('train', 'config.a.batch_size', 256, 1, ask),
    ):
        full()
    with (
        pytest.raises(UserError, match='=256. About 128 would fit: set config.a.batch_size'),
        memory.watched('train', 'config.a.batch_size', 256, 1, full),
    ):
        full()
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match='another'),
        memory.watched('', '', 1, 1, ask),
    ):
        raise jax.errors.JaxRuntimeError('INTERNAL: another')


def test_a_pass_over_images_names_its_setting():
    devices = parallel.setup('jit', 2)
    full.lower = jax.jit(lambda shared, x: x).lower
    with pytest.raises(UserError, match='parallel.inference_batch=8.* About 4 would fit'):
        list(parallel.map_rows(devices, full, None, [(np.zeros((8, 3), np.float32), 8)]))


def test_an_estimate_tries_one_batch_and_leaves_nothing(tmp_path, capsys):
    config = tiny.config(
        arms=dict(none=dict(outliers=dict(name='none'), detector=dict(name='plain'))),
        report__arm='none',
        backbone=dict(name='cnn', widths=(4, 8)),
        parallel__num_devices=1,
    )
    main.execute(config, str(tmp_path), ['train_detector', 'score'], estimate=True)
    said = capsys.readouterr().err
    assert re.search(r'train_detector none/0: \d+\.\d MB of .* for 16 images at once', said)
    assert re.search(r'GFLOP a device.* images/s; 12 steps in about \d+ s', said)
    assert 'score none/0: can be tried when train_detector is there' in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', 'format.json']
