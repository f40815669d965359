"""One device equals eight, jit equals pmap, and nothing compiles twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from jaxood import parallel
from jaxood.errors import UserError
from jaxood.rng import key_each
from jaxood.train import checkpoint
from jaxood.train.state import TrainState

LAYOUTS = [('jit', 1), ('jit', 8), ('pmap', 1), ('pmap', 8)]
every_layout = pytest.mark.parametrize(('mode', 'count'), LAYOUTS)


@every_layout
def test_what_is_replicated_comes_back(mode, count):
    devices = parallel.setup(mode, count)
    key = jax.random.key(5)
    tree = {'w': np.arange(6.0, dtype=np.float32).reshape(2, 3), 'step': np.int32(7), 'key': key}
    back = devices.unreplicate(devices.replicate(tree))
    np.testing.assert_array_equal(back['w'], tree['w'])
    assert back['step'].dtype == np.int32
    assert jax.random.key_data(back['key']).tolist() == jax.random.key_data(key).tolist()


@every_layout
def test_rows_are_split_and_gathered_in_order(mode, count):
    devices = parallel.setup(mode, count)
    rows = {'x': np.arange(48).reshape(16, 3), 'i': np.arange(16)}
    placed = devices.shard(rows)
    each = [shard.data.size for shard in placed['i'].addressable_shards]
    assert each == [16 // count] * count
    for name, value in devices.gather(placed).items():
        assert isinstance(value, np.ndarray)
        np.testing.assert_array_equal(value, rows[name])


def step(state, data, batch, key, *, axis_name=None):
    """Gradient descent on mean (w x_i - y_i + noise_i)², x_i looked up by its index."""

    def loss_fn(w):
        noise = jax.vmap(jax.random.normal)(key_each(key, batch['index']))
        return jnp.mean((w * data['x'][batch['index']] - batch['y'] + noise) ** 2)

    loss, grad = jax.value_and_grad(loss_fn)(state['w'])
    if axis_name is not None:
        loss, grad = jax.lax.pmean((loss, grad), axis_name)
    return {'w': state['w'] - 0.1 * grad}, {'loss': loss}


def train(devices, steps):
    rng = np.random.default_rng(0)
    data = devices.replicate({'x': rng.normal(size=32).astype(np.float32)})
    state = devices.replicate({'w': jnp.float32(0.5)})
    compiled, losses = devices.compile_step(step), []
    for n in range(steps):
        index = rng.permutation(32)[:16].astype(np.int32)
        batch = devices.shard({'index': index, 'y': rng.normal(size=16).astype(np.float32)})
        key = jax.random.fold_in(jax.random.key(0), n)
        state, metrics = compiled(state, data, batch, key)
        losses.append(metrics['loss'])
    return float(devices.unreplicate(state)['w']), jax.device_get(losses)


def matrix_step(state, data, batch, key, *, axis_name=None):
    """Adam on a matrix that is large enough to be split, and a vector that is not."""
    tx = optax.adam(1e-2)

    def loss_fn(params):
        return jnp.mean((batch['x'] @ params['w'] + params['b'] - batch['y']) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state['params'])
    updates, moments = tx.update(grads, state['moments'])
    return {'params': optax.apply_updates(state['params'], updates), 'moments': moments}, {
        'loss': loss
    }


def test_a_split_state_trains_as_a_whole_one(tmp_path):
    """... each device holds its part; a checkpoint of eight parts comes back on two, and on one."""
    rng = np.random.default_rng(0)
    params = {'w': rng.normal(size=(120, 1024)).astype(np.float32), 'b': np.zeros(1024, np.float32)}
    state = jax.device_get({'params': params, 'moments': optax.adam(1e-2).init(params)})
    batches = [
        {'x': rng.normal(size=(16, 120)), 'y': rng.normal(size=(16, 1024))} for _ in range(4)
    ]

    def go_on(devices, state, batches):
        update, losses = devices.compile_step(matrix_step), []
        for batch in jax.tree.map(np.float32, batches):
            state, metrics = update(state, None, devices.shard(batch), jax.random.key(0))
            losses.append(float(metrics['loss']))
        return state, losses

    whole, split = parallel.setup('jit', 8), parallel.setup('jit', 8, shard_state=True)
    want, losses = go_on(whole, whole.place_state(state), batches)
    got, split_losses = go_on(split, split.place_state(state), batches)
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
    for part in (got['params']['w'], got['moments'][0].mu['w']):
        assert {shard.data.shape for shard in part.addressable_shards} == {(120, 128)}
    assert got['params']['b'].addressable_shards[0].data.shape == (1024,)
    np.testing.assert_allclose(parallel.fetch(got['params']['w']), want['params']['w'], atol=1e-4)

    saving = checkpoint.Checkpoints(epath.Path(tmp_path))
    saving.save(1, TrainState(np.array(1), got['params'], None, got['moments'], {}))
    for count in (2, 1):
        fewer = parallel.setup('jit', count, shard_state=True)
        empty = fewer.place_state(jax.tree.map(np.zeros_like, state))
        back = saving.restore(TrainState(np.array(1), empty['params'], None, empty['moments'], {}))
        w = back.params['w']
        assert {shard.data.shape for shard in w.addressable_shards} == {(120, 1024 // count)}
        np.testing.assert_array_equal(parallel.fetch(w), parallel.fetch(got['params']['w']))
    saving.close()


def test_a_step_is_the_same_on_any_layout():
    expected_w, expected_losses = train(parallel.setup('jit', 1), 5)
    assert np.shape(expected_losses) == (5,)
    for mode, count in LAYOUTS[1:]:
        w, losses = train(parallel.setup(mode, count), 5)
        assert w == pytest.approx(expected_w, rel=1e-5)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)


@every_layout
def test_the_second_call_compiles_nothing(mode, count, compiled):
    devices = parallel.setup(mode, count)
    update = devices.compile_step(step)
    state = devices.replicate({'w': jnp.float32(0.5)})
    data = devices.replicate({'x': np.ones(32, np.float32)})
    keys = [jax.random.key(n) for n in range(3)]
    for n in range(3):
        compiled.clear()
        batch = {'index': np.arange(16, dtype=np.int32), 'y': np.full(16, n, np.float32)}
        state, _ = update(state, data, devices.shard(batch), keys[n])
        assert bool(compiled) == (n == 0)


@every_layout
def test_rows_meet_their_function_in_fixed_chunks(mode, count):
    """f(rows) of 21 rows in chunks of 8: order kept, padding gone, one program."""
    devices = parallel.setup(mode, count)
    seen = []

    def f(shared, rows):
        seen.append(rows['x'].shape)  # at tracing only
        return {'y': shared['w'] * rows['x'] + rows['index'][:, None]}

    compiled = devices.compile_rows(f)
    rows = {'x': np.random.default_rng(0).normal(size=(21, 3)).astype(np.float32)}
    rows['index'] = np.arange(21, dtype=np.int32)
    cuts = [{k: v[at : at + 8] for k, v in rows.items()} for at in range(0, 21, 8)]
    chunks = [parallel.pad_rows(cut, 8) for cut in cuts]
    shared = devices.replicate({'w': jnp.float32(2.0)})
    parts = list(parallel.map_rows(devices, compiled, shared, chunks))
    assert [len(part['y']) for part in parts] == [8, 8, 5]
    got = np.concatenate([part['y'] for part in parts])
    np.testing.assert_allclose(got, 2.0 * rows['x'] + np.arange(21)[:, None], rtol=1e-6)
    assert len(seen) == 1


def test_chunks_are_fetched_one_ahead():
    """A million rows never lie in memory together: chunk n + 2 is read after result n is taken."""
    devices = parallel.setup('jit', 1)
    read = []

    def chunks():
        for n in range(5):
            read.append(n)
            yield np.full((2, 1), n), 2

    results = parallel.map_rows(devices, devices.compile_rows(lambda s, x: x), None, chunks())
    for n, _ in enumerate(results):
        assert len(read) <= n + 2
    assert read == [0, 1, 2, 3, 4]


def test_padding_repeats_the_last_row():
    rows, n = parallel.pad_rows({'x': np.array([[1], [2], [3]])}, 5)
    assert n == 3
    assert rows['x'].ravel().tolist() == [1, 2, 3, 3, 3]


@pytest.mark.parametrize(('count', 'wanted', 'size'), [(1, 7, 7), (8, 7, 8), (8, 8, 8), (8, 9, 16)])
def test_batches_are_rounded_up_to_the_devices(count, wanted, size):
    assert parallel.setup('jit', count).batch_size(wanted) == size


def test_devices_are_keys_of_memoised_programs():
    assert parallel.setup('jit', 4) == parallel.setup('jit', 4)
    assert hash(parallel.setup('jit', 4)) == hash(parallel.setup('jit', 4))
    assert len({parallel.setup(mode, count) for mode, count in LAYOUTS}) == 4


def test_impossible_devices():
    with pytest.raises(UserError, match="config.parallel.mode='pjit' .* Did you mean 'jit'"):
        parallel.setup('pjit')
    with pytest.raises(UserError, match=r"shard_state splits states under .*mode='jit'"):
        parallel.setup('pmap', shard_state=True)
    for count in (0, 9):
        with pytest.raises(UserError, match=f'num_devices={count}, but this machine has 8'):
            parallel.setup('jit', count)
    assert parallel.setup('jit').count == 8
