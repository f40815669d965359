"""CLIP at work: prompts and images as unit vectors that can be compared, computed once and kept."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxood import config as configs
from jaxood import parallel
from jaxood.artefacts import Artefact, Store
from jaxood.data import loader
from jaxood.data.examples import Examples
from jaxood.errors import ConfigError, UserError, blame
from jaxood.models.clip import vision
from jaxood.models.clip.tokenizer import Tokenizer
from jaxood.models.stable_diffusion import folder as folders
from jaxood.parallel import Devices
from jaxood.stages import common
from jaxood.stages.parts import memo, networks, texts

VERSION = 1  # of embeddings: raised when the same CLIP says something else
SHARD = 8192  # rows that a kill can cost
STEP = 8  # prompts are cut to a multiple of it: most are short, and few lengths are compiled
WHERE = 'config.words.clip'


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """Both encoders and their weights.

    Attributes:
        key: fingerprint of all that embeddings depend on, besides prompts and images.
        rows: prompts of one call, a multiple of the devices.
    """

    text: Any
    vision: Any
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    key: str
    devices: Devices
    rows: int

    def prompts(self, store: Store, prompts: Sequence[str], what: str) -> np.ndarray:
        """T(prompt) of many prompts, float32[n, P], unit vectors, as a memory map."""
        key = configs.fingerprint(VERSION, self.key, 'prompts', prompts)
        ids = functools.cache(lambda: self.tokenizer(prompts))
        chunks = lambda start, stop: self._stream(ids()[start:stop], None)
        found = memo.rows(store, 'embeddings', key, len(prompts), chunks, what, SHARD)
        return found['embedding']

    def ids(self, ids: np.ndarray, extra: np.ndarray | None = None) -> np.ndarray:
        """The same of token ids int32[n, N], computed anew.

        Args:
            extra: float32[m, D], input vectors of pseudo-words; see `clip.text`.
        """
        return np.concatenate([chunk['embedding'] for chunk in self._stream(ids, extra)])

    def images(self, store: Store, examples: Examples, what: str) -> np.ndarray:
        """E'(x) of a set, in order, float32[N, P], unit vectors, as a memory map."""
        chunks = lambda start, stop: self._look(examples.subset(np.arange(start, stop)))
        key = configs.fingerprint(VERSION, self.key, 'images', examples.digest)
        return memo.rows(store, 'embeddings', key, len(examples), chunks, what, SHARD)['embedding']

    def looks(self, examples: Examples) -> np.ndarray:
        """The same, computed anew: for images that are looked at once."""
        return np.concatenate([chunk['embedding'] for chunk in self._look(examples)])

    def _look(self, examples):
        rows = self.devices.batch_size(networks.rows_of(self.rows, {'size': self.vision.size}))
        shared = self.devices.replicate(self.params['vision'])
        each = ((images, len(real)) for images, real in loader.chunks(examples, rows))
        return parallel.map_rows(self.devices, _images(self.devices, self.vision), shared, each)

    def _stream(self, ids, extra):
        """The encoder is causal, so what follows a prompt's end is cut off."""
        shared = self.devices.replicate({'variables': self.params['text'], 'extra': extra})
        compiled = _prompts(self.devices, self.text)

        def chunks():
            for at in range(0, len(ids), self.rows):
                part = ids[at : at + self.rows]
                longest = int(np.argmax(part == self.tokenizer.end, axis=1).max()) + 1
                length = min(-(-longest // STEP) * STEP, ids.shape[1])
                yield parallel.pad_rows(part[:, :length], self.rows)

        return parallel.map_rows(self.devices, compiled, shared, chunks())


def folder(config, inputs: Mapping[str, Artefact]) -> pathlib.Path:
    """Of the whole CLIP: the one that is named, or the one in the generator's own folder."""
    path = config.words.get('clip')
    if path is not None:
        return pathlib.Path(path).expanduser().absolute()
    return texts.pipeline_folder(config, inputs) / 'clip'


def check(config) -> None:
    """Raises ConfigError for a folder that is no CLIP, as far as it is there already."""
    named = config.words.get('clip') is not None
    if not named and texts.trained_here(config):
        return
    place = folder(config, {})
    if not named and not place.exists():
        raise ConfigError(
            f"{WHERE} is not set, and the generator's folder has no clip/ in it: its own text "
            'encoder has no projection to compare words and images by. Name a folder of the whole '
            'CLIP (openai/clip-vit-large-patch14 for Stable Diffusion 1.x, through '
            '`python -m jaxood.convert clip`).'
        )
    try:
        folders.check(place, 'clip')
    except UserError as e:
        raise ConfigError(f'{WHERE}: {e}') from e


def digest(config) -> str:
    """Of the folder that is named; '' where it is the generator's (see `texts.digest`)."""
    return '' if config.words.get('clip') is None else texts.digest_of(folder(config, {}))


def load(config, inputs: Mapping[str, Artefact], devices: Devices, rows: int) -> Clip:
    """The CLIP of a run."""
    place = folder(config, inputs)
    key = configs.fingerprint(texts.digest_of(place), config.dtype)
    return Clip(*_load(str(place), common.dtype(config)), key, devices, devices.batch_size(rows))


@functools.lru_cache(maxsize=2)
def _load(place, dtype):
    with blame(WHERE):
        return folders.load_clip(place, dtype=dtype)


@functools.cache
def _prompts(devices: Devices, text):
    def embed(shared, ids):
        found = text.apply(shared['variables'], ids, shared['extra'])['projected']
        return {'embedding': unit(found)}

    return devices.compile_rows(embed)


@functools.cache
def _images(devices: Devices, module):
    def embed(variables, images):
        pixels = vision.fitted(images.astype(jnp.float32) / 255.0, module.size)
        return {'embedding': unit(module.apply(variables, vision.normalised(pixels))['projected'])}

    return devices.compile_rows(embed)


def unit(x: jax.Array) -> jax.Array:
    """Rows of length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
