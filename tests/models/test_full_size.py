"""Stable Diffusion 1.5's own sizes, in float16: a folder of random weights, converted."""

import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from reference import make_stable_diffusion as reference

from jaxood.models import components
from jaxood.models.stable_diffusion import folder, fresh

COUNTS = {'text_encoder': 123_060_480, 'unet': 859_520_964, 'vae': 83_653_863}
BYTES = 2 * sum(COUNTS.values())
CONVERT = """
import pathlib, re, sys
from jaxood import convert
assert convert.main(['convert', 'stable-diffusion', *sys.argv[1:]]) == 0
print(re.search(r'VmHWM: *\t *([0-9]+) kB', pathlib.Path('/proc/self/status').read_text())[1])
"""  # not ru_maxrss, which a process inherits from the one that started it


def write(place):
    """The folder, an array at a time; each repeats the same million of random numbers."""
    reference.folder(place, 'sd1')
    block = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(np.float16)
    for name, config in fresh.STABLE_DIFFUSION_1_5.items():
        (place / name / 'config.json').write_text(json.dumps(config))
        component = components.COMPONENTS[name]
        targets = component.targets(component.build(config))
        shapes = {n: components.shape_of_theirs(target) for n, target in targets.items()}
        specs = {n: ('float16', shape) for n, shape in shapes.items()}
        arrays = ((n, np.resize(block, shape)) for n, shape in shapes.items())
        file = place / name / f'{component.files[0]}.safetensors'
        folder._write_safetensors(file, specs, arrays)


def room():
    """Whether twice the weights fit on the disk, and once in the memory with some left."""
    try:
        free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError):  # not on every system
        return False
    return shutil.disk_usage(tempfile.gettempdir()).free > 3 * BYTES and free > 2 * BYTES


if room():

    @pytest.mark.slow
    def test_conversion_needs_little_more_memory_than_the_largest_network(tmp_path):
        write(tmp_path / 'source')
        flags = [f'--source={tmp_path / "source"}', f'--out={tmp_path / "out"}']
        found = subprocess.run(
            [sys.executable, '-c', CONVERT, *flags], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr
        *said, peak = found.stdout.splitlines()
        assert [line.split()[:2] for line in said[:3]] == [
            [name, f'{count:,}'] for name, count in COUNTS.items()
        ]
        assert int(peak) * 1024 < 2 * COUNTS['unet'] + 1.2e9  # and Python, JAX, one array
        written = (tmp_path / 'out').rglob('*.safetensors')
        assert BYTES < sum(file.stat().st_size for file in written) < BYTES + 1e6
        for name in ('source', 'out'):  # pytest keeps its folders for a while
            shutil.rmtree(tmp_path / name)
