"""Imports point down only, and what answers `--help` imports nothing heavy."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'jaxood'

# Each module may import those on lines above its own, and its neighbours in the same package.
LAYERS = (
    ('errors', 'console', 'machine'),
    ('hosts',),
    ('rng', 'memory', 'parallel', 'metrics', 'frechet', 'neighbours', 'clustering'),
    ('diffusion', 'losses', 'scores', 'models', 'data', 'train'),
    ('synthesis', 'detectors', 'report'),
    ('config', 'artefacts'),
    ('stages',),
    ('experiment',),
    ('deployed',),
    ('main', 'predict', 'convert', 'bench', 'doctor'),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Within a layer these may look at each other, in this direction.
BESIDE = {
    ('parallel', 'memory'),
    ('losses', 'diffusion'),
    ('models', 'diffusion'),
    ('models', 'losses'),
    ('train', 'diffusion'),
    ('predict', 'main'),
    ('convert', 'main'),
    ('bench', 'main'),
    ('doctor', 'main'),
}


def imports(path):
    """The parts of jaxood that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == 'jaxood':
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('jaxood.'):
            yield node.module.split('.')[1]
        elif isinstance(node, ast.Import):
            names = (alias.name.split('.') for alias in node.names)
            yield from (name[1] for name in names if name[0] == 'jaxood' and len(name) > 1)


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda p: p.stem)
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    if own == '__init__':
        assert not list(imports(path))
        return
    assert own in LEVEL, f'{own} has no place in LAYERS: put it where it belongs'
    for other in set(imports(path)) - {own}:
        down = LEVEL[other] < LEVEL[own] or (own, other) in BESIDE
        assert down, f'{own} imports {other}, which is not below it'


@pytest.mark.parametrize(
    'module',
    [
        *('jaxood', 'jaxood.main', 'jaxood.predict', 'jaxood.convert'),
        *('jaxood.bench', 'jaxood.doctor'),
    ],
)
def test_commands_parse_before_they_import_anything_heavy(module):
    """`--help` answers at once; JAX alone takes a second."""
    code = f'import {module}, sys; print([m for m in ("jax", "flax", "numpy") if m in sys.modules])'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == '[]'


def test_programs_start_without_scikit_learn():
    """It takes a second and a half to import, and few runs need it."""
    code = 'import jaxood.deployed, sys; print("sklearn" in sys.modules)'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == 'False'
