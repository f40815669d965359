"""Turns what others trained into jaxood's own files.

    python -m jaxood.convert classifier --source=checkpoint.pth --out=weights/densenet
    python -m jaxood.convert stable-diffusion --source=FOLDER_OR_HUB_ID --out=weights/sd15 --verify
    python -m jaxood.convert clip --source=FOLDER_OR_HUB_ID --out=weights/clip

`classifier`: a PyTorch (.pt .pth .th .tar .bin .ckpt), .safetensors or .npz checkpoint of an image
classifier. Architecture and naming are recognised; every array must be there, be used, and fit;
code in pickles is refused. `--out` becomes a folder with weights.safetensors and model.json, which
holds the network's keywords and how its images are prepared: size, mean, standard deviation.

`stable-diffusion`: a pipeline folder of diffusers, Stable Diffusion 1.x or 2.x of any size, with
safetensors in float32, float16 or bfloat16, whole or sharded, or with .bin or .ckpt (these need
PyTorch). A hub id is downloaded (only what is needed) from huggingface.co, for example

    stable-diffusion-v1-5/stable-diffusion-v1-5   4.3 GB, 2.1 GB with --variant=fp16; with the
    CompVis/stable-diffusion-v1-4                 licence CreativeML Open RAIL-M

`--source` may also be one file with the original names (model.diffusion_model.*), Stable Diffusion
1.x such as v1-5-pruned-emaonly.safetensors or .ckpt (this needs PyTorch). Then --config-from=FOLDER
gives what the file lacks: CLIP's vocab.json and merges.txt, from openai/clip-vit-large-patch14, for
the sizes of 1.x; or a pipeline folder, with or without weights, for all but the weights.

Without that site get the same files by other means (model_index.json; scheduler, tokenizer,
text_encoder, unet and vae with all they hold) and give the folder. `--out` has the same layout,
the weights with Flax's names; `--to-diffusers` writes diffusers' back from it, bit for bit.

`clip`: both encoders, from a folder of transformers or a hub id:

    openai/clip-vit-large-patch14                 1.7 GB, the text encoder of Stable Diffusion 1.x
                                                  with its projection, and the image encoder

`--verify` computes the same with the original in PyTorch, each network and one whole sampling, and
prints the differences; nothing is written where they are too large. Without PyTorch it checks that
all outputs are finite.
"""

import pathlib
import re
import sys
import tempfile

from absl import flags

from jaxood.errors import UserError, blame, lookup, unknown
from jaxood.main import read_flags, run_command

FLAGS = flags.FlagValues()
flags.DEFINE_string('source', None, 'Checkpoint, folder, or hub id to convert.', flag_values=FLAGS)
flags.DEFINE_string('out', None, 'Folder to write.', flag_values=FLAGS)
flags.DEFINE_bool('verify', False, 'Compare with the original, in PyTorch.', flag_values=FLAGS)
flags.DEFINE_string(
    'origin',
    None,
    'Whose checkpoint a classifier is, where names are the same and the preparation of images is '
    'not.',
    flag_values=FLAGS,
)
flags.DEFINE_list('mean', None, 'Of pixels in [0, 1], e.g. 0.49,0.48,0.45.', flag_values=FLAGS)
flags.DEFINE_list('std', None, 'Of pixels in [0, 1], e.g. 0.25,0.24,0.26.', flag_values=FLAGS)
flags.DEFINE_string('variant', None, 'Of the weight files, e.g. fp16.', flag_values=FLAGS)
flags.DEFINE_string(
    'config-from',
    None,
    'Folder with the tokenizer (vocab.json, merges.txt) of a single file, or with a pipeline like '
    'it: its configs, too, are then taken.',
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    'to-diffusers',
    False,
    'From a converted folder, or from a single file, to diffusers.',
    flag_values=FLAGS,
)

TOLERANCE = 1e-3  # of --verify: largest difference of outputs over the largest output
SAMPLING_TOLERANCE = 1e-2  # of a whole sampling


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for what the user can mend."""
    return run_command(parse, execute, sys.argv if argv is None else argv)


def parse(argv: list[str]):
    """What to convert, then the flags -> the function, source, out, and its keywords."""
    words = read_flags(FLAGS, argv, __doc__)
    if not words or words[0] not in KINDS:
        raise UserError(unknown('what to convert', words[0] if words else '', KINDS))
    if words[1:]:
        raise UserError(f'{words[1]!r} is not a flag. All arguments but the first start with --.')
    if FLAGS.source is None or FLAGS.out is None:
        raise UserError('--source and --out are needed: what to convert, and a folder to write.')
    convert, takes = KINDS[words[0]]
    given = {name for name in FLAGS if FLAGS[name].present}
    for name in sorted(given - {*takes, 'source', 'out'}):
        raise UserError(f'--{name} says nothing to {words[0]}, which takes {", ".join(takes)}.')
    values = {name: FLAGS[name].value for name in takes}
    values |= {name: _numbers(name) for name in ('mean', 'std') if name in takes}
    return convert, FLAGS.source, FLAGS.out, values


def _numbers(name):
    """The three numbers of a flag, or None."""
    words = FLAGS[name].value
    try:
        numbers = words and tuple(float(word) for word in words)
    except ValueError as e:
        raise UserError(f'--{name}={",".join(words)}: {e}.') from e
    if numbers and (len(numbers) != 3 or min(numbers) < 0.0 or max(numbers) > 1.0):
        raise UserError(
            f'--{name}={",".join(words)} must be three numbers between 0 and 1, one a channel. '
            'Divide those for pixels up to 255 by 255.'
        )
    if name == 'std' and numbers and min(numbers) == 0.0:
        raise UserError(f'--std={",".join(words)} must be above 0: images are divided by it.')
    return numbers


def execute(convert, source: str, out: str, values: dict) -> None:
    """Runs one of `KINDS`."""
    convert(source, out, **{name.replace('-', '_'): value for name, value in values.items()})


def classifier(source: str, out: str, *, verify: bool, origin: str | None, mean, std) -> None:
    """Converts a checkpoint, and says what it was.

    Args:
        source, out: file and folder.
        verify: whether to compare with the original first.
        origin: see `pretrained.load`.
        mean, std: three numbers each, or None for those of the source.

    Raises:
        UserError: see `pretrained.load`; or ours and the original differ.
    """
    import jax  # noqa: PLC0415 - takes a second

    from jaxood.models import pretrained  # noqa: PLC0415

    arrays = pretrained.read(source)
    with blame(source):
        found = pretrained.convert(arrays, origin=origin)
    given = {name: v for name, v in (('mean', mean), ('std', std)) if v is not None}
    found = found._replace(preprocessing=found.preprocessing._replace(**given))
    count = sum(x.size for x in jax.tree.leaves(found.variables['params']))
    _say('network', pretrained.words(found.backbone))
    _say('names of', found.source)
    for other in pretrained.origins({name: array.shape for name, array in arrays.items()}):
        if other != found.source:
            _say('', f'and {other}: if it is theirs, --origin={other} takes their preprocessing')
    _say('parameters', f'{count:,}')
    _say('classes', found.num_classes)
    for name, value in found.preprocessing._asdict().items():
        _say(name, value)
    if verify:
        absolute, relative = _differences(arrays, found)
        _say('verified', f'logits differ by at most {absolute:.1e}, relatively {relative:.1e}')
        if not relative <= TOLERANCE:
            raise UserError(
                f'{source}: the logits differ from those of the original by {relative:.1e} of the '
                f'largest; {TOLERANCE:.0e} is allowed. Nothing was written. This is a defect of '
                'jaxood: please report it with the checkpoint.'
            )
    pretrained.save(out, found)
    _say('written to', out)


def _say(what, value):
    print(f'{what:<15}{value}', flush=True)


def _differences(arrays, found) -> tuple[float, float]:
    """The largest difference of logits from the original's, and the same over the largest logit."""
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    try:
        import torch  # noqa: PLC0415

        from jaxood.models.torch_originals import ORIGINALS  # noqa: PLC0415
    except ImportError as e:
        raise UserError('--verify needs PyTorch: pip install "jaxood[parity]".') from e
    size, channels = found.preprocessing.size, len(found.preprocessing.mean)
    images = np.random.default_rng(0).standard_normal((4, size, size, channels), np.float32)
    keywords = dict(found.backbone)
    original = ORIGINALS[keywords.pop('name')]
    state = {k: torch.from_numpy(np.array(array, np.float32)) for k, array in arrays.items()}
    with torch.no_grad():
        theirs = original(state, keywords, torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    apply = jax.jit(lambda variables, x: found.build().apply(variables, x, train=False))
    absolute = np.abs(apply(found.variables, images)['logits'] - theirs).max()
    return float(absolute), float(absolute / np.abs(theirs).max())


def stable_diffusion(source: str, out: str, *, config_from: str | None, **keywords) -> None:
    """Converts a pipeline, a folder or a single file; see `_folder`.

    Args:
        config_from: of a single file, the folder with its tokenizer, see `fresh.frame`, or with a
            pipeline like it.

    Raises:
        UserError: what a single file needs is not there, or was given to something else.
    """
    from jaxood.models.stable_diffusion import folder, fresh  # noqa: PLC0415

    file = pathlib.Path(source).expanduser()
    if not file.is_file():
        if config_from is not None:
            raise UserError(f'--config-from is for a single file, and {source} is none.')
        return _folder('stable-diffusion', source, out, **keywords)
    if keywords['variant'] is not None:
        raise UserError(f'--variant is for a folder, and {source} is a single file.')
    arrays = folder.open_single(file)  # another model is named before anything is asked for
    if config_from is None:
        raise UserError(f'{source}: --config-from is needed. {fresh.NO_WORDS}')
    frame = pathlib.Path(config_from).expanduser()
    with tempfile.TemporaryDirectory() as scratch:
        if not (frame / folder.INDEX).exists():
            fresh.frame(pathlib.Path(scratch), frame)
            frame = scratch
        return _folder('stable-diffusion', str(frame), out, single=arrays, **keywords)


def clip(source: str, out: str, **keywords) -> None:
    """Converts a CLIP; see `_folder`."""
    _folder('clip', source, out, **keywords)


def _folder(
    kind: str,
    source: str,
    out: str,
    *,
    verify: bool,
    variant: str | None,
    to_diffusers: bool,
    single=None,
) -> None:
    """Converts a folder of several networks, one array at a time, and says what it was.

    Args:
        kind: a key of `folder.KINDS`.
        source: a folder of diffusers or transformers, a hub id, or a folder of ours.
        out: folder to write.
        verify: whether to compare with the original first.
        variant: of the weight files.
        to_diffusers: the other way round; of a single file, its weights in diffusers' names.
        single: see `folder.single`, where the weights are in one file and the source is its frame.

    Raises:
        UserError: see `folder.parts`, `folder.single` and `folder.save`; or ours and the original
            differ.
    """
    from jaxood.models.clip import tokenizer  # noqa: PLC0415 - imports JAX, which takes a second
    from jaxood.models.stable_diffusion import folder  # noqa: PLC0415

    place, target = fetch(source, kind, variant), pathlib.Path(out).expanduser()
    if target.exists() and target.samefile(place):
        raise UserError(f'--out={out} is the source itself. Choose another folder.')
    if single is None:
        read = lambda: folder.parts(place, kind, variant)
    else:
        read = lambda: folder.single(single, place)
    found = read()
    if to_diffusers and single is None and not folder.is_ours(place):
        raise UserError(f'{place}: these are the names of diffusers already.')
    words = tokenizer.load(place / 'tokenizer' if kind == 'stable-diffusion' else place)
    for part in found:
        types = ', '.join(sorted(set(part.dtypes.values())))
        _say(part.name, f'{part.parameters:,} parameters, {types}')
    _say('tokens', f'{words.size:,}')
    if verify:
        _verify(kind, place, variant, read, single)
    folder.save(target, place, found, to_diffusers=to_diffusers)
    _say('written to', target)


def _verify(kind, place, variant, read, single):
    """Prints how far ours is from the original, or that nothing is infinite.

    Args:
        read: makes the parts anew.
        single: see `_folder`.

    Raises:
        UserError: it is too far, or something is.
    """
    from jaxood.models.stable_diffusion import folder, originals  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as scratch:
        ours = theirs = place
        if single is not None:  # only PyTorch reads it as it is
            ours, theirs = pathlib.Path(scratch), single.files[0]
            folder.save(ours, place, read())
        elif folder.is_ours(place):  # PyTorch reads only its own
            theirs = pathlib.Path(scratch)
            folder.save(theirs, place, read(), to_diffusers=True)
        found = originals.compare(kind, ours, theirs, variant)
        if found is None:
            originals.check_finite(kind, ours, variant)
    if found is None:
        _say('verified', 'names, shapes, and that outputs are finite. PyTorch, diffusers and')
        _say('', 'transformers would compare them: pip install "jaxood[parity]"')
        return
    for name, relative in found.items():
        _say('verified', f'{name} differs from the original by {relative:.1e} of its largest value')
    where = place if single is None else single.files[0]
    worst = {name: r for name, r in found.items() if not r <= _allowed(name)}
    if worst:
        raise UserError(
            f'{where}: {", ".join(worst)} computes something else than the original. Nothing was '
            'written. This is a defect of jaxood: please report it with the weights.'
        )


def _allowed(name):
    return SAMPLING_TOLERANCE if 'sampling' in name else TOLERANCE


def fetch(source: str, kind: str, variant: str | None = None) -> pathlib.Path:
    """A folder as it is; a hub id is downloaded first.

    Raises:
        UserError: it is neither, or the download failed.
    """
    place = pathlib.Path(source).expanduser()
    if place.exists():
        return place
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', source):
        raise UserError(f'{source}: there is no such folder, and it is no hub id (OWNER/NAME).')
    import huggingface_hub  # noqa: PLC0415 - takes a second

    _say('downloading', f'{source} from huggingface.co')
    try:
        patterns = lookup(PATTERNS, kind, 'the kind')(f'.{variant}' if variant else '')
        return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except Exception as e:  # whatever goes wrong between here and there
        first = (str(e).splitlines() or [''])[0][:300]
        raise UserError(
            f'{source}: there is no such folder here, and the download from huggingface.co failed '
            f'({type(e).__name__}: {first}). `--help` says what to fetch by other means.'
        ) from e


def _weights(stem, variant):
    """Patterns of a component's weights: whole, or sharded."""
    index = (f'{stem}.safetensors.index{variant}.json', f'{stem}{variant}.safetensors.index.json')
    shards = f'{stem}{variant}-?????-of-?????.safetensors'
    return [f'{stem}{variant}.safetensors', shards, *index]


def _pipeline_patterns(variant):
    stems = ('text_encoder/model', *(f'{n}/diffusion_pytorch_model' for n in ('unet', 'vae')))
    files = ['model_index.json', 'scheduler/*.json', 'tokenizer/*', '*/config.json']
    return files + [pattern for stem in stems for pattern in _weights(stem, variant)]


def _clip_patterns(variant):
    return ['*.json', 'merges.txt', *_weights('model', variant)]


PATTERNS = {'stable-diffusion': _pipeline_patterns, 'clip': _clip_patterns}  # what to download
FOLDERS = ('verify', 'variant', 'to-diffusers')
KINDS = {  # what there is to convert, and the flags it takes beside --source and --out
    'classifier': (classifier, ('verify', 'origin', 'mean', 'std')),
    'stable-diffusion': (stable_diffusion, (*FOLDERS, 'config-from')),
    'clip': (clip, FOLDERS),
}


if __name__ == '__main__':
    sys.exit(main())
