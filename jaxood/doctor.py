"""Looks at a machine, or at several, before hours are spent on them.

    python -m jaxood.doctor
    python -m jaxood.doctor --workdir=runs/mixup --config=configs/metric_mixup.py:cifar10

Each line is `ok`, `warn` or `fail`, with how to mend it: versions, memory, devices, whether a port
can be opened, whether the workdir and the cache of compiled programs can be written, whether that
cache works, a sum over all devices, a few training steps; with `--config`, its settings and data.
On several hosts start it on all, as one would `jaxood.main`; each says what it finds. Exit code 1
if anything failed.
"""

import contextlib
import dataclasses
import functools
import glob
import json
import math
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator

from absl import flags
from ml_collections import config_flags

from jaxood import hosts, machine
from jaxood.errors import ConfigError, UserError
from jaxood.main import check_config_flags, read_flags, run_command

FLAGS = flags.FlagValues()
flags.DEFINE_string('workdir', None, 'The folder that a run would write to.', flag_values=FLAGS)
CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'A config, to check its settings and data.', flag_values=FLAGS
)
HOSTS = hosts.define_flags(FLAGS)
flags.DEFINE_boolean('json', False, 'Prints JSON instead of lines.', flag_values=FLAGS)

GIB = 2**30
OLDEST = (3, 11)  # the oldest Python that will do
ROOM = 2 * GIB  # of main memory and of disk, below which the small examples are already tight
PROBE = b'Written by jaxood.doctor, and of no use to anybody.\n'
ACCELERATORS = {  # what the system has when there is one -> (JAX's name for it, the extra)
    '/dev/nvidia[0-9]*': ('gpu', 'gpu'),
    '/dev/accel[0-9]*': ('tpu', 'tpu'),
    '/dev/vfio/[0-9]*': ('tpu', 'tpu'),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        state: ok, warn or fail.
        check: what was looked at.
        found: what was seen there.
        mend: what to do about it, unless it is ok.
    """

    state: str
    check: str
    found: str
    mend: str = ''


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 1 if a check failed, 2 for flags that are none."""
    findings: list[Finding] = []
    argv = sys.argv if argv is None else argv
    code = run_command(parse, lambda *a: findings.extend(examine(*a)), argv)
    return code or int(any(finding.state == 'fail' for finding in findings))


def parse(argv: list[str]):
    """The workdir, the config and how to print."""
    check_config_flags(argv)
    try:
        rest = read_flags(FLAGS, argv, __doc__)
    except (AttributeError, KeyError, TypeError, ValueError) as e:  # a value of the config
        raise ConfigError(str(e)) from e
    if rest:
        raise UserError(f'{rest[0]!r} is not a flag. All arguments start with --.')
    return FLAGS.workdir, CONFIG.value, FLAGS.json, [holder.value for holder in HOSTS]


def examine(workdir, config, as_json, joined=()) -> list[Finding]:
    """Runs all checks, printing each as it is done; `joined` is what `hosts.start` takes."""
    meet = functools.partial(meeting, joined)  # before anything looks at a device
    checks = {'python': python, 'packages': packages, 'memory': memory, 'hosts': meet}
    checks |= {'devices': devices, 'ports': ports}
    checks |= {'folders': functools.partial(folders, workdir), 'compilation': cache}
    checks |= {'collective': collective, 'training': training}
    if config is not None:
        checks['config'] = functools.partial(settings, config, workdir)
    found = []
    for name, check in checks.items():
        for finding in guarded(name, check):
            found.append(finding)
            if not as_json:
                print(f'{finding.state:<5} {finding.check:<12} {finding.found}', flush=True)
                if finding.mend:
                    print(f'{"":<18} {finding.mend}', flush=True)
    if as_json:
        ok = all(finding.state != 'fail' for finding in found)
        rows = [dataclasses.asdict(finding) for finding in found]
        of = {'host': socket.gethostname(), 'process': hosts.index(), 'of': hosts.count()}
        print(json.dumps(of | {'ok': ok, 'checks': rows}, indent=2))
    return found


def guarded(name: str, check) -> Iterator[Finding]:
    """The findings of a check; whatever it raises is one more, for a doctor does not fall over."""
    try:
        yield from check()
    except UserError as e:
        yield Finding('fail', name, str(e))
    except Exception as e:  # of any package, on any machine
        text = (str(e).strip().splitlines() or [''])[0]
        yield Finding('fail', name, f'{type(e).__name__}: {text[:300]}', 'See the message.')


def python() -> Iterator[Finding]:
    own = platform.python_version()
    if sys.version_info < OLDEST:
        yield Finding('fail', 'python', own, 'Needs 3.11 or newer.')
    else:
        yield Finding('ok', 'python', f'{own}, {platform.system()} {platform.machine()}')


def packages() -> Iterator[Finding]:
    """Versions, and plugins that belong to another version of JAX than the one there is."""
    found = machine.versions()
    missing = [name for name in machine.PACKAGES if name not in found]
    text = ', '.join(f'{name} {version}' for name, version in found.items())
    if missing:
        install = "Install jaxood into this Python: pip install -e '.' in its checkout."
        yield Finding('fail', 'packages', f'{", ".join(missing)} not installed; {text}', install)
    else:
        yield Finding('ok', 'packages', text)
    plugins = machine.versions(machine.PLUGINS)
    text = ', '.join(f'{name} {version}' for name, version in plugins.items())
    strange = [k for k, v in plugins.items() if k != 'libtpu' and v != found.get('jaxlib')]
    if strange:
        extra = 'cuda13' if 'cuda13' in strange[0] else 'cuda12'
        mend = f"pip install --upgrade 'jax[{extra}]=={found.get('jax')}'"
        yield Finding('fail', 'plugins', f'{text}, for jaxlib {found.get("jaxlib")}', mend)
    elif plugins:
        yield Finding('ok', 'plugins', text)


def memory() -> Iterator[Finding]:
    every, free = machine.memory()
    if free is None:
        yield Finding('ok', 'memory', 'this system does not say')
        return
    text = f'{free / GIB:.1f} of {every / GIB:.1f} GiB free, {machine.cores()} CPU cores'
    if free < ROOM:
        yield Finding('warn', 'memory', text, 'End other programs, or take a larger machine.')
    else:
        yield Finding('ok', 'memory', text)


def meeting(joined) -> Iterator[Finding]:
    """Whether all processes come together, and whether they run the same versions."""
    hosts.start(*joined)
    versions = machine.versions() | {'python': platform.python_version()}
    hosts.compare(versions)
    if hosts.count() == 1:
        yield Finding('ok', 'hosts', 'one process')
    else:
        yield Finding('ok', 'hosts', f'process {hosts.index()} of {hosts.count()}, same versions')


def devices() -> Iterator[Finding]:
    """What JAX computes on; an accelerator that it does not see."""
    import jax  # noqa: PLC0415 - the flags are read before it is imported

    found, backend = jax.local_devices(), jax.default_backend()
    text = f'{len(found)} x {found[0].device_kind} ({backend})'
    if hosts.count() > 1:
        text += f', {jax.device_count()} of all processes'
    limits = [(d.memory_stats() or {}).get('bytes_limit') for d in found]
    if limits[0]:
        text += f', {min(limits) / GIB:.1f} GiB each for JAX'
    for pattern, (name, extra) in ACCELERATORS.items():
        if backend == 'cpu' and glob.glob(pattern):
            mend = f"pip install -e '.[{extra}]', and leave JAX_PLATFORMS unset."
            if os.environ.get('JAX_PLATFORMS') == 'cpu':
                mend = f'JAX_PLATFORMS=cpu asks for that; unset it to use the {name.upper()}.'
            yield Finding('warn', 'devices', f'{text}, though there is a {name.upper()}', mend)
            return
    yield Finding('ok', 'devices', text)


def ports() -> Iterator[Finding]:
    """Whether a port can be opened, and reached by the name that other hosts would use."""
    name = socket.gethostname()
    with socket.socket() as server:
        server.bind(('', 0))
        server.listen(1)
        port = server.getsockname()[1]
        try:
            with socket.create_connection((name, port), timeout=5.0):
                yield Finding('ok', 'ports', f'a free one can be opened, and reached at {name}')
        except OSError as e:
            yield Finding(
                'warn',
                'ports',
                f'port {port} was opened, and not reached at {name} ({e})',
                'One host works. Several need --coordinator=ADDRESS:PORT, an address by which all '
                'of them reach host 0, and that port open in its firewall.',
            )


def folders(workdir) -> Iterator[Finding]:
    """Whether what a run writes can be written, and how much room there is."""
    from jaxood import artefacts, experiment  # noqa: PLC0415

    experiment.use_compilation_cache()
    import jax  # noqa: PLC0415

    places = {'workdir': workdir, 'cache': jax.config.jax_compilation_cache_dir}
    places['temporary'] = tempfile.gettempdir()
    for name, place in places.items():
        if place is not None:
            yield _folder(name, place)
    if workdir is not None and hosts.count() > 1:
        hosts.check_folder(artefacts.place(workdir))
        yield Finding('ok', 'workdir', 'all processes see what the first one writes')


def _folder(name, place) -> Finding:
    from jaxood import artefacts  # noqa: PLC0415

    folder = artefacts.place(place)
    probe = folder / f'.doctor.{socket.gethostname()}.{os.getpid()}'
    there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(PROBE)
        same = probe.read_bytes() == PROBE
        probe.unlink()
        if not there and hosts.count() == 1:  # others may be at it
            folder.rmdir()
    except OSError as e:
        reason = e.strerror or type(e).__name__
        return Finding('fail', name, f'{folder}: {reason}', 'Choose a folder that can be written.')
    if not same:
        return Finding('fail', name, f'{folder} does not return what is written', 'Choose another.')
    if '://' in str(folder):
        return Finding('ok', name, f'{folder} can be written')
    near = os.fspath(folder)
    while not os.path.exists(near):
        near = os.path.dirname(near)
    free = shutil.disk_usage(near).free
    text = f'{folder} can be written, {free / GIB:.1f} GiB free'
    if free < ROOM:
        return Finding('warn', name, text, 'Free some space, or choose another disk.')
    return Finding('ok', name, text)


def cache() -> Iterator[Finding]:
    """Compiles a program twice: the second time it must come from the folder."""
    import jax  # noqa: PLC0415
    from jax.experimental.compilation_cache import compilation_cache  # noqa: PLC0415

    with (
        tempfile.TemporaryDirectory() as folder,
        _settings(jax_compilation_cache_dir=folder, jax_persistent_cache_min_compile_time_secs=0.0),
    ):
        compilation_cache.reset_cache()
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            jax.jit(lambda x: x * 3.0 + 1.0).lower(jax.numpy.zeros(7)).compile()
            seconds.append(time.perf_counter() - started)
        kept = len(os.listdir(folder))
    compilation_cache.reset_cache()
    if kept:
        yield Finding('ok', 'compilation', f'{seconds[0]:.2f} s, and {seconds[1]:.2f} s from disk')
    elif not hosts.first():
        yield Finding('ok', 'compilation', f'{seconds[0]:.2f} s; the first process alone keeps it')
    else:
        yield Finding(
            'warn',
            'compilation',
            'compiled programs are not kept between runs',
            'Leave JAX_ENABLE_COMPILATION_CACHE unset; else every start compiles anew.',
        )


@contextlib.contextmanager
def _settings(**wanted):
    """Sets JAX's own settings for a while."""
    import jax  # noqa: PLC0415

    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def collective() -> Iterator[Finding]:
    """A sum over all devices of all hosts, which every one of them must know."""
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from jaxood import parallel  # noqa: PLC0415

    every = parallel.setup()
    total = every.compile_step(
        lambda state, data, batch, key, *, axis_name: (state, jax.numpy.sum(batch))
    )
    rows = every.shard(np.arange(1, every.count + 1, dtype=np.float32))
    key = jax.random.key(0)
    run = lambda: float(np.asarray(total(every.replicate(np.zeros(1)), None, rows, key)[1]))
    run()
    started = time.perf_counter()
    got = run()
    took = 1e3 * (time.perf_counter() - started)
    want = every.count * (every.count + 1) / 2
    if got != want:
        mend = 'The devices do not hear each other. Update the driver and the plugin.'
        yield Finding('fail', 'collective', f'a sum over devices gave {got}, not {want}', mend)
    else:
        yield Finding('ok', 'collective', f'a sum over all devices ({every.count}), {took:.1f} ms')


def training() -> Iterator[Finding]:
    """Three steps of a small classifier by the one training loop's step; its loss must fall."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from jaxood import parallel  # noqa: PLC0415
    from jaxood.losses.detection import cross_entropy  # noqa: PLC0415
    from jaxood.models import Classifier  # noqa: PLC0415
    from jaxood.models.backbones.cnn import CNN  # noqa: PLC0415
    from jaxood.models.heads import Linear  # noqa: PLC0415
    from jaxood.models.initial import compile_init  # noqa: PLC0415
    from jaxood.train import loop, state  # noqa: PLC0415

    started = time.perf_counter()
    every = parallel.setup()
    model, size = Classifier(CNN(widths=(4, 8)), Linear(2)), every.batch_size(16)
    images = np.random.default_rng(0).normal(size=(size, 8, 8, 1)).astype(np.float32)
    batch = {'image': images, 'label': (images.mean((1, 2, 3)) > 0).astype(np.int32)}

    def loss_fn(params, extra, data, batch, key, step):
        outputs, extra = model.apply(
            {'params': params, **extra}, batch['image'], train=True, mutable=list(extra)
        )
        loss = jnp.mean(cross_entropy(outputs['logits'], batch['label']))
        return loss, (extra, {'loss': loss})

    variables = compile_init(lambda key: model.init(key, images[:1], train=False))(
        jax.random.key(0)
    )
    tx = state.sgd(steps=3)
    start = state.create(
        variables['params'], tx, {'batch_stats': variables['batch_stats']}, ema=False
    )
    step = every.compile_step(lambda *a, **k: loop.train_step(*a, loss_fn=loss_fn, tx=tx, **k))
    now, rows, losses = every.replicate(start), every.shard(batch), []
    for _ in range(3):
        now, metrics = step(now, None, rows, jax.random.key(1))
        losses.append(float(np.asarray(metrics['loss'])))
    took = time.perf_counter() - started
    text = f'{losses[0]:.4f} -> {losses[-1]:.4f} in three steps, {took:.1f} s with compilation'
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        mend = 'The device computes wrong numbers. Update its driver and plugin, or try another.'
        yield Finding('fail', 'training', f'the loss went {text}', mend)
    else:
        yield Finding('ok', 'training', f'loss {text}')


def settings(config, workdir) -> Iterator[Finding]:
    """What `main` looks at before it builds anything: all settings, with these data and devices."""
    from jaxood import artefacts, experiment  # noqa: PLC0415
    from jaxood.stages import common  # noqa: PLC0415

    with hosts.one_for_all():
        runs = experiment.check(config)
    yield Finding('ok', 'config', f'{len(runs)} runs of {", ".join(config.stages)}')
    every = experiment.devices_of(config)
    folder = artefacts.place(workdir or tempfile.gettempdir())
    tasks = experiment.plan(runs, experiment.store_of(config, folder))
    experiment.check_tasks(tasks, tuple(config.stages), every)
    data = common.load_data(runs[0].config)
    sets = {'training': data.id.train, 'test': data.id.test} | data.ood
    text = ', '.join(f'{len(examples)} {name}' for name, examples in sets.items())
    yield Finding('ok', 'data', f'{text} images of {" x ".join(map(str, data.shape))}')
    todo = sum(task.artefact.done is None for task in tasks)
    yield Finding('ok', 'plan', f'{len(tasks)} artefacts, {todo} of them to be made')


if __name__ == '__main__':
    hosts.run(main)
