"""Scores images with a trained run: `python -m jaxood.predict --workdir=runs/quickstart PHOTOS/`.

One row an image, on standard output or in `--out`, as CSV or JSON lines:

    file       as found
    score      larger = more outlying; its scale is the score method's own
    p_value    conformal: the share of held-out ID images that score at least as high. Under the ID
               distribution it is at most a in a share a of cases (Vovk et al. 2005; split form)
    decision   ID or OOD: above the threshold that keeps `--keep` of held-out ID images;
               error for a file that could not be read
    class      the predicted class, meaningful if the decision is ID
    threshold  the one that was used

Memory does not grow with the number of images.
"""

import csv
import itertools
import json
import os
import sys

from absl import flags

from jaxood.errors import UserError
from jaxood.main import read_flags, run_command

FLAGS = flags.FlagValues()
flags.DEFINE_string('workdir', None, 'Folder of the run.', flag_values=FLAGS)
flags.DEFINE_string(
    'arm', None, "Which arm's detector; default config.report.arm.", flag_values=FLAGS
)
flags.DEFINE_integer('seed', None, 'Which training seed; default the first.', flag_values=FLAGS)
flags.DEFINE_string('score', None, 'Which score; default config.report.score.', flag_values=FLAGS)
flags.DEFINE_float('keep', 0.95, 'Share of ID images to accept, in (0, 1).', flag_values=FLAGS)
flags.DEFINE_enum('format', 'csv', ['csv', 'json'], 'CSV, or one JSON a line.', flag_values=FLAGS)
flags.DEFINE_string('out', None, 'File to write; default standard output.', flag_values=FLAGS)
flags.DEFINE_enum(
    'on_error', 'skip', ['skip', 'stop'], 'What an unreadable image does.', flag_values=FLAGS
)
flags.DEFINE_integer('batch', 256, 'Images computed at a time.', flag_values=FLAGS)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for what the user can mend."""
    return run_command(parse, execute, sys.argv if argv is None else argv)


def parse(argv: list[str]):
    """The flags, and the files and folders after them."""
    places = read_flags(FLAGS, argv, __doc__)
    if FLAGS.workdir is None or not places:
        raise UserError(
            'give a run and what to score, e.g. --workdir=runs/quickstart PHOTOS/ more.png'
        )
    if not 0.0 < FLAGS.keep < 1.0:
        raise UserError(f'--keep={FLAGS.keep} must lie between 0 and 1 (0.95 is usual).')
    if FLAGS.batch < 1:
        raise UserError(f'--batch={FLAGS.batch} must be at least 1.')
    options = ('arm', 'seed', 'score', 'keep', 'on_error', 'batch')
    return FLAGS.workdir, places, FLAGS.format, FLAGS.out, {k: FLAGS[k].value for k in options}


def execute(workdir: str, places: list[str], form: str, out: str | None, options: dict) -> None:
    """Scores every image below `places` and writes the rows as they come."""
    from jaxood.data.folder import ENDINGS  # noqa: PLC0415 - imports NumPy

    for place in places:  # before any row is written
        if not os.path.exists(place):
            raise UserError(f'{place}: there is no such file or folder.')
    files = find(places, ENDINGS)
    first = next(files, None)
    if first is None:
        raise UserError(
            f'{", ".join(places)}: no images there. Known endings: {", ".join(ENDINGS)}.'
        )
    from jaxood.deployed import Detector  # noqa: PLC0415 - imports JAX, which takes seconds

    rows = Detector(workdir, **options).rows(itertools.chain([first], files))
    if out is None:
        sys.stdout.reconfigure(errors='surrogateescape')  # file names may be any bytes
        write(sys.stdout, rows, form)
    else:
        with open(out, 'w', newline='', errors='surrogateescape') as f:
            write(f, rows, form)


def find(places: list[str], endings: tuple[str, ...]):
    """Image files below the given folders, in sorted order, and files given by name."""

    def stop(error):
        raise UserError(f'{error.filename} cannot be listed: {error.strerror}.')

    for place in places:
        if os.path.isfile(place):
            yield place
            continue
        for folder, subfolders, names in os.walk(place, onerror=stop):
            subfolders.sort()
            for name in sorted(names):
                if name.lower().endswith(endings):
                    yield os.path.join(folder, name)


def write(stream, rows, form: str) -> None:
    """Writes rows as they come."""
    if form == 'json':
        for row in rows:
            stream.write(json.dumps(row) + '\n')
        return
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(stream, row, lineterminator='\n')
            writer.writeheader()
        writer.writerow(row)


if __name__ == '__main__':
    sys.exit(main())
