"""Classifiers that others trained: their checkpoints in, our variables out, strictly.

`load` takes a checkpoint as it was published, or a folder that `save` wrote. `backbones.LAYOUTS`
says whose names a checkpoint has; then every array must be there, be used, and fit. Nothing that a
file contains is executed.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxood.errors import UserError, blame, lookup, unknown
from jaxood.models import Classifier, layouts
from jaxood.models.backbones import BACKBONES, LAYOUTS
from jaxood.models.heads import HEADS
from jaxood.models.layouts import Preprocessing, Shapes, Target

WEIGHTS, FACTS = 'weights.safetensors', 'model.json'
TORCH = ('.pt', '.pth', '.th', '.tar', '.bin', '.ckpt')
ENDINGS = ('.npz', '.safetensors', *TORCH)
WRAPPERS = ('state_dict', 'model', 'net')  # keys below which a checkpoint may keep its arrays
PREFIXES = ('module.', 'model.', '_orig_mod.')  # of DataParallel, Lightning, torch.compile
LONGEST = 12  # lines of a table of what does not fit, for each kind of misfit
LIKENESS = 0.2  # share of common names from which on a network is worth comparing with (our choice)

# Architectures that we don't have, by the names of their arrays. Only messages read this.
ELSEWHERE = (
    (r'features\.denseblock\d+\..*', "torchvision's DenseNet for ImageNet"),
    (r'features\.\d+\.weight', 'AlexNet or VGG'),
    (r'(.*\.)?visual\..*', 'CLIP'),
    (r'.*relative_position_bias_table', 'a Swin transformer'),
    (r'.*\.(gamma|layer_scale)', 'ConvNeXt'),
)


class Pretrained(NamedTuple):
    """A converted classifier.

    Attributes:
        backbone: its name and keywords, like a config's section.
        head: likewise.
        num_classes: K.
        preprocessing: what its images go through.
        variables: {'params': {'backbone', 'head'}, 'batch_stats': {'backbone'}}, float32; without
            'batch_stats' for a network that has no BatchNorm.
        source: whose names the checkpoint had, e.g. 'hendrycks/outlier-exposure'.
        digest: SHA-256 of backbone and arrays, in hexadecimal: the same whatever file they came in.
            The preprocessing is not part of it.
    """

    backbone: dict[str, Any]
    head: dict[str, Any]
    num_classes: int
    preprocessing: Preprocessing
    variables: dict[str, Any]
    source: str
    digest: str

    def build(self, **keywords) -> Classifier:
        """The network of `variables`. Keywords: the backbone's dtype and axis_name."""
        return _build(self.backbone, self.head, self.num_classes, **keywords)


def load(path: str | os.PathLike, *, origin: str | None = None) -> Pretrained:
    """A folder that `save` wrote, or an original checkpoint.

    Args:
        path: of either.
        origin: whose checkpoint it is, where several sources use the same names and prepare images
            differently; None takes the first one in `backbones.LAYOUTS`.

    Raises:
        UserError: it can't be read, holds code, is of no known architecture, or does not fit it.
    """
    place = pathlib.Path(path).expanduser()
    if not place.exists():
        raise UserError(f'{place}: there is no such file or folder.')
    if place.is_dir():
        with blame(str(place)):
            return _load_folder(place)
    arrays = read(place)
    with blame(str(place)):
        return convert(arrays, origin=origin)


def save(folder: str | os.PathLike, pretrained: Pretrained) -> None:
    """Writes `weights.safetensors`, flat names like 'params/backbone/...', and `model.json`.

    Each file is there whole or not at all, and `model.json` comes last with the weights' digest: a
    save that was interrupted, also one over an earlier save, does not load.
    """
    place = pathlib.Path(folder).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    flat = flatten_dict(pretrained.variables, sep='/')
    # safetensors writes the memory as it lies, transposed or not
    flat = {path: np.ascontiguousarray(array) for path, array in flat.items()}
    facts = pretrained._asdict() | {'preprocessing': pretrained.preprocessing._asdict()}
    del facts['variables']
    _write(place / WEIGHTS, safetensors.numpy.save(flat))
    _write(place / FACTS, (json.dumps(facts, indent=2) + '\n').encode())


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """A checkpoint's arrays by their names, without wrappers and prefixes. Executes nothing.

    Raises:
        UserError: the file can't be read, is empty or truncated, holds code, or is no checkpoint.
    """
    path = pathlib.Path(path).expanduser()
    ending = path.suffix.lower()
    with blame(str(path)):
        if not path.is_file():
            raise UserError('there is no such file.')
        if ending not in ENDINGS:
            raise UserError(unknown(f'the ending {ending!r}', ending, ENDINGS))
        if path.stat().st_size == 0:
            raise UserError('the file is empty. Fetch it again.')
        if ending in TORCH:
            content = _read_torch(path)
        else:
            content = _read_numpy(path, ending)
        if not content:
            raise UserError('it holds no arrays.')
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in content)), None):
        content = {name.removeprefix(prefix): array for name, array in content.items()}
    return content


def _read_numpy(path, ending):
    try:
        if ending == '.safetensors':
            return safetensors.numpy.load_file(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    except Exception as e:  # whatever a parser says of a file that is not what its name says
        refuse(path, e, 'allow_pickle' in str(e))


def torch_tensors(path: str | os.PathLike, *, mmap: bool = False) -> dict[str, Any]:
    """A pickled checkpoint's tensors by their names, below any wrappers. Executes nothing.

    Args:
        path: of the file.
        mmap: whether they stay on the disk until they are used, where the file's format allows it.

    Raises:
        UserError: PyTorch is missing, the file can't be read, holds code, or no arrays.
    """
    try:
        import torch
    except ImportError as e:
        raise UserError(
            'reading it needs PyTorch: pip install "jaxood[parity]". Or save its arrays as '
            '.safetensors or .npz where PyTorch is.'
        ) from e
    mmap = mmap and zipfile.is_zipfile(path)
    try:
        content = torch.load(path, weights_only=True, map_location='cpu', mmap=mmap)
    except Exception as e:
        refuse(path, e, isinstance(e, pickle.UnpicklingError))
    if not isinstance(content, Mapping):
        raise UserError(f'it holds a {type(content).__name__}, not arrays with names.')
    while inner := [content[k] for k in WRAPPERS if isinstance(content.get(k), Mapping)]:
        content = inner[0]
    tensors = {str(k): v.detach() for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise UserError(
            f'it holds no arrays, but {", ".join(map(str, content)) or "nothing"}. They are looked '
            f'for at the top and below {", ".join(WRAPPERS)}.'
        )
    return tensors


def _read_torch(path):
    tensors = torch_tensors(path)
    floats = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}  # bfloat16
    return {name: tensor.numpy() for name, tensor in floats.items()}


def refuse(path, error, objects):
    """Raises the `UserError` for a file that a parser did not take, perhaps because of objects."""
    with open(path, 'rb') as f:
        pickled = f.read(1) == b'\x80' or zipfile.is_zipfile(path)
    if objects and pickled:
        named = re.search(r'GLOBAL (\S+)', str(error))
        what = f' ({named[1]})' if named else ''
        raise UserError(
            f'it holds Python objects{what}, not arrays alone, and these can be code: refused, '
            'nothing of it was run. Where you trust it, save its arrays by themselves, e.g. '
            'torch.save(model.state_dict(), "weights.pt").'
        ) from error
    # The first line alone, and none that advises to load objects
    first = '' if objects else f': {(str(error).splitlines() or [""])[0][:200]}'
    raise UserError(
        'it is not what its ending says, or truncated. Fetch it again and compare its checksum. '
        f'({type(error).__name__}{first})'
    ) from error


def origins(shapes: Shapes) -> list[str]:
    """The sources whose names and shapes these are, the one taken for granted first."""
    return [layout.source for layout in LAYOUTS if layout.recognise(shapes) is not None]


def convert(arrays: Mapping[str, np.ndarray], *, origin: str | None = None) -> Pretrained:
    """Recognises a checkpoint's arrays and turns all of them into variables.

    Args:
        arrays: as `read` gives them.
        origin: see `load`.

    Raises:
        UserError: of no known architecture, or not exactly the arrays that it has.
    """
    shapes = {name: array.shape for name, array in arrays.items()}
    layout, keywords = _recognise(shapes, origin)
    backbone, head = {'name': layout.backbone, **keywords}, {'name': 'linear'}
    targets = layout.targets(keywords, shapes)
    num_classes = _num_classes(targets, arrays)
    preprocessing = layout.preprocessing(num_classes)
    wanted = _shapes(backbone, head, num_classes, preprocessing)

    flat, misfits = {}, []
    for name, target in targets.items():
        expected = wanted[target.path]
        array = _converted(target, arrays[name]) if name in arrays else None
        if array is not None and array.shape == expected:
            flat[target.path] = np.ascontiguousarray(array, np.float32)
            if not np.isfinite(flat[target.path]).all():
                misfits.append((name, 'not finite', 'finite numbers'))
        else:
            misfits.append((name, shapes.get(name, 'missing'), _original(target, expected)))
    ignored = re.compile('|'.join(layout.ignored))
    unused = (n for n in shapes if n not in targets and not ignored.fullmatch(n))
    misfits += [(name, shapes[name], 'unused') for name in unused]
    if misfits:
        raise UserError(
            f'its names are those of {words(backbone)} by {layout.source}, but it is not that:\n'
            f'{table(misfits)}\nGive one whole classifier of that architecture.'
        )
    digest = _digest(backbone, flat)
    variables = unflatten_dict(flat, sep='/')
    return Pretrained(backbone, head, num_classes, preprocessing, variables, layout.source, digest)


def _recognise(shapes, origin):
    """The layout, and its backbone's keywords."""
    tried = ((layout, layout.recognise(shapes)) for layout in LAYOUTS)
    found = {layout.source: (layout, k) for layout, k in tried if k is not None}
    if not found:
        raise UserError(_unrecognised(shapes))
    first = next(iter(found))
    return lookup(found, origin or first, 'for a checkpoint with these names, the origin')


def _num_classes(targets, arrays):
    """K, from the last layer's bias or, where that is missing, from its kernel."""
    for wanted in ('params/head/bias', 'params/head/kernel'):
        for name, target in targets.items():
            if target.path == wanted and name in arrays:
                array = _converted(target, arrays[name])
                if array is not None and array.ndim:
                    return array.shape[-1]
    names = ', '.join(n for n, target in targets.items() if target.path.startswith('params/head/'))
    raise UserError(f'it has no last layer ({names}), hence no classes. Give a whole classifier.')


def _converted(target: Target, array: np.ndarray) -> np.ndarray | None:
    """What our network gets, or None for an array of another rank."""
    try:
        return target.convert(array)
    except ValueError:
        return None


def _original(target: Target, shape: tuple[int, ...]):
    """The shape that becomes `shape`, for a message."""
    if target.convert is layouts.conv:
        return (shape[3], shape[2], *shape[:2])
    if target.convert is layouts.linear:
        return shape[::-1]
    return shape if target.convert is layouts.same else f'{shape} when converted'


def table(misfits):
    """Name, what is here, what would be right: one line each, the same kind together."""
    kinds = {}
    for row in misfits:
        kind = row[1] if row[1] in ('missing', 'not finite') else row[2] == 'unused'
        kinds.setdefault(kind, []).append(row)
    rows = [('name', 'here', 'expected')]
    for same in kinds.values():
        rows += same[:LONGEST]
        if len(same) > LONGEST:
            rows.append((f'... and {len(same) - LONGEST} more like these', '', ''))
    width = max(len(row[0]) for row in rows)
    lines = (f'  {name:<{width}}  {here!s:<20}  {right}' for name, here, right in rows)
    return '\n'.join(line.rstrip() for line in lines)


def words(backbone: Mapping[str, Any]) -> str:
    """A section for people: 'resnet (blocks=(3, 3, 3), width=16)'."""
    keywords = ', '.join(f'{k}={v}' for k, v in backbone.items() if k != 'name')
    return f'{backbone["name"]} ({keywords})'


def _unrecognised(shapes):
    """What it looks like instead, and which layers of the nearest known network disagree."""
    facts = [f'{len(shapes)} arrays']
    for what, rank in (('convolution', 4), ('matrix', 2)):
        found = [(name, shape) for name, shape in shapes.items() if len(shape) == rank]
        if found:
            name, shape = found[0 if rank == 4 else -1]
            facts.append(f'the {"first" if rank == 4 else "last"} {what} {name} {shape}')
    family = next((w for r, w in ELSEWHERE if any(re.fullmatch(r, n) for n in shapes)), None)
    looks = f'It looks like {family}: ' if family else 'It has '
    message = f'its names are of no known classifier. {looks}{", ".join(facts)}.'

    def kinds(names):  # 'layer1.#.conv1.weight', for networks of any depth
        return {re.sub(r'(?<=[._])\d+(?=[./])', '#', name): name for name in names}

    def compare(layout):  # with the usual form of its network
        fields = dataclasses.fields(BACKBONES[layout.backbone])
        common = ('dtype', 'axis_name', 'parent', 'name')
        keywords = {f.name: f.default for f in fields if f.name not in common}
        ignored = re.compile('|'.join(layout.ignored))
        here = kinds(name for name in shapes if not ignored.fullmatch(name))
        theirs = kinds(layout.targets(keywords, shapes))
        return len(theirs.keys() & here.keys()) / len(theirs.keys() | here.keys()), theirs, here

    nearest = max(LAYOUTS, key=lambda layout: compare(layout)[0])
    overlap, theirs, here = compare(nearest)
    if overlap > LIKENESS:
        misfits = [(kind, 'missing', '') for kind in theirs if kind not in here]
        misfits += [(kind, shapes[here[kind]], 'unused') for kind in here if kind not in theirs]
        message += (
            f'\nNearest is {nearest.backbone} by {nearest.source}, with {overlap:.0%} of the names '
            f'in common. These disagree (# is any number):\n{table(misfits)}'
        )
    known = {}
    for layout in LAYOUTS:
        known.setdefault(layout.backbone, {})[layout.source] = None  # in order, once
    known = ', '.join(f'{backbone} ({", ".join(sources)})' for backbone, sources in known.items())
    return f'{message}\nKnown: {known}.'


def _build(backbone, head, num_classes, **keywords):
    """Sections -> network."""
    own = {k: v for k, v in backbone.items() if k != 'name'}
    kind = lookup(BACKBONES, backbone['name'], 'the backbone')
    return Classifier(kind(**own, **keywords), lookup(HEADS, head['name'], 'the head')(num_classes))


def _shapes(backbone, head, num_classes, preprocessing) -> Shapes:
    """The shape of every array of a network, by its path."""
    model = _build(backbone, head, num_classes)
    size, channels = preprocessing.size, len(preprocessing.mean)
    images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    tree = jax.eval_shape(lambda k, x: model.init(k, x, train=False), key, images)
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep='/').items()}


def _digest(backbone, flat):
    sha = hashlib.sha256(json.dumps(backbone, sort_keys=True).encode())
    for path in sorted(flat):
        sha.update(f'{path} {flat[path].shape}'.encode())
        sha.update(flat[path].astype('<f4').tobytes())
    return sha.hexdigest()


def _load_folder(folder):
    """Reads what `save` wrote, and checks every array against the architecture."""
    again = 'Convert the original checkpoint again.'
    if not (folder / FACTS).exists() or not (folder / WEIGHTS).exists():
        raise UserError(
            f'a folder that `python -m jaxood.convert` wrote has {FACTS} and {WEIGHTS}; this is '
            f'none, or the conversion was interrupted. {again}'
        )
    try:
        facts = json.loads((folder / FACTS).read_text())
        for section in ('backbone', 'preprocessing'):  # JSON has no tuples
            items = facts[section].items()
            facts[section] = {k: tuple(v) if isinstance(v, list) else v for k, v in items}
        facts['preprocessing'] = Preprocessing(**facts['preprocessing'])
        found = Pretrained(**facts, variables={})
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{FACTS} is not what `save` wrote ({e}). {again}') from e
    flat = _read_numpy(folder / WEIGHTS, '.safetensors')
    shapes = {path: array.shape for path, array in flat.items()}
    wanted = _shapes(found.backbone, found.head, found.num_classes, found.preprocessing)
    misfits = [
        (path, shapes.get(path, 'missing'), wanted.get(path, 'unused'))
        for path in sorted(shapes.keys() | wanted.keys())
        if shapes.get(path) != wanted.get(path)
    ]
    if misfits:
        raise UserError(f'{WEIGHTS} does not fit {FACTS}:\n{table(misfits)}\n{again}')
    if _digest(found.backbone, flat) != found.digest:
        raise UserError(
            f'{WEIGHTS} holds other numbers than {FACTS} was written for: the conversion was '
            f'interrupted, or one of them exchanged. {again}'
        )
    return found._replace(variables=unflatten_dict(flat, sep='/'))


def _write(path, content):
    """The file is there whole or not at all, also after a kill."""
    part = path.with_name(f'{path.name}.part')
    with open(part, 'wb') as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
