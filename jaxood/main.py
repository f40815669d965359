"""Runs an experiment.

    python -m jaxood.main --config=configs/quickstart.py --workdir=runs/quickstart

The program's story is `stages.STAGES`, in its order:

    train_diffusion   a class-conditional diffusion model learns the ID images
    train_judges      a small ensemble learns to classify them, to tell which outliers are ID images
    synthesise        the diffusion model (or another strategy) invents outliers; judges filter them
    train_detector    a classifier learns the ID classes, and to be unsure on the outliers
    score             each detector scores the ID and OOD test sets, by each method
    report            tables, figures, and the page that shows them

An experiment is arms x seeds. What agrees between them is made once, what was made before is
reused, and what was interrupted goes on.
"""

import sys

from absl import flags
from ml_collections import config_flags

from jaxood.errors import ConfigError, UserError, unknown

WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for the report, results and artefacts.')
STAGES = flags.DEFINE_list(
    'stages', None, 'Only these stages, e.g. synthesise,report. Default: those the config names.'
)
CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, with a variant after a colon: configs/quickstart.py:digits.'
)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for what the user can mend."""
    return run_command(parse, execute, sys.argv if argv is None else argv)


def run_command(parse, execute, argv) -> int:
    """Parses and executes; a `UserError` or a full or read-only disk becomes one message and 2."""
    try:
        arguments = parse(argv)
        execute(*arguments)
    except UserError as e:
        print(f'jaxood: {e}', file=sys.stderr)
        return 2
    except OSError as e:
        if e.errno is None or e.filename is None and e.strerror is None:
            raise
        place = f' {e.filename}' if e.filename else ''
        print(
            f'jaxood: {e.strerror}:{place}. What was finished is kept; free some space or choose '
            'a folder that can be written, and run the same command again.',
            file=sys.stderr,
        )
        return 2
    return 0


def parse(argv: list[str]):
    """Reads the flags, before JAX is imported.

    Raises:
        UserError: an unknown flag, config key, variant or value, or a config file that fails.
    """
    try:
        rest = flags.FLAGS(argv)
    except UserError:
        raise
    except flags.UnrecognizedFlagError as e:
        raise UserError(unknown(f'--{e.flagname}', e.flagname, flags.FLAGS)) from e
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
        raise ConfigError(_flag_message(e)) from e
    if rest[1:]:
        raise UserError(f'{rest[1]!r} is not a flag. All arguments start with --.')
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError(
            '--config and --workdir are needed, e.g. '
            '--config=configs/quickstart.py --workdir=runs/quickstart'
        )
    return CONFIG.value, WORKDIR.value, STAGES.value


def _flag_message(e: Exception) -> str:
    return str(e.args[0] if isinstance(e, KeyError) and e.args else e)


def execute(config, workdir: str, only: list[str] | None = None) -> None:
    """Runs the stages of a config in a workdir.

    Args:
        config: a ConfigDict.
        workdir: made if it is not there.
        only: stages to run; None runs those that the config names.

    Raises:
        UserError: bad settings or data, before anything is built; a workdir in use.
    """
    from jaxood import experiment  # noqa: PLC0415 - imports JAX, which takes seconds

    experiment.execute(config, workdir, only)


if __name__ == '__main__':
    sys.exit(main())
