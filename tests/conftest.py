"""What all tests share: eight virtual CPU devices, a compilation cache that outlives the run."""

import os
import pathlib

os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
    + ' --xla_backend_optimization_level=1'  # they mostly compile; users keep XLA's own
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parent.parent / '.cache' / 'jax')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

import pytest  # noqa: E402 - JAX reads the environment when it is first imported


@pytest.fixture(scope='session')
def real_data() -> pathlib.Path:
    """The folder of real images and weights that JAXOOD_TEST_DATA names."""
    folder = os.environ.get('JAXOOD_TEST_DATA')
    if not folder:
        pytest.skip('JAXOOD_TEST_DATA names no folder with the real images')
    return pathlib.Path(folder)


_programs = []


@pytest.fixture(scope='session')
def _listening():
    """JAX has no way to stop listening, so this happens once."""
    import jax

    def note(name, seconds, **more):
        if name == '/jax/core/compile/backend_compile_duration':
            _programs.append(more.get('fun_name', name))

    jax.monitoring.register_event_duration_secs_listener(note)


@pytest.fixture
def compiled(_listening):
    """The programs compiled, or fetched from the cache, since the test began; it may clear it."""
    _programs.clear()
    return _programs


@pytest.fixture
def bucket():
    """An object store: `s3://` paths that end in this process's memory."""
    import fsspec
    from etils import epath
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = ('s3',)
        store, pseudo_dirs = {}, ['']

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix('s3://'))

    fsspec.register_implementation('s3', Bucket, clobber=True)
    return epath.Path('s3://bucket/run')


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """With JAXOOD_NO_SKIPS set, as where the real data is at hand, a skip is a failure."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get('JAXOOD_NO_SKIPS') and not hasattr(report, 'wasxfail'):
        report.outcome = 'failed'
        report.longrepr = f'skipped, where nothing may be: {report.longrepr[-1]}'
