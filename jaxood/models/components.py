"""Networks as diffusers and transformers keep them: a `config.json`, and arrays by their names.

A `Component` says what one folder holds. Our modules are named like theirs, so that `theirs` tells
the name of every array of ours; then each must be there, be used, and fit. Arrays are read one at a
time and keep their type.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict

from jaxood.errors import UserError, blame
from jaxood.models import pretrained
from jaxood.models.clip import text, vision
from jaxood.models.stable_diffusion import unet, vae

CONFIG = 'config.json'
_NUMBERED = re.compile(
    r'(blocks|resnets|attentions|downsamplers|upsamplers|to_out|net|layers)_(\d+)_?'
)
_ARRAY = re.compile(r'(?<=\.)(kernel|scale|embedding)$')
_OLD_VAE = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}
TYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
ENDINGS = ('.safetensors', '.bin', '.ckpt')
POINTER = b'version https://git-lfs'  # how a Git LFS pointer begins


class Target(NamedTuple):
    """An array of ours.

    Attributes:
        path: e.g. 'encoder/layers_0/mlp/fc1/kernel'.
        shape: of it.
        is_flax: whether it is stored in Flax's layout already.
    """

    path: str
    shape: tuple[int, ...]
    is_flax: bool = False

    def ours(self, array: np.ndarray) -> np.ndarray:
        """PyTorch's layout -> Flax's. A matrix may have been kept as a 1x1 convolution."""
        if self.is_flax or not self.path.endswith('/kernel'):
            return array
        if len(self.shape) == 2:
            return array.reshape(array.shape[:2]).T if array.shape[2:] == (1, 1) else array.T
        return array.transpose(2, 3, 1, 0)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """Flax's layout -> PyTorch's."""
        if self.is_flax or not self.path.endswith('/kernel'):
            return array
        return array.T if len(self.shape) == 2 else array.transpose(3, 2, 0, 1)


class Component(NamedTuple):
    """What a folder with a `config.json` holds.

    Attributes:
        build: (config, **keywords) -> tree name -> Flax module; the name is '' where there is one.
        targets: modules -> name of theirs -> `Target`, for every array.
        files: what weights may be called, without ending.
        optional: a prefix that all names may have or lack.
        renamed: their old name -> their name.
        ignored: names (full match) that may be there and are not used.
    """

    build: Callable[..., dict[str, Any]]
    targets: Callable[[Mapping[str, Any]], dict[str, Target]]
    files: tuple[str, ...]
    optional: str = ''
    renamed: Callable[[str], str] = str
    ignored: str = r'.*position_ids'


def theirs(path: str) -> str:
    """Their name for an array of ours.

    'down_blocks_0_resnets_1/conv1/kernel' -> 'down_blocks.0.resnets.1.conv1.weight'.
    """
    name = path.replace('mid_block_', 'mid_block.').replace('/', '.')
    name = _NUMBERED.sub(r'\1.\2.', name).replace('..', '.')
    return _ARRAY.sub('weight', name)


def shapes(module, *inputs) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of a module; nothing is computed."""
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))['params']
    return {path: leaf.shape for path, leaf in flatten_dict(made, sep='/').items()}


def _unet(modules):
    (module,) = modules.values()
    size = 2 ** len(module.channels)
    x, t = jnp.zeros((1, size, size, module.in_channels)), jnp.ones(1, jnp.int32)
    found = shapes(module, x, t, jnp.zeros((1, 1, module.context_width)))
    return {theirs(path): Target(path, shape) for path, shape in found.items()}


def _vae(modules):
    (module,) = modules.values()
    size = 2 * module.factor
    found = shapes(module, jnp.zeros((1, size, size, module.image_channels)))
    return {theirs(path): Target(path, shape) for path, shape in found.items()}


def _text(modules, ours=''):
    found = shapes(modules[ours.removesuffix('/')], jnp.zeros((1, 1), jnp.int32))
    root = lambda path: '' if path.startswith('text_projection') else 'text_model.'
    return {root(p) + theirs(p): Target(ours + p, shape) for p, shape in found.items()}


def _vision(modules, ours=''):
    module = modules[ours.removesuffix('/')]
    found = shapes(module, jnp.zeros((1, module.size, module.size, module.image_channels)))
    root = lambda path: '' if path.startswith('visual_projection') else 'vision_model.'
    return {root(p) + theirs(p): Target(ours + p, shape) for p, shape in found.items()}


def _clip(modules):
    """Both encoders and the temperature of their similarities (log)."""
    scale = {'logit_scale': Target('logit_scale', ())}
    return _text(modules, 'text/') | _vision(modules, 'vision/') | scale


def _build_text(config, **keywords):
    projection = 'CLIPTextModelWithProjection' in (config.get('architectures') or ())
    return {'': text.from_config(config, projection=projection, **keywords)}


def _build_clip(config, **keywords):
    """A CLIP's `config.json` holds the two encoders' own."""
    if 'text_config' not in config or 'vision_config' not in config:
        raise UserError(
            f'it has no text_config and vision_config, so it is no CLIP but {kind_of(config)}.'
        )
    width = {'projection_dim': config.get('projection_dim', 512)}
    own = lambda key: {**(config.get(key) or {}), **width}
    return {
        'text': text.from_config(own('text_config'), projection=True, **keywords),
        'vision': vision.from_config(own('vision_config'), projection=True, **keywords),
    }


def _new_vae_name(name):
    """Attention's arrays before diffusers 0.12: 'query', 'key', 'value', 'proj_attn'."""
    found = re.search(r'(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)', name)
    return name.replace(found[0], _OLD_VAE[found[0]]) if found and 'attentions' in name else name


DIFFUSERS, TRANSFORMERS = ('diffusion_pytorch_model',), ('model', 'pytorch_model')
COMPONENTS = {
    'unet': Component(lambda c, **k: {'': unet.from_config(c, **k)}, _unet, DIFFUSERS),
    'vae': Component(
        lambda c, **k: {'': vae.from_config(c, **k)}, _vae, DIFFUSERS, renamed=_new_vae_name
    ),
    'text_encoder': Component(_build_text, _text, TRANSFORMERS, optional='text_model.'),
    'clip': Component(_build_clip, _clip, TRANSFORMERS),
}


def kind_of(config: Mapping[str, Any]) -> str:
    """What a `config.json` describes, for messages."""
    named = config.get('_class_name') or config.get('architectures') or config.get('model_type')
    return str(named[0] if isinstance(named, list) else named or 'something unnamed')


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        UserError: it is missing, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise UserError(f'{path}: there is no such file.') from e
    except ValueError as e:
        raise UserError(f'{path}: it is no JSON, or damaged ({e}). Fetch it again.') from e
    if not isinstance(content, dict):
        raise UserError(f'{path}: it holds no JSON object. Fetch it again.')
    return content


class Arrays:
    """The arrays of one or more files, read one at a time.

    Attributes:
        shapes: name -> shape; `renamed` has been applied.
        dtypes: name -> NumPy's name of the type.
        files: where they come from.
    """

    def __init__(self, files: Iterable[pathlib.Path], renamed: Callable[[str], str] = str):
        self.files = tuple(files)
        self.shapes, self.dtypes, self._read = {}, {}, {}
        for file in self.files:
            with blame(str(file)):
                for original, shape, dtype, read in _opened(file):
                    name = renamed(original)
                    self.shapes[name], self.dtypes[name], self._read[name] = shape, dtype, read

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read[name]()


def _opened(file: pathlib.Path) -> Iterator[tuple[str, tuple[int, ...], str, Callable]]:
    """(name, shape, type, function that reads) of every array of a file."""
    if not file.is_file():
        raise UserError('there is no such file, though an index or a folder promises it.')
    with open(file, 'rb') as f:
        if f.read(len(POINTER)) == POINTER:
            raise UserError(
                'it is a Git LFS pointer, not the weights. Run `git lfs pull` in its repository, '
                'or download it through huggingface_hub.'
            )
    if file.suffix == '.safetensors':
        try:
            opened = safetensors.safe_open(file, 'np')
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                dtype = TYPES.get(dtype, dtype)
                yield name, shape, dtype, lambda name=name: opened.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as e:
            pretrained.refuse(file, e, False)
        return
    for name, tensor in pretrained.torch_tensors(file, mmap=True).items():
        dtype = str(tensor.dtype).removeprefix('torch.')
        yield name, tuple(tensor.shape), dtype, lambda tensor=tensor: _numpy(tensor)


def _numpy(tensor):
    """A PyTorch tensor as an array; NumPy has no bfloat16, JAX's has."""
    if str(tensor.dtype) == 'torch.bfloat16':
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def weight_files(
    folder: pathlib.Path, stems: Iterable[str], variant: str | None
) -> list[pathlib.Path]:
    """The files with a component's weights: one, or the shards that an index names.

    Args:
        folder: of the component.
        stems: what they may be called, without endings.
        variant: e.g. 'fp16', for 'model.fp16.safetensors'.

    Raises:
        UserError: there are none, with what there is.
    """
    middle = f'.{variant}' if variant else ''
    for ending in ENDINGS:
        for stem in stems:
            if (single := folder / f'{stem}{middle}{ending}').exists():
                return [single]
            for index in (f'{ending}.index{middle}', f'{middle}{ending}.index'):
                if (path := folder / f'{stem}{index}.json').exists():
                    named = read_json(path).get('weight_map', {}).values()
                    return [folder / name for name in sorted(set(named))]
    there = sorted(p.name for p in folder.glob('*') if p.suffix in ENDINGS)
    variants = {m[1] for name in there if (m := re.match(r'\w+\.(\w+)(-\d+-of-\d+)?\.\w+$', name))}
    hint = f' Give --variant={sorted(variants)[0]}.' if variants - {variant} else ' Download it.'
    raise UserError(
        f'{folder}: there are no weights {next(iter(stems))}{middle}.safetensors, but '
        f'{", ".join(there) or "no weights at all"}.{hint}'
    )


def convert(
    component: Component,
    targets: Mapping[str, Target],
    arrays: Arrays,
    network: str = f'the network that {CONFIG} describes',
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of every array of ours, in order, each converted when it is asked for.

    Args:
        network: what it is to be, for messages.

    Raises:
        UserError: not exactly the arrays that the network has, or numbers that are not finite.
    """
    found = {_rooted(component, targets, name): name for name in arrays.shapes}
    misfits = []
    for name, target in targets.items():
        shape = arrays.shapes.get(found.get(name))
        if shape is None or _shape_of_ours(target, shape) != target.shape:
            here = 'missing' if shape is None else shape
            misfits.append((name, here, shape_of_theirs(target)))
        elif (dtype := arrays.dtypes[found[name]]) not in TYPES.values():
            misfits.append((name, dtype, ' or '.join(TYPES.values())))
    for name, original in found.items():
        if name not in targets and not re.fullmatch(component.ignored, name):
            misfits.append((original, arrays.shapes[original], 'unused'))
    where = arrays.files[0] if len(arrays.files) == 1 else arrays.files[0].parent
    if misfits:
        raise UserError(
            f'{where}: the arrays are not those of {network}:\n{pretrained.table(misfits)}'
        )

    def each():
        for name, target in targets.items():
            array = np.asarray(target.ours(arrays[found[name]]), order='C')
            if not np.isfinite(array.astype(np.float32)).all():
                raise UserError(f'{where}: {name} holds numbers that are not finite.')
            yield target.path, array

    return each()


def _rooted(component, targets, name):
    """The name with the optional prefix, where it lacks it."""
    with_prefix = component.optional + name
    return with_prefix if name not in targets and with_prefix in targets else name


def _shape_of_ours(target, shape):
    try:
        return target.ours(np.broadcast_to(np.float32(0), shape)).shape
    except ValueError:
        return None


def shape_of_theirs(target: Target) -> tuple[int, ...]:
    """The shape that becomes the target's."""
    return target.theirs(np.broadcast_to(np.float32(0), target.shape)).shape
