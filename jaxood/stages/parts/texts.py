"""The text-to-image generator of a config: where its pipeline lies, what it holds, loaded once.

`config.generator=dict(name='stable_diffusion', path=FOLDER)` names a pipeline folder, as
`models.stable_diffusion.folder` reads it; without a path the run's own `train_pipeline` makes one.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from jaxood import config as configs
from jaxood import parallel
from jaxood.artefacts import Artefact
from jaxood.errors import ConfigError, UserError, blame
from jaxood.models.components import CONFIG, read_json
from jaxood.models.stable_diffusion import folder as folders
from jaxood.models.stable_diffusion import fresh, pipeline
from jaxood.models.stable_diffusion.pipeline import Schedule, StableDiffusion
from jaxood.parallel import Devices
from jaxood.stages import common

NAME = 'stable_diffusion'
TRAINED = 'train_pipeline'  # the stage whose work it is where no folder is named
WHERE = 'config.generator.path'
CHUNK = 2**24


def reads(config) -> bool:
    """Whether the config's generator is one that reads prompts."""
    return config.get('generator') is not None and config.generator.get('name') == NAME


def trained_here(config) -> bool:
    """Whether the pipeline is made by a stage of the run."""
    return reads(config) and config.generator.get('path') is None


def inputs(config) -> tuple[str, ...]:
    """What a stage that asks the generator builds on."""
    return (TRAINED,) if trained_here(config) else ()


def check(config) -> None:
    """Raises ConfigError for a generator that reads no prompts, or a folder that is no pipeline."""
    configs.require(config, 'generator')
    if not reads(config):
        raise ConfigError(
            f'config.generator.name={config.generator.get("name")!r} reads no prompts, and '
            f'config.outliers, config.tokens or config.words asks for images of words. Set '
            f"config.generator=dict(name='{NAME}', path=FOLDER)."
        )
    for key in config.generator:
        if key not in ('name', 'path'):
            raise ConfigError(f'config.generator.{key}: {NAME!r} takes a path and nothing else.')
    if trained_here(config):
        if TRAINED not in config.stages:
            raise ConfigError(
                f'{WHERE} names no pipeline folder, and no stage trains one. Name one, or put '
                f'{TRAINED!r} into config.stages (configs/dog.py:digits has all it needs).'
            )
        return
    try:
        folders.check(pipeline_folder(config, {}), 'stable-diffusion')
    except UserError as e:
        raise ConfigError(f'{WHERE}: {e}') from e


def pipeline_folder(config, inputs: Mapping[str, Artefact]) -> pathlib.Path:
    """The folder of the pipeline: the one that is named, or the one that the run has trained."""
    if trained_here(config):
        return pathlib.Path(inputs[TRAINED] / 'pipeline')
    return pathlib.Path(config.generator.path).expanduser().absolute()


def load(config, inputs: Mapping[str, Artefact]) -> StableDiffusion:
    """The pipeline, read once a process; `config.dtype` is what it computes and is kept in."""
    return _load(str(pipeline_folder(config, inputs)), common.dtype(config))


@functools.lru_cache(maxsize=2)
def _load(folder, dtype):
    with blame(WHERE):
        return folders.load(folder, dtype=dtype, params_dtype=dtype)


def schedule(config) -> Schedule:
    """The pipeline's noise schedule, which is known before the pipeline is trained."""
    if trained_here(config):
        return folders.schedule(fresh.SCHEDULER, WHERE)
    path = pipeline_folder(config, {}) / folders.SCHEDULER
    return folders.schedule(read_json(path), str(path))


def fits(config, data: common.Data) -> None:
    """Raises ConfigError for images that have not as many channels as the pipeline's."""
    channels = 3
    if not trained_here(config):
        channels = read_json(pipeline_folder(config, {}) / 'vae' / CONFIG).get('out_channels', 3)
    if data.shape[-1] != channels:
        raise ConfigError(
            f'{WHERE}: the pipeline paints images of {channels} channels, the ID images have '
            f'{data.shape[-1]}. Set config.data.channels={channels}.'
        )


def contexts(sd: StableDiffusion, devices: Devices, prompts, batch_size: int) -> np.ndarray:
    """The embeddings of prompts, [P, M, D] in the pipeline's own type, each computed once."""
    ids = sd.tokenizer(prompts)
    size = devices.batch_size(min(batch_size, len(ids)))
    chunks = (parallel.pad_rows(ids[i : i + size], size) for i in range(0, len(ids), size))
    shared = devices.replicate({'text_encoder': sd.params['text_encoder']})
    parts = parallel.map_rows(devices, _encoder(devices, sd.networks), shared, chunks)
    return np.concatenate([np.asarray(part, sd.networks.unet.dtype) for part in parts])


@functools.cache
def _encoder(devices, networks):
    return devices.compile_rows(lambda params, ids: pipeline.encode_prompts(networks, params, ids))


def settings(config) -> dict:
    """What of the generator a result depends on, for fingerprints."""
    return {'generator': {'name': NAME, 'contents': digest(config)}}


def digest(config) -> str:
    """Of the contents of the folder that is named; '' where the run trains the pipeline, whose
    fingerprint is then among the stage's inputs."""
    return '' if trained_here(config) else digest_of(pipeline_folder(config, {}))


def digest_of(folder: str | os.PathLike) -> str:
    """16 hex digits of a folder's contents, wherever it lies: the names and bytes of its files.

    Weights that `jaxood.convert` wrote count by the hashes beside them, which spares reading them.
    """
    folder = pathlib.Path(folder)
    files = sorted(p for p in folder.rglob('*') if p.is_file() and not p.name.startswith('.'))
    converted = {p.parent for p in files if p.name == folders.MARK}
    weighed = [
        p for p in files if p.name != folders.WEIGHTS or not converted & {p.parent, *p.parents}
    ]
    states = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in weighed)
    return _digest_of(str(folder), states)


@functools.lru_cache(maxsize=8)
def _digest_of(folder, states):
    found = {}
    for name, _, _ in states:
        sha = hashlib.sha256()
        with open(name, 'rb') as f:
            while part := f.read(CHUNK):
                sha.update(part)
        found[os.path.relpath(name, folder)] = sha.hexdigest()
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
