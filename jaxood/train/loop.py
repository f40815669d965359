"""The training loop: there is one."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxood import console, hosts, memory
from jaxood.errors import UserError
from jaxood.parallel import Devices, Probed, fetch, probe
from jaxood.train.checkpoint import Checkpoints
from jaxood.train.state import TrainState, ema_decay


def train_step(
    state,
    data,
    batch,
    key,
    *,
    loss_fn,
    tx,
    first=None,
    accumulate=1,
    ema_limit=None,
    axis_name=None,
):
    """One update, or with `first` two.

    Under sharded jit means are global; under pmap `axis_name` makes them so.

    Args:
        state: a `TrainState`.
        data: arrays that stay on the device, or None; `loss_fn` picks its rows from them.
        batch: the rows of this step; `loss_fn` derives a key for each from `batch['index']`.
        key: the run's key; the step's number is folded in here.
        loss_fn: `(params, extra, data, batch, key, step) -> (loss, (extra, metrics))`.
        first: `(another loss_fn, a step)`: from that step on this loss makes an update on the same
            rows before `loss_fn` makes its own. The learning rate counts the two as one.
        accumulate: the gradient is the mean over as many equal parts of the batch, one after the
            other: that of the whole in less memory, where a loss is a mean over rows. BatchNorm
            sees parts.
        ema_limit: the largest decay of the weights' moving average; None keeps no average.

    Returns:
        (the next state, metrics as scalars, those of `loss_fn`).
    """
    key = jax.random.fold_in(key, state.step)

    def update(loss_fn, params, opt_state, extra):
        of = lambda extra, rows: _gradient(loss_fn, params, extra, data, rows, key, state.step)
        grads, extra, metrics = _over_parts(of, extra, batch, accumulate)
        if axis_name is not None:
            grads, extra, metrics = jax.lax.pmean((grads, extra, metrics), axis_name)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics |= {'grad_norm': optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), opt_state, extra), metrics

    before = (state.params, state.opt_state, state.extra)
    if first is not None:
        loss, begin = first

        (params, opt_state, extra), _ = update(loss, *before)
        after = (params, _same_clock(opt_state, state.opt_state), extra)
        # Not a conditional: XLA's convolutions inside of one are 40 x slower on a CPU
        chosen = lambda new, old: jnp.where(state.step >= begin, new, old)
        before = jax.tree.map(chosen, after, before)
    (params, opt_state, extra), metrics = update(loss_fn, *before)
    ema = state.ema
    if ema_limit is not None:
        decay = ema_decay(state.step, limit=ema_limit)
        ema = optax.incremental_update(params, state.ema, 1.0 - decay)
    return TrainState(state.step + 1, params, ema, opt_state, extra), metrics


def _gradient(loss_fn, params, *args):
    (_, (extra, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *args)
    return grads, extra, metrics


def _over_parts(gradient, extra, batch, parts):
    """(mean gradient, the last `extra`, mean metrics) over parts of a batch.

    A part takes every so many-th row, so that rows stay on the devices that have them.
    """
    if parts == 1:
        return gradient(extra, batch)
    split = lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    def add(carry, rows):
        total, extra = carry
        grads, extra, metrics = gradient(extra, rows)
        return (jax.tree.map(jnp.add, total, grads), extra), metrics

    batches = jax.tree.map(split, batch)
    shapes, _, _ = jax.eval_shape(gradient, extra, jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (total, extra), metrics = jax.lax.scan(add, (zeros, extra), batches)
    mean = lambda x: jnp.mean(x, axis=0)
    return jax.tree.map(lambda x: x / parts, total), extra, jax.tree.map(mean, metrics)


def _same_clock(opt_state, before):
    """An optimiser's state with the learning rate's place in its schedule as it was before."""
    clock = lambda state: isinstance(state, optax.ScaleByScheduleState)
    keep = lambda after, before: before if clock(after) else after
    return jax.tree.map(keep, opt_state, before, is_leaf=clock)


def fit(
    state: TrainState,
    step: Callable,
    data: Any,
    feed: Callable[[int], Iterator[Any]],
    key: jax.Array,
    *,
    steps: int,
    devices: Devices,
    folder,
    what: str,
    images_per_step: int,
    where: str = 'batch_size',
    log_every: int = 50,
    checkpoint_every: int = 1000,
) -> tuple[TrainState, dict[str, float]]:
    """Trains to `steps` updates, from the folder's checkpoint if there is one.

    Args:
        state: the initial state, as from one device.
        step: a compiled step (`Devices.compile_step`).
        data: replicated arrays or None.
        feed: `feed(n)` iterates over the batches from number n on.
        folder: keeps `checkpoints/` while training, and `log.jsonl`.
        where: the setting that asks for the rows of a step.

    Returns:
        The final state, on the host, and facts: seconds, images_per_s (compilation and
        checkpoints left out), the last metrics.

    Raises:
        UserError: a metric is not finite; the message names the steps, and no such state is saved.
            A device is full; it says how many rows would fit.
        Probed: with `devices.probe`, after two steps.
    """
    checkpoints = Checkpoints(folder / 'checkpoints')
    log = console.Log(folder / 'log.jsonl')
    state = devices.place_state(state)
    restored = checkpoints.restore(devices.unreplicate(state))
    if restored is not None:
        state = devices.place_state(restored)
    first = int(devices.unreplicate(state).step)
    key = devices.replicate(key) if devices.mode == 'jit' else key
    progress = console.Progress(what, steps, start=first)
    batches = feed(first)
    if devices.probe:
        batch = devices.shard(next(batches))
        ask = functools.partial(memory.need, step, state, data, batch, key)
        with memory.watched(what, where, _rows(batch, devices), devices.count, ask):
            facts = _try(step, state, data, batch, key)
        raise Probed(images=images_per_step, steps=steps - first, **facts)
    pending, last = [], {}
    seconds, timed, mark = 0.0, 0, None
    try:
        for done in range(first + 1, steps + 1):
            batch = devices.shard(next(batches))
            ask = functools.partial(memory.need, step, state, data, batch, key)
            with memory.watched(what, where, _rows(batch, devices), devices.count, ask):
                state, metrics = step(state, data, batch, key)
                if done == first + 1:
                    jax.block_until_ready(metrics)
            pending.append(metrics)
            if done == first + 1:  # compiles; the clock starts after it
                mark = time.monotonic()
                progress.compiled(done)
            saves = done % checkpoint_every == 0 and done < steps
            if done % log_every == 0 or done == steps or saves:
                last = _means(jax.device_get(pending), done, what)
                pending = []
                now = time.monotonic()
                seconds, timed, mark = seconds + now - mark, done - first - 1, now
                speed = images_per_step * timed / seconds if timed else 0.0
                log.write({'step': done, **last, 'images_per_s': round(speed, 1)})
                progress.update(done, loss=last['loss'], **{'images/s': round(speed)})
                if saves:
                    checkpoints.save(done, devices.unreplicate(state))
                    mark = time.monotonic()
    except BaseException:
        if hosts.count() == 1:  # of several, another may be gone, and no longer write its part
            checkpoints.close()
        raise
    checkpoints.close()
    facts = {'images_per_s': round(speed, 1), **last} if last else {}
    progress.close(**{k: facts[k] for k in ('loss', 'images_per_s') if k in facts})
    return fetch(devices.unreplicate(state)), facts


def _rows(batch, devices):
    """Of a placed batch; under pmap each device has its own axis."""
    shape = jax.tree.leaves(batch)[0].shape
    return shape[0] if devices.mode == 'jit' else shape[0] * shape[1]


def _try(step, *arguments):
    """What a step takes, by two of them."""
    state, *others = arguments
    ask = functools.partial(memory.need, step, *arguments)

    def call():
        nonlocal state
        state, metrics = step(state, *others)
        return metrics

    return probe(call, ask)


def _means(metrics, done, what):
    """Means over the steps since the last call, which end at `done`; a NaN stops the run here."""
    values = {k: np.array([m[k] for m in metrics], np.float64) for k in metrics[0]}
    for name, v in values.items():
        bad = np.flatnonzero(~np.isfinite(v))
        if bad.size:
            at = done - len(v) + 1 + int(bad[0])
            raise UserError(
                f'{what}: {name} is {v[bad[0]]} at step {at} (checked at step {done}). Nothing '
                'after the last checkpoint was saved. A lower optimizer.learning_rate, clip, or '
                "dtype='float32' usually mends it."
            )
    return {k: float(v.mean()) for k, v in values.items()}
