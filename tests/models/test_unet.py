import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxood.models.denoisers import DENOISERS, UNet, unet
from jaxood.rng import key_each

TINY = {'channels': 8, 'multipliers': (1, 2), 'num_blocks': 1, 'attention_sizes': (4,)}
tiny = UNet(num_classes=3, **TINY)
one_level = UNet(num_classes=3, channels=8, multipliers=(1,), num_blocks=1)  # compiles fast


def count(model, size):
    t, image = jnp.ones(1, jnp.int32), jnp.zeros((1, size, size, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), image, t)
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def rows(count=4, size=8):
    """x, t, condition, keys: a label, the null token, a mixture, and a label again."""
    x = jax.random.normal(jax.random.key(0), (count, size, size, 3))
    condition = jnp.array(
        [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.4, 0.6, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    )
    return x, jnp.array([1, 30, 500, 1000]), condition, key_each(jax.random.key(1), jnp.arange(4))


@functools.cache
def variables(model=tiny):
    """Random parameters: initial ones hold zeros, and behind a zero nothing has a say."""
    x, t, condition, _ = rows()
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t, condition)
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    scale = lambda a: np.sqrt(a.shape[-1] / a.size)  # 1 / sqrt(fan in)
    drawn = [jnp.asarray(rng.normal(size=a.shape, scale=scale(a)), a.dtype) for a in leaves]
    return jax.tree.unflatten(structure, drawn)


apply = jax.jit(tiny.apply)


def test_it_has_the_published_number_of_parameters():
    """DDPM, App. B: 35.7 M for CIFAR-10, 114 M for LSUN and CelebA-HQ at 256x256."""
    assert count(UNet(), 32) == 35_746_307
    assert count(UNet(multipliers=(1, 1, 2, 2, 4, 4)), 256) == 113_673_219


def test_it_adds_one_embedding_a_class_and_the_null_token():
    x, t, condition, _ = rows()
    sizes = jax.eval_shape(tiny.init, jax.random.key(0), x, t, condition)
    added = sum(a.size for a in jax.tree.leaves(sizes)) - count(UNet(**TINY), 8)
    assert added == 4 * (4 * 8)


def test_untrained_it_predicts_zero():
    x, t, condition, _ = rows()
    key = jax.random.key(0, impl='rbg')  # compiles faster than threefry
    got, _ = jax.jit(one_level.init_with_output)(key, x, t, condition)
    np.testing.assert_array_equal(got, np.zeros_like(x))


def test_it_listens_to_image_time_and_condition_row_by_row():
    x, t, condition, _ = rows()
    y = apply(variables(), x, t, condition)
    changes = [(x.at[1].add(0.1), t, condition), (x, t.at[1].add(1), condition)]
    changes.append((x, t, condition.at[1].set(condition[0])))
    for change in changes:
        difference = np.abs(apply(variables(), *change) - y).max((1, 2, 3))
        assert difference[1] > 1e-3
        np.testing.assert_allclose(difference[[0, 2, 3]], 0.0, atol=1e-5)


def test_a_mixed_label_is_a_mixed_embedding():
    """π = λ e_0 + (1 - λ) e_1 does what a class does whose embedding is λ E_0 + (1 - λ) E_1."""
    x, t, _, _ = rows()
    ratio = jnp.array([0.3, 0.5, 0.7, 1.0])[:, None]
    e = jnp.eye(4)
    mixed = apply(variables(), x, t, ratio * e[0] + (1 - ratio) * e[1])
    for row in range(4):
        moved = jax.tree.map(lambda a: a, variables())
        table = moved['params']['class_embedding']
        blend = ratio[row] * table[0] + (1 - ratio[row]) * table[1]
        moved['params']['class_embedding'] = table.at[2].set(blend)
        as_class = apply(moved, x, t, jnp.tile(e[2], (4, 1)))
        np.testing.assert_allclose(mixed[row], as_class[row], atol=1e-4)
    pure = apply(variables(), x, t, jnp.tile(e[0], (4, 1)))
    np.testing.assert_array_equal(mixed[3], pure[3])  # λ = 1 is the one-hot, bit for bit


def test_rows_do_not_depend_on_their_batch():
    x, t, condition, keys = rows()
    order = np.array([2, 0])
    whole = apply(variables(), x, t, condition, keys=keys)
    part = apply(variables(), x[order], t[order], condition[order], keys=keys[order])
    np.testing.assert_allclose(part, whole[order], atol=1e-5)


def test_dropout_acts_with_keys_only_and_follows_them():
    x, t, condition, keys = rows()
    plain = apply(variables(), x, t, condition)
    dropped = apply(variables(), x, t, condition, keys=keys)
    assert np.all(np.abs(dropped - plain).max((1, 2, 3)) > 1e-3)
    np.testing.assert_array_equal(apply(variables(), x, t, condition, keys=keys), dropped)
    otherwise = apply(variables(), x, t, condition, keys=keys[::-1])
    assert np.all(np.abs(dropped - otherwise).max((1, 2, 3)) > 1e-3)


def test_each_block_and_row_has_its_own_dropout_key(monkeypatch):
    x, t, condition, keys = rows()
    params, seen = variables(one_level), []
    record = lambda h, rate, keys: (seen.append(jax.random.key_data(keys)), h)[1]
    monkeypatch.setattr(unet, 'dropout', record)
    one_level.apply(params, x, t, condition, keys=keys)
    assert len(seen) == 1 + 2 + 2  # blocks down, in the middle, up
    assert len(np.unique(np.concatenate(seen), axis=0)) == 5 * len(x)


def test_jit_equals_no_jit_and_compiles_once():
    x, t, condition, _ = rows()
    traces = []

    @jax.jit
    def run(variables, *inputs):
        traces.append(inputs)
        return one_level.apply(variables, *inputs)

    params = variables(one_level)
    once = run(params, x, t, condition)
    run(params, x + 1.0, t + 1, condition[::-1])
    assert len(traces) == 1
    np.testing.assert_allclose(one_level.apply(params, x, t, condition), once, atol=1e-5)


def test_bfloat16_is_close_and_leaves_parameters_and_output_in_float32():
    x, t, condition, _ = rows()
    half = UNet(num_classes=3, dtype=jnp.bfloat16, **TINY)
    exact = apply(variables(), x, t, condition)
    got = jax.jit(half.apply)(variables(), x, t, condition)
    assert got.dtype == jnp.float32
    error = jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact)
    assert 1e-5 < error < 0.03
    sizes = jax.eval_shape(half.init, jax.random.key(0), x, t, condition)
    assert {a.dtype for a in jax.tree.leaves(sizes)} == {jnp.dtype('float32')}


def test_remat_changes_neither_names_nor_gradients():
    x, t, condition, keys = rows()
    plain, remat = one_level, one_level.clone(remat=True)
    gradient = lambda model: jax.jit(
        jax.grad(lambda v: jnp.mean(model.apply(v, x, t, condition, keys=keys) ** 2))
    )
    expected, got = gradient(plain)(variables(plain)), gradient(remat)(variables(plain))
    assert jax.tree.structure(variables(remat)) == jax.tree.structure(variables(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected)) > 1e-2


@pytest.mark.parametrize('size', [(7, 5), (28, 28), (1, 1)])
def test_any_size_works(size):
    """Three levels of 7x5 are 7x5, 4x3 and 2x2."""
    model = UNet(channels=8, multipliers=(1, 1, 1), num_blocks=1, out_channels=2)
    x = jnp.zeros((1, *size, 3))
    got = jax.eval_shape(model.init_with_output, jax.random.key(0), x, jnp.ones(1, jnp.int32))[0]
    assert got.shape == (1, *size, 2)


def test_heads_split_channels_and_add_no_parameters():
    assert count(UNet(heads=4, **TINY), 8) == count(UNet(**TINY), 8)


@pytest.mark.parametrize(
    ('num_classes', 'condition', 'message'),
    [
        (3, None, 'num_classes=3, and condition is missing'),
        (None, jnp.ones((4, 4)) / 4, 'num_classes=None, and condition is given'),
        (3, jnp.ones((4, 3)) / 3, r'need \(4, 4\)'),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(num_classes, condition, message):
    x, t, _, _ = rows()
    model = UNet(num_classes=num_classes, **TINY)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), x, t, condition)


def test_the_table_names_it():
    assert DENOISERS['unet'] is UNet
