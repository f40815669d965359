"""Turns what others trained into jaxood's own files.

    python -m jaxood.convert classifier --source=checkpoint.pth --out=weights/densenet

`classifier`: a PyTorch (.pt .pth .th .tar .bin .ckpt), .safetensors or .npz checkpoint of an image
classifier. Architecture and naming are recognised; every array must be there, be used, and fit;
code in pickles is refused. `--out` becomes a folder with weights.safetensors and model.json, which
holds the network's keywords and how its images are prepared: size, mean, standard deviation.
"""

import sys

from absl import flags

from jaxood.errors import UserError, blame, unknown
from jaxood.main import read_flags, run_command

FLAGS = flags.FlagValues()
flags.DEFINE_string('source', None, 'The checkpoint to convert.', flag_values=FLAGS)
flags.DEFINE_string('out', None, 'Folder to write.', flag_values=FLAGS)
flags.DEFINE_bool(
    'verify', False, 'Compare the logits with the original, in PyTorch.', flag_values=FLAGS
)
flags.DEFINE_string(
    'origin',
    None,
    'Whose checkpoint it is, where names are the same and the preparation of images is not.',
    flag_values=FLAGS,
)
flags.DEFINE_list('mean', None, 'Of pixels in [0, 1], e.g. 0.49,0.48,0.45.', flag_values=FLAGS)
flags.DEFINE_list('std', None, 'Of pixels in [0, 1], e.g. 0.25,0.24,0.26.', flag_values=FLAGS)

TOLERANCE = 1e-3  # of --verify: largest difference of logits over the largest logit


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for what the user can mend."""
    return run_command(parse, execute, sys.argv if argv is None else argv)


def parse(argv: list[str]):
    """What to convert, then the flags."""
    words = read_flags(FLAGS, argv, __doc__)
    if not words or words[0] not in KINDS:
        raise UserError(unknown('what to convert', words[0] if words else '', KINDS))
    if words[1:]:
        raise UserError(f'{words[1]!r} is not a flag. All arguments but the first start with --.')
    if FLAGS.source is None or FLAGS.out is None:
        raise UserError('--source and --out are needed: a checkpoint, and a folder to write.')
    constants = {name: _numbers(name) for name in ('mean', 'std')}
    return KINDS[words[0]], FLAGS.source, FLAGS.out, FLAGS.verify, FLAGS.origin, constants


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


def execute(convert, *arguments) -> None:
    """Runs one of `KINDS`."""
    convert(*arguments)


def classifier(source: str, out: str, verify: bool, origin: str | None, constants: dict) -> None:
    """Converts a checkpoint, and says what it was.

    Args:
        source, out: file and folder.
        verify: whether to compare with the original first.
        origin: see `pretrained.load`.
        constants: 'mean' and 'std', three numbers each, or None for those of the source.

    Raises:
        UserError: see `pretrained.load`; or ours and the original differ.
    """
    import jax  # noqa: PLC0415 - takes a second

    from jaxood.models import pretrained  # noqa: PLC0415

    arrays = pretrained.read(source)
    with blame(source):
        found = pretrained.convert(arrays, origin=origin)
    given = {name: value for name, value in constants.items() if value is not None}
    found = found._replace(preprocessing=found.preprocessing._replace(**given))
    count = sum(x.size for x in jax.tree.leaves(found.variables['params']))
    say = lambda what, value: print(f'{what:<15}{value}', flush=True)
    say('network', pretrained.words(found.backbone))
    say('names of', found.source)
    for other in pretrained.origins({name: array.shape for name, array in arrays.items()}):
        if other != found.source:
            say('', f'and {other}: if it is theirs, --origin={other} takes their preprocessing')
    say('parameters', f'{count:,}')
    say('classes', found.num_classes)
    for name, value in found.preprocessing._asdict().items():
        say(name, value)
    if verify:
        absolute, relative = _differences(arrays, found)
        say('verified', f'logits differ by at most {absolute:.1e}, relatively {relative:.1e}')
        if not relative <= TOLERANCE:
            raise UserError(
                f'{source}: the logits differ from those of the original by {relative:.1e} of the '
                f'largest; {TOLERANCE:.0e} is allowed. Nothing was written. This is a defect of '
                'jaxood: please report it with the checkpoint.'
            )
    pretrained.save(out, found)
    say('written to', out)


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


KINDS = {'classifier': classifier}  # what there is to convert


if __name__ == '__main__':
    sys.exit(main())
