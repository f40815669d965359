"""Runs an experiment.

    python -m jaxood.main --config=configs/quickstart.py --workdir=runs/quickstart

The program's story is `stages.STAGES`, in its order:

    train_pipeline    a small Stable Diffusion learns captioned images
    train_diffusion   a class-conditional diffusion model learns the ID images
    train_judges      a small ensemble learns to classify them, to tell which outliers are ID images
    learn_tokens      or every class gets a pseudo-word that a text-to-image model understands,
    words             and the words near it, whose images would be near-OOD, are looked up
    synthesise        the diffusion model (or another strategy) invents outliers; judges filter them
    pretrain_detector a classifier learns the ID classes, for all arms to go on from
    train_detector    a classifier learns the ID classes, and to be unsure on the outliers
    load_weights      or a pretrained classifier is taken as it is
    train_restorer    a small diffusion model learns the features that it gives ID images
    score             each detector scores the ID and OOD test sets, by each method
    reconstruct_pixels
                      beside a restorer: a diffusion model of the pixels restores those
    report            tables, figures, and the page that shows them

An experiment is arms x seeds. What agrees between them is made once, what was made before is
reused, and what was interrupted goes on.
"""

import errno
import glob
import os
import runpy
import sys
import traceback

from absl import flags
from ml_collections import config_flags

from jaxood import hosts
from jaxood.errors import ConfigError, UserError, unknown

WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for the report, results and artefacts.')
STAGES = flags.DEFINE_list(
    'stages', None, 'Only these stages, e.g. synthesise,report. Default: those the config names.'
)
CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, with a variant after a colon: configs/quickstart.py:digits.'
)
ESTIMATE = flags.DEFINE_boolean(
    'estimate', False, 'Only try one batch of each stage, and say what it takes.'
)
HOSTS = hosts.define_flags()
FLAGS = [
    flags.FLAGS[name]
    for name in ('config', 'workdir', 'stages', 'estimate', *(h.name for h in HOSTS))
]
DISK = {  # what a disk or a folder says that can't be written
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for what the user can mend."""
    return run_command(parse, execute, sys.argv if argv is None else argv)


def run_command(parse, execute, argv) -> int:
    """Parses and executes; a `UserError` or a full or read-only disk becomes one message and 2."""
    try:
        arguments = parse(argv)
        with hosts.noticing():
            execute(*arguments)
    except UserError as e:
        print(f'jaxood: {e}', file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        if e.errno not in DISK:
            raise
        place = f': {e.filename}' if e.filename else ''
        print(
            f'jaxood: {e.strerror}{place}. What was finished is kept; free some space or choose '
            'a folder that can be written, and run the same command again.',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print('jaxood: stopped. The same command goes on where it was.', file=sys.stderr)
        return 130
    return 0


def read_flags(known: flags.FlagValues, argv: list[str], about: str) -> list[str]:
    """Sets a command's flags from its arguments -> the words that are no flags; shows `--help`.

    Raises:
        UserError: an unknown flag, or a value that it does not take.
    """
    if {'--help', '-h', '--helpfull', '--helpshort'} & set(argv):
        print(f'{about}\nFlags:\n{known.get_help()}')
        raise SystemExit(0)
    try:
        return known(argv)[1:]
    except flags.UnrecognizedFlagError as e:
        raise UserError(unknown(f'--{e.flagname}', e.flagname, known)) from e
    except flags.Error as e:
        raise UserError(str(e)) from e


def parse(argv: list[str]):
    """Reads the flags, before JAX is imported.

    Raises:
        UserError: an unknown flag, config key, variant or value, or a config file that fails.
    """
    if {'--help', '-h', '--helpfull', '--helpshort'} & set(argv):
        print(f'{__doc__}\nFlags:\n')
        print('\n'.join(f'  --{f.name}: {f.help}' for f in FLAGS))
        print('  --config.a.b=value: Sets one value of the config, e.g. --config.sampler.steps=50.')
        raise SystemExit(0)
    check_config_flags(argv)
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as e:
        known = [f.name for f in FLAGS]
        raise UserError(unknown(f'--{e.flagname}', e.flagname, known)) from e
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(str(e)) from e
    if rest[1:]:
        raise UserError(f'{rest[1]!r} is not a flag. All arguments start with --.')
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError(
            '--config and --workdir are needed, e.g. '
            '--config=configs/quickstart.py --workdir=runs/quickstart'
        )
    joined = [holder.value for holder in HOSTS]
    return CONFIG.value, WORKDIR.value, STAGES.value, joined, ESTIMATE.value


def check_config_flags(argv: list[str]) -> None:
    """Reads the config file, and looks up every `--config.a.b` in what it returns.

    `config_flags` does the same afterwards, but shows a traceback for what goes wrong here.
    """
    given = {}
    for word, following in zip(argv[1:], [*argv[2:], '']):
        name, equals, value = word.lstrip('-').partition('=')
        if word.startswith('-') and name.partition('.')[0] == 'config':
            given[name] = value if equals else following
    if 'config' not in given:
        return
    config = load_config(given.pop('config'))
    for name in given:
        place, where = config, 'config'
        for key in name.split('.')[1:]:
            where += f'.{key}'
            if not hasattr(place, 'keys') or key not in place:
                known = place.keys() if hasattr(place, 'keys') else ()
                raise ConfigError(unknown(where, key, known))
            place = place[key]


def load_config(spec: str):
    """The config of `path/to/file.py:variant`.

    Raises:
        UserError: no such file, an unknown variant, or a file that fails, with its line.
    """
    path, _, variant = spec.partition(':')
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or '.'
        files = sorted(glob.glob(os.path.join(folder, '*.py'))) or sorted(glob.glob('configs/*.py'))
        raise UserError(unknown(f'--config={path}: the file', path, files))
    try:
        found = runpy.run_path(path)
        if 'get_config' not in found:
            raise UserError('it has no function get_config(), which returns the config.')
        return found['get_config'](variant) if variant else found['get_config']()
    except UserError as e:
        raise ConfigError(f'{path}: {e}') from e
    except Exception as e:
        trace = traceback.extract_tb(e.__traceback__)
        lines = [frame.lineno for frame in trace if frame.filename == path]
        line = e.lineno if isinstance(e, SyntaxError) else lines[-1] if lines else '?'
        raise ConfigError(f'{path}, line {line}: {type(e).__name__}: {e}') from e


def execute(
    config, workdir: str, only: list[str] | None = None, joined=(), estimate: bool = False
) -> None:
    """Runs the stages of a config in a workdir.

    Args:
        config: a ConfigDict.
        workdir: made if it is not there.
        only: stages to run; None runs those that the config names.
        joined: coordinator, num_processes and process_id, as `hosts.start` takes them.
        estimate: only say what a batch of each stage takes.

    Raises:
        UserError: bad settings or data, before anything is built; a workdir in use.
    """
    hosts.start(*joined)  # before anything looks at a device

    from jaxood import experiment  # noqa: PLC0415 - imports JAX, which takes seconds

    experiment.execute(config, workdir, only, estimate)


if __name__ == '__main__':
    hosts.run(main)
