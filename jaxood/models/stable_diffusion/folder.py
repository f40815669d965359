"""Folders of Stable Diffusion and CLIP: diffusers' and transformers' as they are, and ours.

A single file in the original names becomes the same parts (`single`; its names are in `ldm`). Ours
hold the same files, but `weights.safetensors` with Flax's names and layouts in each component,
and `jaxood.json`, written last. Both can be loaded, and each turned into the other: the arrays keep
their type, and the way there and back changes no bit.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxood.errors import UserError, blame, unknown
from jaxood.models import components
from jaxood.models.clip import tokenizer
from jaxood.models.components import COMPONENTS, CONFIG, Arrays, Target, read_json
from jaxood.models.stable_diffusion import ldm
from jaxood.models.stable_diffusion.pipeline import Networks, Schedule, StableDiffusion

INDEX, SCHEDULER, MARK = 'model_index.json', 'scheduler/scheduler_config.json', 'jaxood.json'
WEIGHTS = 'weights.safetensors'
KINDS = {'stable-diffusion': ('text_encoder', 'unet', 'vae'), 'clip': ('clip',)}
DTYPES = {dtype: name for name, dtype in components.TYPES.items()}
SUPPORTED = 'Supported are Stable Diffusion 1.x and 2.x'
PREDICTIONS = {'epsilon': 'eps', 'v_prediction': 'v', 'sample': 'x_0'}
SCHEDULES = {'scaled_linear': 'scaled_linear', 'linear': 'linear', 'squaredcos_cap_v2': 'cosine'}


class Part(NamedTuple):
    """A component of a folder, ready to be read.

    Attributes:
        name: a key of `COMPONENTS`.
        place: its folder within the whole, '.' for the whole.
        config: of its `config.json`.
        modules: tree name -> Flax module.
        targets: their name -> where the array goes.
        arrays: (path, array) of ours, to be gone through once.
        dtypes: path -> NumPy's name of the array's type.
    """

    name: str
    place: str
    config: dict[str, Any]
    modules: dict[str, Any]
    targets: dict[str, Target]
    arrays: Iterator[tuple[str, np.ndarray]]
    dtypes: dict[str, str]

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(target.shape)) for target in self.targets.values())


def check(folder: pathlib.Path, kind: str) -> None:
    """Raises a UserError unless a folder is of a kind, and has its files.

    Says what it is instead, where that can be told.
    """
    if not folder.exists():
        raise UserError(f'{folder}: there is no such folder.')
    if folder.is_file():
        raise UserError(
            f'{folder}: this is one file, and a folder is needed. Of a Stable Diffusion 1.x, '
            '`python -m jaxood.convert stable-diffusion --source=FILE --out=FOLDER` makes one.'
        )
    there = ', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'
    if kind == 'clip':
        if (folder / INDEX).exists():
            raise UserError(f'{folder}: this is a pipeline. Convert it as stable-diffusion.')
        if not (folder / CONFIG).exists():
            raise UserError(f'{folder}: a folder of CLIP has a {CONFIG}; this one holds {there}.')
        return
    if not (folder / INDEX).exists():
        what = f'a pipeline folder of diffusers has a {INDEX}; this one holds {there}'
        if (folder / CONFIG).exists():
            what += f', and is a {components.kind_of(read_json(folder / CONFIG))}'
        raise UserError(f'{folder}: {what}.')
    named = str(read_json(folder / INDEX).get('_class_name'))
    if not re.fullmatch(r'(Flax)?StableDiffusion(Img2Img)?Pipeline(Safe)?', named):
        raise UserError(f'{folder}: this is a {named}. {SUPPORTED} (StableDiffusionPipeline).')
    for name in KINDS[kind]:
        if not (folder / name / CONFIG).exists():
            raise UserError(
                f'{folder}: the component {name} is missing: there is no {name}/{CONFIG}. Download '
                'the whole pipeline.'
            )
    if not (folder / SCHEDULER).exists():
        raise UserError(f'{folder}: {SCHEDULER} is missing. Download the whole pipeline.')


def is_ours(folder: pathlib.Path) -> bool:
    """Whether a folder was converted, whole or not."""
    return any((folder / name / WEIGHTS).exists() for name in ('unet', '.'))


def parts(folder: pathlib.Path, kind: str, variant: str | None = None) -> list[Part]:
    """The components of either sort of folder; names and shapes have been checked.

    Args:
        variant: of the files, such as 'fp16'.

    Raises:
        UserError: a network that we don't have, weights that are missing, damaged, or don't fit.
    """
    check(folder, kind)
    ours = is_ours(folder)
    if ours and not (folder / MARK).exists():
        raise UserError(f'{folder}: the conversion was interrupted. Convert it again.')
    found = []
    for name in KINDS[kind]:
        component, place = COMPONENTS[name], folder / ('.' if name == 'clip' else name)
        config, modules, targets = _described(name, place)
        if ours:
            arrays = Arrays([place / WEIGHTS])
            own = {t.path: t._replace(is_flax=True) for t in targets.values()}
            pairs = components.convert(component, own, arrays)
            dtypes = {path: arrays.dtypes[path] for path in own}
        else:
            files = components.weight_files(place, component.files, variant)
            arrays = Arrays(files, component.renamed)
            pairs = components.convert(component, targets, arrays)
            rooted = {t.path: n for n, t in targets.items()}
            dtypes = {
                path: arrays.dtypes.get(n) or arrays.dtypes[n.removeprefix(component.optional)]
                for path, n in rooted.items()
            }
        where = str(place.relative_to(folder))
        found.append(Part(name, where, config, modules, targets, pairs, dtypes))
    return found


def _described(name, place):
    """What the `config.json` of a component is about: itself, modules, targets."""
    config = read_json(place / CONFIG)
    with blame(str(place / CONFIG)):
        modules = COMPONENTS[name].build(config)
    return config, modules, COMPONENTS[name].targets(modules)


def open_single(file: pathlib.Path) -> Arrays:
    """The arrays of one file with LDM's names.

    Raises:
        UserError: it is damaged, holds code, or is of another model.
    """
    with blame(str(file)):
        if file.suffix not in components.ENDINGS:
            raise UserError(unknown(f'the ending {file.suffix!r}', file.suffix, components.ENDINGS))
    arrays = Arrays([file])
    with blame(str(file)):
        ldm.check(arrays.shapes)
    return arrays


def single(arrays: Arrays, frame: pathlib.Path) -> list[Part]:
    """The components of one file; names and shapes have been checked.

    Args:
        arrays: of the file, see `open_single`.
        frame: a pipeline folder, whose weights, if there are any, are not looked at.

    Raises:
        UserError: arrays that are missing, left over, or don't fit.
    """
    check(frame, 'stable-diffusion')
    described = {name: _described(name, frame / name) for name in KINDS['stable-diffusion']}
    tables = {
        name: {ldm.NAMES[name](n, modules['']): target for n, target in targets.items()}
        for name, (_, modules, targets) in described.items()
    }
    together = {n: target for table in tables.values() for n, target in table.items()}
    strict = COMPONENTS['unet']._replace(ignored=ldm.LEFTOVERS)
    network = 'Stable Diffusion 1.5, or of the pipeline that --config-from names'
    components.convert(strict, together, arrays, network)
    lax = strict._replace(ignored='.*')  # what is left over was seen above
    return [
        Part(
            *(name, name, *described[name], components.convert(lax, table, arrays)),
            {target.path: arrays.dtypes[n] for n, target in table.items()},
        )
        for name, table in tables.items()
    ]


def save(
    folder: pathlib.Path,
    source: pathlib.Path | None,
    found: Iterable[Part],
    *,
    to_diffusers: bool = False,
) -> dict[str, Any]:
    """Writes parts of `source`, and its other files, one array at a time.

    Args:
        folder: made if it is not there.
        source: where the other files are; None leaves them to the caller.
        to_diffusers: in diffusers' names and layouts, rather than ours.

    Returns:
        What `jaxood.json` holds: for each component parameters, types and the arrays' SHA-256.

    Raises:
        UserError: the disk is too full, or numbers are not finite.
    """
    found = list(found)
    _check_space(folder, found)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).unlink(missing_ok=True)
    facts = {}
    for part in found:
        place = folder / part.place
        place.mkdir(parents=True, exist_ok=True)
        names = {target.path: name for name, target in part.targets.items()}
        targets = {target.path: target for target in part.targets.values()}
        if to_diffusers:
            file = f'{COMPONENTS[part.name].files[0]}.safetensors'
            shapes = {p: components.shape_of_theirs(target) for p, target in targets.items()}
            specs = {names[p]: (part.dtypes[p], shapes[p]) for p in targets}
            arrays = ((names[p], targets[p].theirs(a)) for p, a in part.arrays)
        else:
            file = WEIGHTS
            specs = {p: (part.dtypes[p], targets[p].shape) for p in targets}
            arrays = part.arrays
        digest = _write_safetensors(place / file, specs, arrays)
        _write(place / CONFIG, (json.dumps(part.config, indent=2) + '\n').encode())
        facts[part.name] = {
            'parameters': part.parameters,
            'types': sorted(set(part.dtypes.values())),
            'sha256': digest,
        }
    for name in _other_files(source) if source else ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    if not to_diffusers:
        _write(folder / MARK, (json.dumps(facts, indent=2) + '\n').encode())
    return facts


def _other_files(source):
    """What belongs to a pipeline and is no network: paths within the folder."""
    fixed = (INDEX, SCHEDULER, 'preprocessor_config.json')
    names = [*fixed, *(f'tokenizer/{f}' for f in tokenizer.FILES)]
    names += tokenizer.FILES if not (source / INDEX).exists() else ()
    return [name for name in names if (source / name).is_file()]


def _check_space(folder, found):
    """Enough free space for what will be written."""
    need = sum(
        int(np.prod(t.shape)) * jnp.dtype(p.dtypes[t.path]).itemsize
        for p in found
        for t in p.targets.values()
    )
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(
            f'{folder}: {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free. Nothing '
            'was written.'
        )


def _write_safetensors(path, specs, arrays) -> str:
    """Streams arrays into a file, one at a time -> SHA-256 of what follows the header.

    The library's own writers want all arrays at once. The format: the header's length, a JSON of
    names, types, shapes and offsets, the arrays end to end.
    """
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name, (dtype, shape) in specs.items():
        size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        entry = {'dtype': DTYPES[dtype], 'shape': list(shape)}
        header[name] = entry | {'data_offsets': [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    sha, part = hashlib.sha256(), path.with_name(f'{path.name}.part')
    with open(part, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for (name, array), (expected, (dtype, shape)) in zip(arrays, specs.items(), strict=True):
            assert (name, array.shape, array.dtype) == (expected, tuple(shape), jnp.dtype(dtype))
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            sha.update(content)
            f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    return sha.hexdigest()


def _write(path, content):
    """The file is there whole or not at all, also after a kill."""
    part = path.with_name(f'{path.name}.part')
    part.write_bytes(content)
    os.replace(part, path)


def load(
    folder: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    params_dtype: Any = jnp.float32,
    remat: bool = False,
    variant: str | None = None,
) -> StableDiffusion:
    """A pipeline, from a folder that was converted or from one of diffusers.

    Args:
        dtype: compute type.
        params_dtype: what parameters are kept in.
        remat: see `unet.UNet`.
        variant: see `parts`.

    Raises:
        UserError: see `parts`.
    """
    folder = pathlib.Path(folder).expanduser()
    found = {part.name: part for part in parts(folder, 'stable-diffusion', variant)}
    modules = {name: part.modules[''].clone(dtype=dtype) for name, part in found.items()}
    params = {name: _params(part, params_dtype) for name, part in found.items()}
    networks = Networks(
        modules['text_encoder'],
        modules['unet'].clone(remat=remat),
        modules['vae'],
        schedule(read_json(folder / SCHEDULER), str(folder / SCHEDULER)),
    )
    size = found['unet'].config.get('sample_size') or 64
    size = size if isinstance(size, int) else max(size)
    words = tokenizer.load(folder / 'tokenizer')
    return StableDiffusion(networks, params, words, size * networks.vae.factor)


class Clip(NamedTuple):
    """A CLIP that was loaded: both encoders with their variables, and the tokenizer."""

    text: Any
    vision: Any
    params: dict[str, Any]  # 'text', 'vision' -> variables
    tokenizer: tokenizer.Tokenizer


def load_clip(
    folder: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    params_dtype: Any = jnp.float32,
    variant: str | None = None,
) -> Clip:
    """A CLIP, from a folder that was converted or from one of transformers; see `load`."""
    folder = pathlib.Path(folder).expanduser()
    (part,) = parts(folder, 'clip', variant)
    modules = {name: module.clone(dtype=dtype) for name, module in part.modules.items()}
    tree = _params(part, params_dtype)['params']
    params = {name: {'params': tree[name]} for name in modules}
    return Clip(modules['text'], modules['vision'], params, tokenizer.load(folder))


def _params(part, dtype):
    flat = {path: np.asarray(array, dtype) for path, array in part.arrays}
    return {'params': unflatten_dict(flat, sep='/')}


def schedule(config: Mapping[str, Any], where: str) -> Schedule:
    """The `Schedule` of a `scheduler_config.json`.

    Raises:
        UserError: a schedule that we don't have.
    """
    fixed = {
        'trained_betas': None,
        'rescale_betas_zero_snr': False,
        'timestep_spacing': 'leading',
    }
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise UserError(f'{where}: {key}={config[key]!r}; only {value!r} is supported.')
    names = (('beta_schedule', SCHEDULES, 'linear'), ('prediction_type', PREDICTIONS, 'epsilon'))
    for key, known, default in names:
        if config.get(key, default) not in known:
            raise UserError(f'{where}: {key}={config[key]!r}. Supported: {", ".join(known)}.')
    name = SCHEDULES[config.get('beta_schedule', 'linear')]
    betas = (('beta_start', 0.0001), ('beta_end', 0.02))
    options = tuple((key, config.get(key, default)) for key, default in betas)
    # diffusers' default of set_alpha_to_one is True for DDIM and False for PNDM
    to_one = config.get('set_alpha_to_one', config.get('_class_name') == 'DDIMScheduler')
    return Schedule(
        name,
        config.get('num_train_timesteps', 1000),
        () if name == 'cosine' else options,
        PREDICTIONS[config.get('prediction_type', 'epsilon')],
        0 if to_one else 1,
    )
