"""Arms x seeds through the stages: what is there already, what is to be done, and doing it."""

import dataclasses
import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence

import jax
import ml_collections
from etils import epath

from jaxood import artefacts, console, hosts, memory, parallel
from jaxood import config as configs
from jaxood.artefacts import Artefact, Store
from jaxood.config import Run
from jaxood.errors import ConfigError, UserError, lookup, unknown
from jaxood.machine import PACKAGES, version_of
from jaxood.stages import STAGES, common, score

SCRATCH = '.estimate'  # in the workdir, while an estimate is made
REQUIRED = ('seed', 'seeds', 'dtype', 'stages', 'parallel', 'data', 'preprocessing')  # by all runs


@dataclasses.dataclass(frozen=True)
class Task:
    """One stage under one fingerprint, the artefacts it builds on, and the runs that share it."""

    stage: str
    artefact: Artefact
    inputs: dict[str, Artefact]
    runs: list[Run]

    @property
    def digest(self) -> str | None:
        """Of the contents of a file that it starts from, if it does."""
        return STAGES[self.stage].settings(self.runs[0].config).get('digest')

    @property
    def state(self) -> str:
        if self.artefact.done is not None:
            return 'reused'
        return 'resumed' if self.artefact.folder.exists() else 'to do'


def execute(
    config, workdir: str, only: Sequence[str] | None = None, estimate: bool = False
) -> None:
    """Checks, plans, says what will be done, and does it. See `main.execute`."""
    use_compilation_cache()
    wanted = tuple(only or config.stages)
    folder = artefacts.place(workdir)
    hosts.compare(identity(config) | {'--stages': list(wanted), '--workdir': str(folder)})
    with hosts.one_for_all():
        runs = check(config)
    for stage in wanted:
        if stage not in config.stages:
            raise UserError(unknown(f'--stages: stage {stage!r}', stage, config.stages))
    hosts.check_folder(folder)
    with artefacts.lock(folder):
        check_format(folder)
        store, devices = store_of(config, folder), devices_of(config)
        with hosts.one_for_all():
            digests = {run.name: digest(run.config) for run in runs}
        hosts.compare({f'the data of {name}': value for name, value in digests.items()})
        tasks = plan(runs, store)
        check_tasks(tasks, wanted, devices)
        console.say(table(tasks, wanted, store))
        if estimate:
            for task in tasks:
                if task.stage in wanted and task.artefact.done is None:
                    console.say(f'{task.stage} {name_of(task)}: {tried(task, folder, devices)}')
            return
        repro = write_records(folder, config, tasks, devices, digests)
        log = console.Log(folder / 'log.jsonl')
        for task in tasks:
            if task.stage in wanted:
                state = task.state
                perform(task, store, devices, repro)
                log.write(
                    {'stage': task.stage, 'for': name_of(task), 'was': state} | task.artefact.done
                )
                publish(task, folder)


def store_of(config, folder: epath.Path) -> Store:
    """Where the artefacts of a run in a workdir lie."""
    return Store(artefacts.place(config.get('artefacts_dir') or folder / 'artefacts'))


def devices_of(config) -> parallel.Devices:
    """The devices that `config.parallel` asks for."""
    c = config.parallel
    return parallel.setup(c.mode, c.get('num_devices'), bool(c.get('shard_state')))


def identity(config) -> dict[str, str]:
    """What all hosts of a run must have in common: every setting, and the versions."""
    found = {}

    def walk(where, value):
        if isinstance(value, dict) and value:
            for key, part in value.items():
                walk(f'{where}.{key}', part)
        else:
            found[where] = repr(value)

    walk('config', configs.plain(config))
    return found | versions() | {'the source': git_revision()}


def digest(config) -> str:
    """Of all data that a run sees."""
    return common.load_data(config).digest('all')


def check(config) -> list[Run]:
    """The runs of a config, each resolved and checked by every stage, before anything is built.

    Raises:
        ConfigError: the first setting that cannot work, with its place and how to mend it.
    """
    configs.check_sections(config, REQUIRED)
    for stage in config.stages:
        if stage not in STAGES:
            raise ConfigError(unknown(f'config.stages: stage {stage!r}', stage, STAGES))
        configs.require(config, *STAGES[stage].NEEDS)
    runs = list(configs.runs(config))
    for run in runs:
        common.check(run.config)
        for name, stage in STAGES.items():
            if name in config.stages and stage.applies(run.config):
                stage.check(run.config)
    return runs


def check_tasks(tasks: Sequence[Task], wanted: Sequence[str], devices) -> None:
    """Looks at what is to be made together with the data, before any of it is made.

    Raises:
        UserError: a stage cannot work with these images or devices, or builds on one that is
            neither there nor asked for.
    """
    looked_at = set()
    for task in tasks:
        if task.stage not in wanted or task.artefact.done is not None:
            continue
        config, stage = task.runs[0].config, STAGES[task.stage]
        but_seeds = {k: v for k, v in configs.plain(config).items() if k != 'seeds'}
        inputs = [artefact.fingerprint for artefact in task.inputs.values()]
        twins = configs.fingerprint(task.stage, but_seeds, inputs)
        if twins not in looked_at:  # a step is traced for this, which takes a while
            looked_at.add(twins)
            data = common.seen(config, task.inputs)
            if stage.needs_labels(config):
                common.check_labels(data, task.stage)
            stage.fits(config, data, devices)
        for artefact in task.inputs.values():
            if artefact.done is None and artefact.stage not in wanted:
                raise UserError(
                    f'--stages: {task.stage} builds on {artefact.stage}, which has not been made '
                    f'yet. Ask for it too: --stages={artefact.stage},{task.stage}.'
                )


def plan(runs: Sequence[Run], store: Store) -> list[Task]:
    """What has to exist, in the order of the stages. Runs that agree share a task; a stage that
    looks ACROSS runs is one task, whose inputs are named 'arm/seed/stage'.

    Raises:
        UserError: data that cannot be read or split; a stage without the one it builds on.
    """
    tasks: dict[tuple[str, str], Task] = {}
    made: dict[str, dict[str, Artefact]] = {run.name: {} for run in runs}
    for name, stage in STAGES.items():
        inputs = {}
        for run in runs:
            if name not in run.config.stages or not stage.applies(run.config):
                continue
            found = {needed: made[run.name].get(needed) for needed in stage.inputs(run.config)}
            for needed, artefact in found.items():
                if artefact is None:
                    raise ConfigError(
                        f'config.stages has {name!r}, which builds on {needed!r}: add it to '
                        'config.stages (what is already there is reused).'
                    )
            if stage.ACROSS:
                inputs |= {f'{run.name}/{needed}': a for needed, a in found.items()}
                if run is not runs[-1]:
                    continue  # the last one has all inputs
            else:
                inputs = found
            fingerprint = configs.fingerprint(
                *(name, stage.VERSION, stage.settings(run.config)),
                common.load_data(run.config).digest(stage.SEES),
                {k: v.fingerprint for k, v in inputs.items()},
            )
            made[run.name][name] = artefact = store.find(name, fingerprint)
            task = tasks.setdefault((name, fingerprint), Task(name, artefact, inputs, []))
            task.runs.extend(runs if stage.ACROSS else [run])
    return list(tasks.values())


def perform(task: Task, store: Store, devices: parallel.Devices, repro: dict) -> None:
    """Makes one artefact, unless it is there; goes on with one that was interrupted."""
    if task.artefact.done is None:
        with artefacts.lock(task.artefact.folder):
            if task.artefact.done is None:  # no other process made it in the meantime
                _make(task, store, devices, repro)
    # a kill may have left them
    artefacts.remove(task.artefact.folder, 'checkpoints', '*/checkpoints', 'shards')


def tried(task: Task, folder: epath.Path, devices: parallel.Devices) -> str:
    """What one batch of a stage takes, in words: it runs in a scratch folder until its first long
    computation has made two calls."""
    waits = [a.stage for a in task.inputs.values() if a.done is None]
    if waits:
        return f'can be tried when {waits[0]} is there'
    if STAGES[task.stage].ACROSS:
        return 'computes little'
    scratch = Store(folder / SCRATCH)
    task = dataclasses.replace(task, artefact=scratch.find(task.stage, task.artefact.fingerprint))
    try:
        _run(task, scratch, dataclasses.replace(devices, probe=True), {})
    except parallel.Probed as e:
        return described(**e.facts)
    finally:
        artefacts.remove(folder, SCRATCH)
    return 'computes little'


def described(
    *, held: int, meanwhile: int, flops: float, seconds: float, limit: int, images: int, steps=None
) -> str:
    """One call in words: memory of a device, operations, time; of a training, time of all steps."""
    parts = [
        f'{memory.shown(held + meanwhile)} of {memory.shown(limit)} a device '
        f'({memory.shown(held)} held, {memory.shown(meanwhile)} for {images} images at once)',
        f'{flops / 1e9:.3g} GFLOP a device, loops counted once',
        f'{seconds:.3g} s, {images / seconds:.4g} images/s',
    ]
    if steps is not None:
        parts.append(f'{steps} steps in about {steps * seconds:.0f} s')
    return '; '.join(parts)


def _make(task: Task, store: Store, devices: parallel.Devices, repro: dict) -> None:
    started = time.monotonic()
    facts = _run(task, store, devices, repro)
    task.artefact.finish(seconds=round(time.monotonic() - started, 2), **(facts or {}))


def _run(task: Task, store: Store, devices: parallel.Devices, repro: dict):
    run = task.runs[0]
    return STAGES[task.stage].run(
        common.Context(
            config=run.config,
            data=common.seen(run.config, task.inputs),
            devices=devices,
            artefact=task.artefact,
            inputs=task.inputs,
            store=store,
            what=f'{task.stage} {name_of(task)}'.strip(),
            runs=task.runs,
            repro=repro,
        )
    )


def publish(task: Task, folder: epath.Path) -> None:
    """Copies what people look for into the workdir, and prints the report's table."""
    stage, own = STAGES[task.stage], task.artefact.folder
    found = [path.relative_to(own) for pattern in stage.PUBLISHED for path in own.glob(pattern)]
    for path in hosts.agree([str(path) for path in found]):
        artefacts.write(folder / path, (own / path).read_bytes() if hosts.first() else b'')
    if stage.PUBLISHED and hosts.first():
        stage.show(task.artefact, task.runs[0].config)
        for name in stage.PUBLISHED:
            if name.endswith('.html'):
                console.say(f'report: {folder / name}')


def name_of(task: Task) -> str:
    """Who a task is for, as short as it can be said: '' for all, an arm, or arm/seed."""
    arms = list(dict.fromkeys(run.arm for run in task.runs))
    seeds = {run.seed for run in task.runs}
    name = '+'.join(arms) if len(arms) <= 3 else f'{arms[0]}+{len(arms) - 1} more'
    return f'{name}/{next(iter(seeds))}' if len(seeds) == 1 else name


def table(tasks: Sequence[Task], wanted: Sequence[str], store: Store) -> str:
    """What is reused, resumed and to be done, and about how long that took when it last ran."""
    lines = [f'{"stage":<16} {"reused":>7} {"resumed":>8} {"to do":>6}   about']
    for stage in dict.fromkeys(t.stage for t in tasks):
        states = [t.state for t in tasks if t.stage == stage]
        todo = len(states) - states.count('reused')
        if stage not in wanted:
            about = 'not asked for'
        elif not todo:
            about = '-'
        else:
            seconds = store.seconds(stage)
            about = 'not known yet' if seconds is None else f'{todo * seconds:.0f} s'
        counts = (states.count(s) for s in ('reused', 'resumed', 'to do'))
        lines.append('{:<16} {:>7} {:>8} {:>6}   {}'.format(stage, *counts, about))
    return '\n'.join(lines)


def check_format(folder: epath.Path) -> None:
    """Raises UserError if another version of jaxood laid out this workdir; signs a new one."""
    path = folder / 'format.json'
    if artefacts.exists(path):
        found = json.loads(path.read_text())['format']
        if found != configs.FORMAT:
            raise UserError(
                f'{folder} was written in workdir format {found}, this jaxood reads format '
                f'{configs.FORMAT}. Choose another --workdir, or the jaxood version that wrote it.'
            )
    elif artefacts.exists(folder / 'runs.json'):
        raise UserError(f'{folder} has a runs.json but no format.json: not a workdir of jaxood.')
    else:
        artefacts.write(path, json.dumps({'format': configs.FORMAT}) + '\n')


def find_run(folder: epath.Path, arm: str | None, seed: int | None):
    """A finished run of a workdir: (its config, stage -> artefact).

    Args:
        arm, seed: which; None for the report's arm and the first seed.

    Raises:
        UserError: not a workdir, no such arm or seed, or its detector is not finished.
    """
    for name in ('config.json', 'runs.json'):
        if not (folder / name).exists():
            raise UserError(
                f'{folder} has no {name}: it is not the workdir of a run. Train one with '
                'python -m jaxood.main first.'
            )
    check_format(folder)
    config = ml_collections.ConfigDict(json.loads((folder / 'config.json').read_text()))
    index = json.loads((folder / 'runs.json').read_text())
    arm = (config.report.get('arm') or next(iter(index))) if arm is None else arm
    seeds = lookup(index, arm, f'{folder}: arm')
    seed = next(iter(seeds)) if seed is None else str(seed)
    places = lookup(seeds, seed, f'{folder}: seed')
    made = {k: Artefact(k, os.path.basename(v), folder / v) for k, v in places.items()}
    for stage in (*score.parts(config), 'score'):
        if stage not in made or made[stage].done is None:
            raise UserError(
                f'{folder}: run {arm}/{seed} has no finished {stage}. Run the command that made it '
                'again; it goes on where it was.'
            )
    run = next(r for r in configs.runs(config) if r.name == f'{arm}/{seed}')
    return run.config, made


def write_records(
    folder: epath.Path, config, tasks: Sequence[Task], devices, digests: Mapping[str, str]
) -> dict:
    """Writes config.json, runs.json ((arm, seed, stage) -> folder) and repro.json; returns that.

    Args:
        digests: of the data of each run, by its name.
    """
    index: dict[str, dict] = {}
    for task in tasks:
        place = os.path.relpath(task.artefact.folder, folder)
        for run in task.runs:
            index.setdefault(run.arm, {}).setdefault(str(run.seed), {})[task.stage] = place
    artefacts.write(folder / 'runs.json', json.dumps(index, indent=2) + '\n')
    resolved = configs.plain(config.copy_and_resolve_references())
    artefacts.write(folder / 'config.json', json.dumps(resolved, indent=2) + '\n')
    repro = {
        'versions': versions(),
        'source': {'git': git_revision()},
        'devices': {'mode': devices.mode} | {str(d.id): str(d) for d in devices.mesh.devices.flat},
        'data': {run.arm: digests[run.name] for t in tasks for run in t.runs},
    }
    if weights := {t.runs[0].arm: t.digest for t in tasks if t.digest}:
        repro['weights'] = weights
    artefacts.write(folder / 'repro.json', json.dumps(repro, indent=2) + '\n')
    return repro


def versions() -> dict[str, str | None]:
    """Of what results may depend on; None for what is not installed."""
    return {p: version_of(p) for p in PACKAGES} | {'python': platform.python_version()}


@functools.cache
def git_revision() -> str | None:
    """The revision of the checkout that runs, with '+' if it has changes; None outside of one."""
    git = ['git', '-C', os.path.dirname(__file__)]
    command = [*git, 'describe', '--always', '--abbrev=12', '--dirty=+']
    try:
        # not the repository that an installed jaxood happens to lie in
        subprocess.run(
            [*git, 'ls-files', '--error-unmatch', __file__], capture_output=True, check=True
        )
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, unless the environment says where already."""
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser('~/.cache/jaxood/xla'))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
