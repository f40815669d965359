"""configs/quickstart.py as a user runs it: a process of its own, from its command to its report."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from jaxood.bench import measure
from jaxood.errors import UserError

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'quickstart.py'


def rows(flags):
    if not CONFIG.exists():
        raise UserError(f'--suite=quickstart runs {CONFIG}, so it needs a checkout of jaxood.')
    with tempfile.TemporaryDirectory() as place:
        for what in ('nothing compiled yet', 'programs compiled before'):
            workdir = os.path.join(place, what)
            yield measure.row(f'quickstart, {what}', 's', _seconds(flags, place, workdir))
        yield measure.row(
            'quickstart again, all of it reused', 's', _seconds(flags, place, workdir)
        )


def _seconds(flags, place, workdir) -> float:
    cache = {'JAX_COMPILATION_CACHE_DIR': os.path.join(place, 'compiled')}
    cache['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'  # as `jaxood.main` sets it
    command = [sys.executable, '-m', 'jaxood.main', f'--config={CONFIG}', f'--workdir={workdir}']
    started = time.perf_counter()
    found = subprocess.run(
        [*command, *flags.quickstart],
        capture_output=True,
        text=True,
        env=os.environ | cache,
        check=False,
    )
    if found.returncode:
        raise UserError(f'the quickstart failed: {found.stderr.strip()[-2000:]}')
    return time.perf_counter() - started
