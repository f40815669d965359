"""A trained restorer at work: what it makes of a set's features is computed once and kept."""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxood import artefacts, diffusion, parallel
from jaxood import config as configs
from jaxood.artefacts import Artefact, Store
from jaxood.diffusion import process, restoration
from jaxood.errors import ConfigError, UserError
from jaxood.models.denoisers import RESTORERS
from jaxood.rng import key_each, key_for, seed_for
from jaxood.scores import reconstruction
from jaxood.stages import common
from jaxood.stages.parts import networks
from jaxood.train import checkpoint

VERSION = 1  # raised when the same restorer makes something else of the same features
ROWS = 1024  # of one call at most; of smaller sets the next power of two
RANDOM = 'random'  # a stride drawn for each depth, as the paper has it


@dataclasses.dataclass(frozen=True, eq=False)
class Restorer:
    """A network of feature vectors, its two snapshots, and how they are used.

    Attributes:
        snapshots: parameters on the host, in the order of `reconstruction.SNAPSHOTS`.
        alpha_bar: float32[T + 1].
        columns: which entries of the network's `taps` it restores; `edges` of their blocks.
        key: fingerprint of all that its restorations depend on, besides the features.
        seed: of the noise.
    """

    model: Any
    snapshots: Sequence[Any]
    alpha_bar: np.ndarray
    columns: tuple[int, ...]
    edges: tuple[int, ...]
    eta: float
    stride: int | str
    seed: int
    devices: parallel.Devices
    key: str

    def outputs(self, store: Store, network, examples, depths: Sequence[int], what: str):
        """`restore` of a set, read from the store where it is there already.

        Depths that are missing are computed in one pass over the set's features. Its time, for one
        snapshot, is shared out among them by calls of the network.

        Returns:
            {'restored': depth -> {'errors', 'cosines'}}, as `scores.reconstruction` reads it.
        """
        found = {t: self.find(store, examples.digest, t) for t in depths}
        missing = [t for t in depths if found[t].done is None]
        if missing:
            outputs = network.features(store, examples, what)
            rows = min(ROWS, 1 << (len(examples) - 1).bit_length())
            self.restore({k: outputs[k][:1] for k in networks.TAPPED}, missing, rows)  # compiles
            started = time.monotonic()
            numbers = self.restore(outputs, missing, rows)
            each = 1e3 * (time.monotonic() - started) / len(self.snapshots) / len(examples)
            calls = {t: len(self.times(t)) - 1 for t in missing}
            for t in missing:
                with artefacts.lock(found[t].folder):
                    artefacts.save(found[t] / 'restored.npz', **numbers[t])
                    share = round(each * calls[t] / sum(calls.values()), 6)
                    found[t].finish(ms_per_image=share, calls=calls[t])
        return {'restored': {t: artefacts.load(found[t] / 'restored.npz') for t in depths}}

    def restore(self, outputs: Mapping[str, Any], depths: Sequence[int], rows: int):
        """Both snapshots on features from every depth.

        Args:
            outputs: `taps` and `mark` of N rows; they may be memory maps of any length.
            rows: of one call.

        Returns:
            depth -> {'errors', 'cosines'} float32[N, 2, M].
        """
        depths = tuple(depths)
        times = tuple(tuple(self.times(t).tolist()) for t in depths)
        call = _restore(
            *(self.devices, self.model, tuple(self.alpha_bar.tolist()), self.columns, self.edges),
            *(times, self.eta),
        )
        size, key = self.devices.batch_size(rows), key_for(self.seed, 'restoration')
        made = []
        for params in self.snapshots:
            shared = self.devices.replicate({'params': params, 'key': key})
            parts = parallel.map_rows(self.devices, call, shared, _chunks(outputs, size))
            made.append(jax.tree.map(lambda *x: np.concatenate(x), *parts))
        return dict(zip(depths, jax.tree.map(lambda *x: np.stack(x, axis=1), *made)))

    def times(self, depth: int) -> np.ndarray:
        """The grid that a chain from this depth walks down."""
        stride = self.stride
        if stride == RANDOM:
            drawn = np.random.Generator(np.random.PCG64(seed_for(self.seed, 'stride', depth)))
            stride = int(drawn.integers(1, depth + 1))
        return restoration.grid(depth, len(self.alpha_bar) - 1, min(stride, depth))

    def find(self, store: Store, digest: str, depth: int) -> Artefact:
        """Where the restorations of the images `digest` from this depth lie, or will lie."""
        return store.find('restorations', configs.fingerprint(VERSION, self.key, digest, depth))


def load(artefact: Artefact, network, config, devices: parallel.Devices) -> Restorer:
    """The restorer of a finished `train_restorer`, over the network whose maps it was trained on.

    Raises:
        UserError: one of its snapshots is missing.
    """
    facts = configs.plain(artefact.done)
    snapshots = []
    for name in reconstruction.SNAPSHOTS:
        folder = artefact / name
        if not artefacts.exists(folder):
            raise UserError(
                f'{folder} is missing: the snapshot of the restorer '
                f'{"after its first epoch" if name == "initial" else "after its last epoch"}, '
                f'which likelihood regret compares. Remove {artefact.folder} and run the command '
                'again, which trains it anew.'
            )
        snapshots.append(checkpoint.load_weights(folder))
    section = configs.plain(config.restoration)
    return Restorer(
        model=build(config),
        snapshots=snapshots,
        alpha_bar=schedule(config),
        columns=tuple(facts['columns']),
        edges=tuple(facts['edges']),
        eta=float(section['eta']),
        stride=section['stride'],
        seed=config.seeds[0],
        devices=devices,
        key=configs.fingerprint(artefact.fingerprint, network.key, section, config.dtype),
    )


def build(config):
    """The network that `config.restorer` describes."""
    where = 'config.restorer'
    return configs.build(RESTORERS, config.restorer, where, dtype=common.dtype(config))


def schedule(config) -> np.ndarray:
    """alpha_bar float32[T + 1] of `config.restorer.schedule`."""
    where, section = 'config.restorer.schedule', config.restorer.schedule
    configs.whole(section, where, 'num_steps')
    return configs.build(diffusion.SCHEDULES, section, where)


def blocks(widths: Sequence[int], last: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(columns, edges) of the tapped features that a restorer sees.

    Args:
        widths: channels of each tapped block.
        last: how many of them, from the deepest; None for all.
    """
    first = 0 if last is None else len(widths) - last
    columns = range(sum(widths[:first]), sum(widths))
    return tuple(columns), tuple(np.cumsum([0, *widths[first:]]).tolist())


def check(config) -> None:
    """Raises ConfigError for settings of the restorations that cannot work."""
    c, where = config.restoration, 'config.restoration'
    configs.within(c, where, 'eta', 0.0, 1.0)
    if c.stride != RANDOM:
        configs.whole(c, where, 'stride')


def check_depth(config, depth: int, where: str) -> None:
    """Raises ConfigError unless a chain can start there."""
    T = config.restorer.schedule.num_steps
    if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= T:
        raise ConfigError(
            f'{where}.depth={depth!r} must be a whole number in 1..{T} '
            '(config.restorer.schedule.num_steps): features are restored from there. 3 is usual.'
        )


def describe(config) -> str:
    """The restorer in a few words, for tables."""
    c = config.restorer
    takes = configs.parameters(RESTORERS[c.name])
    words = ', '.join(f'{k}={c[k]}' for k in takes if c.get(k) is not None)
    return f'{c.name} ({words}), {c.epochs} epochs'


def _chunks(outputs, size):
    rows = {k: outputs[k] for k in networks.TAPPED}
    for at in range(0, len(rows['mark']), size):
        yield parallel.pad_rows({k: np.asarray(v[at : at + size]) for k, v in rows.items()}, size)


@functools.lru_cache(maxsize=32)
def _restore(devices, model, alpha_bar, columns, edges, times, eta):
    """Compiled: rows of `taps` and `mark` -> for each of `times` what `reconstruction` compares."""
    levels, columns = np.asarray(alpha_bar, np.float32), np.asarray(columns)

    def rows(shared, rows):
        z_0 = rows['taps'][:, columns]
        keys = key_each(shared['key'], rows['mark'])
        network = functools.partial(model.apply, {'params': shared['params']})
        prediction = diffusion.PREDICTIONS['x_0']
        denoise = process.denoiser(network, alpha_bar=levels, prediction=prediction)

        def compared(timesteps):
            z_tilde = restoration.restore(
                denoise, z_0, keys, alpha_bar=levels, timesteps=np.asarray(timesteps), eta=eta
            )
            return reconstruction.compare(z_0, z_tilde, edges)

        return [compared(timesteps) for timesteps in times]

    return devices.compile_rows(rows)
