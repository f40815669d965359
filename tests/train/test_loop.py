"""There is one loop: it resumes to the bit, it stops at a NaN, and it knows how fast it is."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from jaxood import parallel
from jaxood.errors import UserError
from jaxood.rng import key_each
from jaxood.train import loop, state

ROWS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def loss_fn(params, extra, data, batch, key, step):
    """Least squares with noise from each row's own key; `extra` counts the rows it has seen."""
    x = data[batch['index']]
    noise = jax.vmap(jax.random.normal)(key_each(key, batch['index']))
    loss = jnp.mean((x @ params['w'] - x[:, 0] + 0.1 * noise) ** 2)
    extra = {'mean': 0.9 * extra['mean'] + 0.1 * jnp.mean(x)}
    return loss, (extra, {'loss': loss, 'noise': jnp.mean(noise)})


def feed(first, size=8):
    """Batch n is a function of n."""
    n = first
    while True:
        index = np.random.default_rng((0, n)).permutation(len(ROWS))[:size]
        yield {'index': index.astype(np.int32)}
        n += 1


def start(tx, ema=True):
    return state.create({'w': jnp.zeros(3)}, tx, {'mean': jnp.float32(0.0)}, ema=ema)


TX = optax.adam(0.05)


@functools.cache
def compile_step(mode, count, loss_fn, parts=1):
    step = functools.partial(
        loop.train_step, loss_fn=loss_fn, tx=TX, accumulate=parts, ema_limit=0.99
    )
    return parallel.setup(mode, count).compile_step(step)


def run(folder, *, steps, mode='jit', count=1, parts=1, loss_fn=loss_fn, feed=feed, **options):
    """Trains to `steps`; `folder` may hold a checkpoint of an earlier call."""
    devices = parallel.setup(mode, count)
    return loop.fit(
        start(TX),
        compile_step(mode, count, loss_fn, parts),
        devices.replicate(ROWS),
        feed,
        jax.random.key(1),
        steps=steps,
        devices=devices,
        folder=epath.Path(folder),
        what='test',
        images_per_step=8,
        **({'log_every': 2, 'checkpoint_every': 5} | options),
    )


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_one_step_is_what_it_says():
    """Gradient step, average of the weights, and the gradient's norm, against autodiff by hand."""
    tx = optax.sgd(0.5)
    before, batch, key = start(tx)._replace(step=jnp.int32(90)), next(feed(0)), jax.random.key(1)
    after, metrics = loop.train_step(
        *(before, ROWS, batch, key), loss_fn=loss_fn, tx=tx, ema_limit=0.9999
    )
    key = jax.random.fold_in(key, 90)
    loss = lambda w: loss_fn({'w': w}, before.extra, ROWS, batch, key, 90)[0]
    value, grad = jax.value_and_grad(loss)(before.params['w'])
    np.testing.assert_allclose(after.params['w'], -0.5 * grad, rtol=1e-6)
    np.testing.assert_allclose(after.ema['w'], 0.09 * -0.5 * grad, rtol=1e-5)  # 1 - 91/100
    assert float(metrics['loss']) == pytest.approx(float(value), rel=1e-6)
    assert float(metrics['grad_norm']) == pytest.approx(float(jnp.linalg.norm(grad)), rel=1e-6)
    assert int(after.step) == 91
    assert float(after.extra['mean']) == pytest.approx(0.1 * ROWS[batch['index']].mean(), rel=1e-5)


def test_without_a_limit_there_is_no_average():
    tx = optax.sgd(0.5)
    after, _ = loop.train_step(
        start(tx, ema=False), ROWS, next(feed(0)), jax.random.key(1), loss_fn=loss_fn, tx=tx
    )
    assert after.ema is None


@pytest.mark.parametrize('stopped_at', [1, 5, 11])
def test_stopped_and_resumed_it_ends_with_the_same_bits(tmp_path, stopped_at):
    """Checkpoints at 5 and 10 of 12 steps; batches and keys are those of the step's number."""
    straight, facts = run(tmp_path / 'straight', steps=12)

    class Killed(BaseException):
        pass

    def interrupted(first):
        for n, batch in enumerate(feed(first), first):
            if n == stopped_at:
                raise Killed
            yield batch

    with pytest.raises(Killed):
        run(tmp_path / 'stopped', steps=12, feed=interrupted)
    asked = []

    def resumed(first):
        asked.append(first)
        return feed(first)

    again, facts_again = run(tmp_path / 'stopped', steps=12, feed=resumed)
    assert asked == [stopped_at // 5 * 5]
    assert bits(again) == bits(straight)
    assert facts_again['loss'] == facts['loss']


@pytest.mark.parametrize(('mode', 'count'), [('jit', 8), ('pmap', 1), ('pmap', 8)])
def test_layouts_agree(tmp_path, mode, count):
    (one, _), (other, _) = (
        run(tmp_path / '1', steps=5),
        run(tmp_path / 'n', steps=5, mode=mode, count=count),
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(('mode', 'count', 'parts'), [('jit', 1, 4), ('jit', 2, 2), ('pmap', 2, 4)])
def test_parts_of_a_batch_add_up_to_it(tmp_path, mode, count, parts):
    """One update and one line of the log a batch, from the mean of its parts' gradients."""
    whole, facts = run(tmp_path / 'whole', steps=5)
    split, same = run(tmp_path / 'parts', steps=5, mode=mode, count=count, parts=parts)
    np.testing.assert_allclose(split.params['w'], whole.params['w'], atol=1e-5)
    np.testing.assert_allclose(split.ema['w'], whole.ema['w'], atol=1e-5)
    assert int(split.step) == int(optax.tree.get(split.opt_state, 'count')) == 5
    for name in ('loss', 'noise', 'grad_norm'):
        assert same[name] == pytest.approx(facts[name], rel=1e-4, abs=1e-5)


def test_a_run_that_is_finished_is_left_alone(tmp_path):
    first, _ = run(tmp_path, steps=10, checkpoint_every=9)
    again, _ = run(tmp_path, steps=10, checkpoint_every=9)  # its checkpoint is at 9
    assert bits(first) == bits(again)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_nan_stops_the_run_and_names_the_steps(tmp_path, bad):
    """At step 8 the loss is not finite; noticed at the next report; the checkpoint of 5 stays."""

    def poisoned(params, extra, data, batch, key, step):
        loss, (extra, metrics) = loss_fn(params, extra, data, batch, key, step)
        loss = jnp.where(step == 7, bad, loss)  # counts the updates before it
        return loss, (extra, metrics | {'loss': loss})

    for _ in range(2):  # the second call goes on from the checkpoint, and finds the same
        message = rf'test: loss is {bad} at step 8 \(checked at step 10\).*learning_rate'
        with pytest.raises(UserError, match=message):
            run(tmp_path, steps=12, loss_fn=poisoned, log_every=10)
        assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['5']


def test_a_nan_in_the_gradient_alone_is_seen(tmp_path):
    def kink(params, extra, data, batch, key, step):
        loss, rest = loss_fn(params, extra, data, batch, key, step)
        # sqrt's derivative at 0 is infinite; times 0 it is NaN, the value is 0
        return loss + 0.0 * jnp.sum(jnp.sqrt(jnp.abs(params['w'] * 0.0))), rest

    with pytest.raises(UserError, match='grad_norm is nan at step 1 '):
        run(tmp_path, steps=4, loss_fn=kink)


def test_the_log_holds_means_between_reports(tmp_path):
    _, facts = run(tmp_path / 'often', steps=6, log_every=1)
    run(tmp_path / 'seldom', steps=6, log_every=3)
    often, seldom = (
        [json.loads(line) for line in (tmp_path / k / 'log.jsonl').read_text().splitlines()]
        for k in ('often', 'seldom')
    )
    assert [row['step'] for row in often] == [1, 2, 3, 4, 5, 6]
    # 5 is where a checkpoint is saved: what it would have to remember is reported before
    assert [row['step'] for row in seldom] == [3, 5, 6]
    losses = [row['loss'] for row in often]
    expected = [np.mean(losses[:3]), np.mean(losses[3:5]), losses[5]]
    np.testing.assert_allclose([row['loss'] for row in seldom], expected, rtol=1e-12)
    assert facts['loss'] == losses[-1]
    assert set(often[0]) == {'step', 'loss', 'noise', 'grad_norm', 'images_per_s'}


def test_the_second_step_compiles_nothing(tmp_path, compiled):
    compile_step.cache_clear()
    run(tmp_path, steps=6)
    assert compiled.count('jit(train_step)') == 1


def test_speed_leaves_out_compilation_and_saving(tmp_path, monkeypatch):
    """A clock that steps and saves move: the first step takes 100 s, others 2 s, a save 50 s."""
    clock = [0.0]
    monkeypatch.setattr(loop.time, 'monotonic', lambda: clock[0])
    save = loop.Checkpoints.save

    def slow_save(self, *args):
        clock[0] += 50.0
        save(self, *args)

    def batches(first):
        for n, batch in enumerate(feed(first), first):
            clock[0] += 100.0 if n == 0 else 2.0
            yield batch

    monkeypatch.setattr(loop.Checkpoints, 'save', slow_save)
    _, facts = run(tmp_path, steps=12, feed=batches)
    assert facts['images_per_s'] == 4.0  # 8 images in 2 s
