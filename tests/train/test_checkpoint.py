"""What is saved comes back to the bit, on any number of devices; a full disk is an OSError."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from jaxood import parallel
from jaxood.train import checkpoint, state


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def trained(steps=3, *, ema=True):
    """A state that has seen a few gradients, with everything that a state can hold."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    params = {
        'dense': {'kernel': jax.random.normal(jax.random.key(0), (4, 3)), 'bias': jnp.ones(3)}
    }
    extra = {'batch_stats': {'mean': jnp.arange(3.0)}, 'scale': jnp.float32(16.0)}
    now = state.create(params, tx, extra, ema=ema)
    for n in range(steps):
        grads = jax.tree.map(lambda x, n=n: x * (n + 0.1), now.params)
        updates, opt_state = tx.update(grads, now.opt_state, now.params)
        now = now._replace(
            step=now.step + 1,
            params=optax.apply_updates(now.params, updates),
            opt_state=opt_state,
        )
    return now


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('ema', [True, False])
def test_a_state_comes_back(folder, ema):
    now = trained(ema=ema)
    saving = checkpoint.Checkpoints(folder)
    saving.save(3, now)
    saving.close()
    back = checkpoint.Checkpoints(folder).restore(trained(0, ema=ema))
    assert isinstance(back, state.TrainState)
    assert_same(back, now)


def test_nothing_saved_is_nothing_restored(folder):
    assert checkpoint.Checkpoints(folder / 'new').restore(trained(0)) is None


def test_the_latest_is_kept_and_no_other(folder):
    saving = checkpoint.Checkpoints(folder)
    for steps in (1, 2, 3):
        saving.save(steps, trained(steps))
    saving.close()
    assert_same(checkpoint.Checkpoints(folder).restore(trained(0)), trained(3))
    assert [p.name for p in folder.iterdir()] == ['3']


def test_an_unfinished_save_does_not_count(folder):
    """A kill leaves a folder with a name of its own behind; the one before is taken."""
    saving = checkpoint.Checkpoints(folder)
    saving.save(2, trained(2))
    saving.close()
    (folder / '4.orbax-checkpoint-tmp' / 'default').mkdir(parents=True)
    again = checkpoint.Checkpoints(folder)
    assert int(again.restore(trained(0)).step) == 2
    again.save(4, trained(4))
    assert int(again.restore(trained(0)).step) == 4


@pytest.mark.parametrize(('mode', 'count'), [('jit', 8), ('pmap', 8)])
def test_a_state_moves_between_devices(folder, mode, count):
    """Saved from eight devices, restored on one, and the other way round."""
    devices, one = parallel.setup(mode, count), parallel.setup('jit', 1)
    saving = checkpoint.Checkpoints(folder)
    saving.save(1, devices.unreplicate(devices.replicate(trained(1))))
    back = saving.restore(trained(0))
    assert_same(back, trained(1))
    assert_same(devices.unreplicate(devices.replicate(back)), trained(1))
    assert_same(one.unreplicate(one.replicate(back)), trained(1))


def test_weights_come_back_on_one_device(folder):
    devices = parallel.setup('jit', 8)
    weights = {'params': trained(2).params, 'batch_stats': {'mean': np.arange(3, dtype=np.float32)}}
    checkpoint.save_weights(folder / 'w', devices.replicate(weights))
    back = checkpoint.load_weights(folder / 'w')
    assert_same(back, weights)
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(back))
    checkpoint.save_weights(folder / 'w', {'params': {'a': jnp.zeros(2)}})  # in place of the old
    assert_same(checkpoint.load_weights(folder / 'w'), {'params': {'a': jnp.zeros(2)}})


def test_a_full_disk_is_told_before_orbax_finds_out(folder, monkeypatch, capfd):
    now, saving = trained(1), checkpoint.Checkpoints(folder / 'c')

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'posix_fallocate', full)
    for save in (lambda: saving.save(1, now), lambda: checkpoint.save_weights(folder / 'w', now)):
        with pytest.raises(OSError, match='No space left') as e:
            save()
        assert e.value.errno == errno.ENOSPC
        assert e.value.filename in (str(folder), str(folder / 'c'))
    assert [p.name for p in folder.iterdir()] == ['c']
    monkeypatch.undo()
    saving.save(1, now)
    assert_same(saving.restore(trained(0)), now)
    assert capfd.readouterr().err == ''


def test_orbaxs_error_of_a_full_disk_is_the_systems(folder, monkeypatch):
    """TensorStore quotes the system's number in a ValueError (seen with a full tmpfs)."""

    def full(*args, **kwargs):
        raise ValueError(
            'RESOURCE_EXHAUSTED: Error writing "w/0" in OCDBT database: Failed to write 141519 '
            "bytes to file 17: No space left on device [os_error_code='28']"
        )

    saving = checkpoint.Checkpoints(folder)
    monkeypatch.setattr(saving.manager, 'save', full)
    with pytest.raises(OSError, match='No space left on device') as e:
        saving.save(1, trained(1))
    assert e.value.errno == errno.ENOSPC

    def defect(*args, **kwargs):
        raise ValueError('a tree of another kind')

    monkeypatch.setattr(saving.manager, 'save', defect)
    with pytest.raises(ValueError, match='another kind'):
        saving.save(1, trained(1))
