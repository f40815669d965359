"""Two small worlds for scores: Gaussians whose AUROCs theory knows, and a tiny random network."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy.special import logsumexp

from jaxood.scores import SCORES, reconstruction

D, K = 20, 5
MEANS = 5.0 * np.eye(K, D)
HEAD = {
    'kernel': np.float32(MEANS.T),
    'bias': np.float32(-0.5 * np.sum(MEANS**2, axis=1)),  # the Bayes rule
}


@struct.dataclass
class Network:
    """`head['network']`: convolutions, an activation after each, and the mean over space."""

    kernels: tuple
    head: dict
    std: jax.Array
    activation: Callable = struct.field(pytree_node=False, default=jax.nn.relu)

    def forward(self, images):
        return self._after(0, images)

    def resume(self, stage, map):
        return self._after(stage + 1, map)

    def _after(self, stage, x):
        maps, relus = [], []
        for kernel in self.kernels[stage:]:
            entering = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
            )
            x = self.activation(entering)
            relus.append(entering)
            maps.append(x)
        features = jnp.mean(x, axis=(1, 2))
        logits = features @ self.head['kernel'] + self.head['bias']
        outputs = {'logits': logits, 'features': features}
        return outputs | {'maps': tuple(maps), 'relus': tuple(relus)}


def plain_forward(network, x, stage=-1):
    """`resume(stage, x)`, or `forward` for stage -1, in NumPy's float64: loops over the kernel."""
    x, maps = np.asarray(x, float), []
    for kernel in network.kernels[stage + 1 :]:
        h, w = kernel.shape[:2]
        padded = np.pad(x, ((0, 0), (h // 2, h // 2), (w // 2, w // 2), (0, 0)))
        size = x.shape[1:3]
        x = sum(
            padded[:, i : i + size[0], j : j + size[1]] @ kernel[i, j].astype(float)
            for i in range(h)
            for j in range(w)
        )
        x = np.maximum(x, 0) if network.activation is jax.nn.relu else x
        maps.append(x)
    features = x.mean(axis=(1, 2))
    logits = features @ network.head['kernel'].astype(float) + network.head['bias']
    return {'logits': logits, 'features': features, 'maps': tuple(maps)}


def plain_energy(h, head):
    return -logsumexp(h @ head['kernel'].astype(float) + head['bias'], axis=1)


def plain_shaped(h, variant, percentile):
    """One row of ASH or SCALE at a time; a stable sort, so ties go by index."""
    rows = []
    for row in h.astype(float):
        k = len(row) - round(len(row) * percentile / 100)
        best = np.argsort(-row, kind='stable')[:k]
        pruned = np.zeros_like(row)
        pruned[best] = row[best]
        factor = np.exp(row.sum() / pruned.sum()) if pruned.sum() > 0 else 1.0
        filled = np.isin(np.arange(len(row)), best) * row.sum() / k
        rows.append(
            {'p': pruned, 'b': filled, 's': pruned * factor, 'scale': row * factor}[variant]
        )
    return np.array(rows)


def plain_gradient(f, x, step=1e-5):
    """Central differences of f: [B, ...] -> [B], whose rows don't see each other."""
    x, gradient = np.asarray(x, float), np.zeros(x.shape)
    for at in np.ndindex(x.shape[1:]):
        to = np.zeros(x.shape)
        to[:, *at] = step
        gradient[:, *at] = (f(x + to) - f(x - to)) / (2 * step)
    return gradient


def outputs_of(features, head=HEAD, labels=None):
    """What a network with this last layer hands to a score that reads logits and features."""
    h = np.asarray(features, np.float32)
    outputs = {
        'logits': h @ head['kernel'] + head['bias'],
        'features': h,
        'index': np.arange(len(h), dtype=np.int32),
    }
    return outputs if labels is None else outputs | {'labels': np.asarray(labels, np.int32)}


def outputs_through(images, head, labels=None):
    """What `head['network']` hands to a score that needs maps or the network."""
    images = np.asarray(images, np.float32)
    outputs = dict(jax.tree.map(np.asarray, jax.jit(head['network'].forward)(images)))
    outputs.pop('relus')
    outputs |= {'images': images, 'index': np.arange(len(images), dtype=np.int32)}
    outputs |= {'restored': {3: restored(outputs['features'])}}
    return outputs if labels is None else outputs | {'labels': np.asarray(labels, np.int32)}


def restored(z_0):
    """By a restorer that has learned the K directions of the class means and nothing else, and
    before that (its first snapshot) nothing at all; two blocks."""
    edges = (0, z_0.shape[1] // 2, z_0.shape[1])
    snapshots = np.zeros_like(z_0), np.where(np.arange(z_0.shape[1]) < K, z_0, 0.0)
    both = [reconstruction.compare(z_0, z_tilde, edges) for z_tilde in snapshots]
    return jax.tree.map(lambda *x: np.stack(x, axis=1), *both)


def bank_of(outputs, head, **more):
    """Outputs as `fit` gets them: what depends on images only through `bank['map']`."""
    here = {k: v for k, v in outputs.items() if k != 'labels'}

    def over_images(f, rows=None):
        f = jax.jit(f)
        at = np.arange(len(outputs['index'])) if rows is None else np.asarray(rows)
        for start in range(0, len(at), 1000):
            yield jax.tree.map(np.asarray, f(rows_of(here, at[start : start + 1000]), head))

    held = {k: v for k, v in outputs.items() if k not in ('images', 'maps')}
    return held | {'map': over_images} | more


def bank_rows(bank, at):
    """The bank of some of a bank's images, or of all in another order."""
    every = bank['map']
    held = rows_of({k: v for k, v in bank.items() if k not in ('map', 'validation')}, at)
    chosen = lambda f, rows=None: every(f, rows=at if rows is None else at[rows])
    return {**bank, **held, 'map': chosen}


def rows_of(outputs, at):
    return jax.tree.map(lambda x: x[at], outputs)


def seen_by(name, bank, outputs, head):
    """The three without what the score's `needs` does not promise."""
    if SCORES[name].needs in ('maps', 'network'):
        return bank, outputs, head
    none = {'images', 'maps', 'map', 'network'}
    none |= {'restored'} if SCORES[name].needs != 'restored' else {'logits', 'features'}
    return tuple({k: v for k, v in x.items() if k not in none} for x in (bank, outputs, head))


def run(name, bank, outputs, head, **keywords):
    bank, outputs, head = seen_by(name, bank, outputs, head)
    entry = SCORES[name]
    params = entry.fit(bank, head, **keywords)
    return np.asarray(jax.jit(entry.score)(params, outputs, head))
