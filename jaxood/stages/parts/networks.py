"""Networks whose weights are an artefact: what they say of a set is computed once and kept."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import artefacts, models, parallel
from jaxood import config as configs
from jaxood.artefacts import Artefact, Store
from jaxood.data import augment, loader
from jaxood.data.examples import Examples
from jaxood.models import backbones, frozen, heads, taps
from jaxood.models.pretrained import Pretrained
from jaxood.parallel import Devices
from jaxood.stages import common
from jaxood.stages.parts import memo
from jaxood.train import checkpoint

VERSION = 1  # of features: raised when the same network says something else of the same images
OUTPUTS = ('logits', 'features')
TAPPED = ('taps', 'mark')  # of a network whose maps are tapped
SHARD = 8192  # rows that a kill can cost
ROWS = 1024  # of one call on outputs that are there already


def build(backbone, head, num_classes: int, *, dtype, axis_name=None, where='config.backbone'):
    """The classifier that two sections describe: `config.backbone` and `config.head`, say."""
    layout = dict(dtype=dtype, axis_name=axis_name)
    network = configs.build(backbones.BACKBONES, backbone, where, **layout)
    top = configs.build(
        heads.HEADS, head, 'config.head', num_classes=num_classes, axis_name=axis_name
    )
    return models.Classifier(backbone=network, head=top)


def sees(config, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(H, W, C) of an image as a network sees it: that of the data, or `preprocessing.size`."""
    size = config.preprocessing.get('size')
    return tuple(shape) if size is None else (size, size, shape[-1])


class Taps(NamedTuple):
    """Which maps of a network are read beside its features, and how (`models.taps`)."""

    names: tuple[str, ...]
    positions: tuple[int, ...]  # among the maps
    pool: str


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A classifier, its weights, and the look of the images that it takes.

    Attributes:
        variables: on the host, of one copy.
        preprocessing: `mean`, `std`, and `size` if images are resized for it
            (`augment.standardise`).
        key: fingerprint of all that its outputs depend on, besides the images.
        rows: images of one call, a multiple of the devices.
        taps: the maps that are read, too; None for none.
        restorer: `restorers.Restorer` of what is tapped, for scores of that; None without.
    """

    model: Any
    variables: Any
    preprocessing: dict
    key: str
    devices: Devices
    rows: int
    taps: Taps | None = None
    restorer: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays that it says of a set."""
        return OUTPUTS if self.taps is None else (*OUTPUTS, *TAPPED)

    @property
    def head(self) -> dict[str, np.ndarray]:
        """`kernel` and `bias`, as scores read them (`heads.last_layer`)."""
        last = heads.last_layer(self.variables['params']['head'])
        return {name: np.asarray(array) for name, array in last.items()}

    def features(self, store: Store, examples: Examples, what: str) -> dict[str, np.ndarray]:
        """Logits and features of a set, in order, as memory maps: computed unless they are there.

        Keyed by the hashes of weights, images and preprocessing; shared by all who ask for them. An
        interrupted pass goes on with the next shard.

        Returns:
            `logits` float32[N, K], `features` float32[N, D], `labels` int32[N] if there are; of a
            tapped network also `taps` float32[N, c], z_0 of `models.taps`, and `mark` uint32[N].
        """
        artefact = find_features(store, self.key, examples.digest)
        if artefact.done is None:
            with artefacts.lock(artefact.folder):
                if artefact.done is None:
                    self._compute(artefact, examples, what)
        artefacts.remove(artefact.folder, 'shards')  # a kill may have left them
        return load_features(artefact)

    def outputs(self, examples: Examples) -> dict[str, np.ndarray]:
        """`features` in memory, computed anew: for images that are looked at once."""
        parts = list(self.stream(self.chunks(examples)))
        return {k: np.concatenate([p[k] for p in parts]) for k in self.names}

    def stream(self, chunks) -> Iterator[dict[str, np.ndarray]]:
        """Logits and features chunk by chunk, in constant memory.

        Args:
            chunks: (uint8[rows, H, W, C], real rows).
        """
        look = configs.freeze(self.preprocessing)
        forward = _forward(self.devices, self.model, look, self.taps)
        shared = self.devices.replicate(self.variables)
        return parallel.map_rows(self.devices, forward, shared, chunks)

    def chunks(self, examples: Examples) -> Iterator[tuple[np.ndarray, int]]:
        """All images in order, as `stream` and `inside` take them."""
        return ((images, len(rows)) for images, rows in loader.chunks(examples, self.rows))

    def outside(self, f: Callable, params: Any, outputs, head=None) -> Iterator[Any]:
        """`f(params, outputs, head)` over the rows of `features`, a chunk at a time, on the host.

        Args:
            f: a pure function of rows. Compiled once for each, so give the same object again.
            head: in place of its own.
        """
        size = self.devices.batch_size(ROWS)
        outputs = {k: outputs[k] for k in (*OUTPUTS, 'restored') if k in outputs}
        rows = lambda at: jax.tree.map(lambda v: np.asarray(v[at : at + size]), outputs)
        starts = range(0, len(outputs['logits']), size)
        chunks = (parallel.pad_rows(rows(at), size) for at in starts)
        head = self.head if head is None else head
        shared = self.devices.replicate({'params': params, 'head': head})
        return parallel.map_rows(self.devices, _outside(self.devices, f), shared, chunks)

    def inside(self, f: Callable, params: Any, chunks) -> Iterator[Any]:
        """The same for chunks of images: `outputs` also has the standardised `images` and all that
        `Frozen.forward` returns, `head` the `network`."""
        compiled = _inside(self.devices, self.model, configs.freeze(self.preprocessing), f)
        shared = self.devices.replicate({'variables': self.variables, 'params': params})
        return parallel.map_rows(self.devices, compiled, shared, chunks)

    def _compute(self, artefact, examples, what):
        part = lambda start, stop: examples.subset(np.arange(start, stop))
        chunks = lambda start, stop: self.stream(self.chunks(part(start, stop)))
        facts = memo.fill(artefact, len(examples), chunks, what, SHARD)
        has_labels = examples.labels is not None
        if has_labels:
            artefacts.save_rows(artefact / 'labels.npy', [examples.labels], len(examples))
        artefact.finish(rows=len(examples), labels=has_labels, **facts)


def load(artefact: Artefact, config, devices: Devices, rows: int) -> Network:
    """The network of a finished `train_detector` or `load_weights`.

    Args:
        config: for `dtype`, of compute, and `taps`, if it has that section.
    """
    facts = configs.plain(artefact.done)
    dtype = common.dtype(config)
    model = build(
        *(facts['backbone'], facts['head'], facts['num_classes']),
        dtype=dtype,
        axis_name=devices.axis_name,
    )
    key = (artefact.stage, artefact.fingerprint, config.dtype)
    tapped = None
    if config.get('taps') is not None:
        tapped = tap(facts['backbone'], config.taps)
        key += (tapped.positions, tapped.pool)
    return Network(
        model,
        checkpoint.load_weights(artefact / 'weights'),
        facts['preprocessing'],
        configs.fingerprint(*key),
        devices,
        devices.batch_size(rows_of(rows, facts['preprocessing'])),
        tapped,
    )


def tap(backbone, section) -> Taps:
    """What `config.taps` asks of the backbone that a section describes.

    Raises:
        ConfigError: a map that it does not have, or an unknown pooling.
    """
    where = 'config.taps'
    common.check_name(taps.POOLS, section['pool'], f'{where}.pool')
    known = configs.build(backbones.BACKBONES, backbone, 'config.backbone').map_names
    with common.rehearsal(f'{where}.at'):
        positions = taps.choose(backbone['name'], known, configs.plain(section.get('at')))
    return Taps(tuple(known[i] for i in positions), positions, section['pool'])


def rows_of(rows: int, preprocessing) -> int:
    """As many fewer images of one call as they are enlarged over 32 x 32 pixels."""
    return max(1, rows * 32**2 // max(32, preprocessing.get('size') or 32) ** 2)


def pretrained(found: Pretrained, config, devices: Devices, rows: int) -> Network:
    """A converted checkpoint as it is, which sees images of any size at its own.

    Args:
        rows: images of one call at 32 x 32 pixels; as many fewer as they are larger.
    """
    look = found.preprocessing
    preprocessing = {'mean': look.mean, 'std': look.std, 'size': look.size}
    rows = devices.batch_size(rows_of(rows, preprocessing))
    key = configs.fingerprint('pretrained', found.digest, preprocessing, config.dtype)
    model = found.build(dtype=common.dtype(config), axis_name=devices.axis_name)
    return Network(model, found.variables, preprocessing, key, devices, rows)


def find_features(store: Store, key: str, digest: str) -> Artefact:
    """Where the outputs of the network `key` on the images `digest` lie, or will lie."""
    return store.find('features', configs.fingerprint(VERSION, key, digest))


def load_features(artefact: Artefact) -> dict[str, np.ndarray]:
    """What `Network.features` returns, of an artefact that is done."""
    done = artefact.done
    names = (*done.get('arrays', OUTPUTS), *(('labels',) if done['labels'] else ()))
    return {name: artefacts.load_rows(artefact / f'{name}.npy') for name in names}


@functools.cache
def _forward(devices: Devices, model, preprocessing, tapped):
    look = dict(preprocessing)

    def forward(variables, images):
        x = augment.standardise(images, **look)
        out = model.apply(variables, x, train=False)
        said = {k: out[k].astype(jnp.float32) for k in OUTPUTS}
        if tapped is not None:
            z_0 = taps.semantics(out['maps'], tapped.positions, tapped.pool, x.shape[1:3])
            said |= {'taps': z_0, 'mark': augment.mark(images)}
        return said

    return devices.compile_rows(forward)


@functools.lru_cache(maxsize=64)
def _outside(devices: Devices, f):
    return devices.compile_rows(lambda shared, rows: f(shared['params'], rows, shared['head']))


@functools.lru_cache(maxsize=64)
def _inside(devices: Devices, model, preprocessing, f):
    look = dict(preprocessing)

    def rows(shared, images):
        x = augment.standardise(images, **look)
        std = jnp.broadcast_to(jnp.asarray(look['std'], jnp.float32), (images.shape[-1],))
        network = frozen.Frozen(shared['variables'], std, model)
        outputs = network.forward(x) | {'images': x}
        head = heads.last_layer(shared['variables']['params']['head']) | {'network': network}
        return f(shared['params'], outputs, head)

    return devices.compile_rows(rows)
