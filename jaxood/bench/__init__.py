"""Measures speed, beside PyTorch equivalents where those are installed, in one run.

    python -m jaxood.bench --suite=unet,knn --out=bench.json
    python -m jaxood.bench --suite=unet --size=full --dtype=bfloat16 --compare=bench.json

    unet              training and sampling of the 32x32 U-Net, images/s
    stable_diffusion  sampling, images/s
    lfdn              restoring and scoring feature vectors, images/s
    knn               distances to the k-th neighbour, images/s
    scores            fit and scoring of every score that reads logits and features, s
    classifiers       forward pass of the networks that --weights names, images/s
    loading           images from a folder, a stream and an .npz, images/s
    quickstart        configs/quickstart.py from its command to its report, s
    scaling           time an image and peak memory at 10^3, 10^4, 10^5 images

`--size=small` is for CPUs, `full` has the published sizes. Ours and theirs take turns; each figure
is the median of `--rounds`, without compilation. Where floating-point operations are the work,
XLA's count of them is shown as a share of the device's rate at multiplying large matrices, measured
in the same run. `--out` writes everything as JSON, with hardware, versions and date; `--compare`
shows ratios to such a file.
"""

import datetime
import importlib
import json
import os
import sys

from absl import flags

from jaxood import machine
from jaxood.errors import UserError, unknown
from jaxood.main import read_flags, run_command

SUITES = (  # modules beside this one; `rows(flags)` of each measures
    *('unet', 'stable_diffusion', 'lfdn', 'knn', 'scores', 'classifiers'),
    *('loading', 'quickstart', 'scaling'),
)
SIZES = ('small', 'full')
DTYPES = ('float32', 'bfloat16')

FLAGS = flags.FlagValues()
flags.DEFINE_list('suite', ['unet'], f'Some of {", ".join(SUITES)}.', flag_values=FLAGS)
flags.DEFINE_enum('size', 'small', SIZES, 'Of networks and batches.', flag_values=FLAGS)
flags.DEFINE_enum('dtype', 'float32', DTYPES, 'Compute type of networks.', flag_values=FLAGS)
flags.DEFINE_integer('rounds', 3, 'How often each is measured.', flag_values=FLAGS)
flags.DEFINE_integer('batch', None, 'Images at a time, in place of the usual.', flag_values=FLAGS)
flags.DEFINE_integer('steps', 10, 'Steps of a sampler.', flag_values=FLAGS)
flags.DEFINE_integer('bank', 50_000, 'Training images of scores and k-NN.', flag_values=FLAGS)
flags.DEFINE_integer('queries', 27_763, 'Images that those score.', flag_values=FLAGS)
flags.DEFINE_integer('dim', 342, 'Features of an image.', flag_values=FLAGS)
flags.DEFINE_integer('images', 2000, 'Images of the suite loading.', flag_values=FLAGS)
flags.DEFINE_list('counts', ['1000', '10000', '100000'], 'Of the suite scaling.', flag_values=FLAGS)
flags.DEFINE_list('weights', [], 'Checkpoints of the suite classifiers.', flag_values=FLAGS)
flags.DEFINE_multi_string(
    'quickstart', [], 'Flags for its run, e.g. --config.diffusion.steps=10.', flag_values=FLAGS
)
flags.DEFINE_boolean(
    'compile_theirs', None, 'torch.compile for networks. Default: on a GPU.', flag_values=FLAGS
)
flags.DEFINE_string('out', None, 'JSON file to write.', flag_values=FLAGS)
flags.DEFINE_string('compare', None, 'JSON file of an earlier run.', flag_values=FLAGS)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for what the user can mend."""
    return run_command(parse, execute, sys.argv if argv is None else argv)


def parse(argv: list[str]):
    """The suites, and the files to write and to compare with."""
    rest = read_flags(FLAGS, argv, __doc__)
    if rest:
        raise UserError(f'{rest[0]!r} is not a flag. All arguments start with --.')
    for name in FLAGS.suite:
        if name not in SUITES:
            raise UserError(unknown(f'--suite={name}', name, SUITES))
    if 'classifiers' in FLAGS.suite and not FLAGS.weights:
        raise UserError('--suite=classifiers needs --weights=CHECKPOINT, the networks to measure.')
    for name in ('rounds', 'batch', 'steps', 'bank', 'queries', 'dim', 'images'):
        if FLAGS[name].value is not None and FLAGS[name].value < 1:
            raise UserError(f'--{name}={FLAGS[name].value} must be at least 1.')
    for count in FLAGS.counts:
        if not count.isdecimal() or int(count) < 1:
            raise UserError(f'--counts={count} must be a whole number of at least 1.')
    return FLAGS.suite, FLAGS.out, _read(FLAGS.compare)


def execute(suites, out, before) -> None:
    """Runs the suites, prints a table of each, and writes what was measured."""
    found = {'date': datetime.date.today().isoformat(), **machine.facts(), 'suites': {}}
    asked = ('size', 'dtype', 'rounds', 'batch', 'steps', 'bank', 'queries', 'dim', 'images')
    found['flags'] = {name: FLAGS[name].value for name in asked}
    if before and (other := _differences(before, found)):
        print(f'the earlier run had other {", ".join(other)}: ratios do not tell of the code alone')
    for name in suites:
        module = importlib.import_module(f'jaxood.bench.{name}')
        rows = found['suites'][name] = list(module.rows(FLAGS))
        _print(name, rows, before['suites'].get(name, []) if before else None)
    found['peak_bytes'] = machine.peak()
    text = f'{found["processor"]}, {found["cores"]} cores, {found["devices"][0]}'
    print(f'\npeak memory {found["peak_bytes"] / 2**30:.2f} GiB; {text}; {found["date"]}')
    if out:
        with open(out, 'w') as f:
            json.dump(found, f, indent=2)


def _read(path):
    """An earlier run, or None."""
    if path is None:
        return None
    try:
        with open(path) as f:
            found = json.load(f)
        if isinstance(found, dict) and 'suites' in found:
            return found
    except (OSError, ValueError):
        pass
    what = 'is not a file that --out wrote' if os.path.exists(path) else 'is not there'
    raise UserError(f'--compare={path} {what}.')


def _differences(before, now) -> list[str]:
    names = ('processor', 'cores', 'devices', 'versions', 'flags')
    return [name for name in names if before.get(name) != now[name]]


def _print(name, rows, before):
    earlier = {row['what']: row['ours'] for row in before or ()}
    last = f'{"x earlier":>11}' if before is not None else ''
    head = f'{"":<50}{"ours":>12}{"theirs":>12}{"x faster":>10}{"of peak":>9}{last}  beside'
    print(f'\n{name}\n{head}')
    for row in rows:
        share = '-' if row['share'] is None else f'{row["share"]:.0%}'
        cells = ['-' if row[k] is None else f'{row[k]:.4g}' for k in ('ours', 'theirs', 'ratio')]
        line = f'{row["what"]:<50}{cells[0]:>12}{cells[1]:>12}{cells[2]:>10}{share:>9}'
        if before is not None:
            old = earlier.get(row['what'])
            line += f'{"-" if old is None else format(better(row, old), ".3g"):>11}'
        print(f'{line}  {row["peer"]}', flush=True)


def better(row, old: float) -> float:
    """How many times faster (or smaller) than a figure of the same row, taken elsewhere."""
    return row['ours'] / old if row['unit'] == 'images/s' else old / row['ours']
