"""Planning: what is refused before anything is built, what is made, what is left where it is."""

import collections
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

from jaxood import artefacts, experiment, main
from jaxood.errors import UserError
from jaxood.stages import STAGES, common


@pytest.fixture
def nothing_runs(monkeypatch):
    """Stages that must not run."""

    def fail(context):
        raise AssertionError(f'{context.what} ran')

    for stage in STAGES.values():
        monkeypatch.setattr(stage, 'run', fail)


def refused(folder, message, config=None, only=None, **changes):
    """`execute` stops with this message, and leaves no artefact."""
    with pytest.raises(UserError, match=message) as e:
        main.execute(config or tiny.config(**changes), str(folder), only)
    assert not (folder / 'artefacts').exists()
    return str(e.value)


# ---- settings against data and devices --------------------------------------------------------


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(diffusion__batch_size=5000),
            r'config\.diffusion\.batch_size=5000 is more than the \d+ ID training images there are',
        ),
        (dict(filter__training__batch_size=5000), r'config\.filter\.training\.batch_size=5000 is'),
        (dict(detector__batch_size=5000), r'a batch takes 5000 outliers, but config\.outliers\.c'),
        (
            dict(detector__batch_size=2000, outliers__count=9000, outliers__max_candidates=9999),
            r'config\.detector\.batch_size=2000 is more than',
        ),
        (
            dict(diffusion__batch_size=20, parallel__num_devices=8),
            r'config\.diffusion\.batch_size=20 rows cannot be split over 8 devices',
        ),
        (
            dict(detector__batch_size=20, parallel__num_devices=8),
            r'config\.detector\.outlier_ratio=1\.0: 20 rows cannot be split over 8',
        ),
        (
            dict(detector__outlier_ratio=0.3, parallel__num_devices=8),
            r'config\.detector\.outlier_ratio=0\.3: 5 rows cannot be split over 8',
        ),
        (dict(parallel__num_devices=9), r'num_devices=9, but this machine has 8'),
        (dict(parallel__mode='pjit'), r"config\.parallel\.mode='pjit' is not known"),
        (dict(scores__knn__k=5000), r'config\.scores\.knn\.k=5000, but there are only \d+ ID'),
        (dict(outliers__mix='labels'), r"config\.outliers: mix 'labels' is not known"),
        (dict(outliers__low=0.9), r'config\.outliers: low=0\.9 and high=0\.7 must satisfy'),
        (dict(detector__direction='up'), r"config\.detector: direction 'up' is not known"),
        (dict(generator__channels=7), r'config\.generator: .*size=7 must be even'),
        (dict(preprocessing__mean=(0.5, 0.5, 0.5)), r'mean has 3 values, the images have 1 chan'),
        (dict(data__held_out=(8, 12)), r'config\.data: held_out: class 12 is not known'),
        (dict(data__held_out=(0, 1, 2, 3, 4, 6, 7, 8)), r'a classifier needs two ID classes'),
        (dict(data__validation=0.0), r'config\.data\.validation=0 leaves no ID images'),
        (
            dict(data__validation=0.9),
            r'config\.data: validation=0\.9 and test=0\.25 must be shares',
        ),
        (dict(data__ood={}, data__held_out=()), r'there is no OOD set to report on'),
        (dict(data__ood__photos__count=0), r'config\.data\.ood\.photos: count=0 must be at least'),
        (dict(data__ood__photos__size=9), r'config\.data\.ood\.photos has images of shape \(9, 9'),
        (dict(data__ood__photos__cuont=9), r"config\.data\.ood\.photos\.cuont \(of 'photos'\)"),
        (dict(data__id__name='digit'), r"config\.data\.id\.name='digit' is not known.*'digits'"),
        (dict(data__id__name='folder'), r"config\.data\.id\.path is not set, and 'folder' needs"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(
    tmp_path, nothing_runs, changes, message
):
    config = tiny.config()
    for path, value in changes.items():
        *sections, key = path.split('__')
        place = config
        for section in sections:
            place = place[section]
        with place.unlocked():
            place[key] = value
    refused(tmp_path / 'run', message, config)


# ---- the user's images ------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """A folder of PNGs: two classes of 40 grey 8 x 8 images."""
    rng = np.random.default_rng(0)
    for name in ('cat', 'dog'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'images' / name / f'{i:02d}.png')
    return tmp_path / 'images'


def of_folder(path, **changes):
    source = dict(data__id__name='folder', data__id__path=str(path))
    classes = dict(data__held_out=(), data__held_out_validation=())
    return tiny.config(**source, **classes, scores__knn__k=5, **changes)


def test_a_folder_is_a_data_set(pictures, tmp_path, nothing_runs):
    """It is read and planned; the first stage to run is the one that fails here."""
    with pytest.raises(AssertionError, match=r'train_diffusion diffusion/0 ran'):
        main.execute(of_folder(pictures), str(tmp_path / 'run'))
    data = common.load_data(experiment.check(of_folder(pictures))[0].config)
    assert data.id.train.class_names == ('cat', 'dog')
    assert data.shape == (8, 8, 1)


def break_file(pictures):
    name = pictures / 'dog' / '07.png'
    name.write_bytes(name.read_bytes()[:60])


def empty_file(pictures):
    (pictures / 'cat' / '03.png').write_bytes(b'')


def larger_image(pictures):
    Image.new('L', (9, 8)).save(pictures / 'dog' / '10.png')


def colour_image(pictures):
    Image.new('RGB', (8, 8)).save(pictures / 'dog' / '10.png')


def sixteen_bits(pictures):
    Image.new('I;16', (8, 8)).save(pictures / 'dog' / '10.png')


def few_images(pictures):
    for i in range(8, 40):
        for name in ('cat', 'dog'):
            (pictures / name / f'{i:02d}.png').unlink()


def no_images(pictures):
    for name in ('cat', 'dog'):
        for path in (pictures / name).iterdir():
            path.unlink()


def one_class(pictures):
    for path in (pictures / 'dog').iterdir():
        path.unlink()
    (pictures / 'dog').rmdir()


def no_classes(pictures):
    for path in (pictures / 'dog').iterdir():
        path.rename(pictures / f'dog{path.name}')
    (pictures / 'dog').rmdir()
    for path in (pictures / 'cat').iterdir():
        path.rename(pictures / path.name)
    (pictures / 'cat').rmdir()


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (break_file, r'config\.data.*dog/07\.png cannot be read.*on_error'),
        (empty_file, r'config\.data.*cat/03\.png cannot be read.*on_error'),
        (larger_image, r'dog/10\.png is 9 x 8 pixels in grey\. Set size'),
        (colour_image, r'dog/10\.png is 8 x 8 pixels in colour\. Set channels'),
        (sixteen_bits, r"dog/10\.png cannot be read: its pixels are of Pillow mode 'I;16'"),
        (few_images, r'batch_size=16 is more than the \d+ ID training images there are'),
        (no_images, r'images holds no images\. It should hold'),
        (one_class, r'a classifier needs two ID classes, and here it has 1'),
        (no_classes, r'config\.data\.id: the images have no labels, which train_diffusion learns'),
    ],
)
def test_images_that_will_not_do(pictures, tmp_path, nothing_runs, spoil, message):
    spoil(pictures)
    shape = (
        dict(data__size=None, data__channels=None, data__ood={})
        if spoil in (*(larger_image, colour_image),)
        else {}
    )
    refused(tmp_path / 'run', message, of_folder(pictures, **shape))


def test_a_missing_folder(tmp_path, nothing_runs):
    refused(tmp_path / 'run', r'config\.data\.id: .*nowhere cannot be listed', of_folder('nowhere'))


def test_unreadable_images_are_skipped_if_wished(pictures, tmp_path, nothing_runs, caplog):
    break_file(pictures)
    empty_file(pictures)
    with pytest.raises(AssertionError, match='train_diffusion diffusion/0 ran'):
        main.execute(of_folder(pictures, data__on_error='skip'), str(tmp_path / 'run'))
    named = [r.getMessage() for r in caplog.records if 'left out' in r.getMessage()]
    assert len(named) == 2
    assert 'cat/03.png' in named[0]
    assert 'dog/07.png' in named[1]


@pytest.mark.parametrize(
    ('arrays', 'message'),
    [
        (dict(labels=[0, 1, -1] * 20), r'labels\[2\] = -1, but labels count from 0'),
        (dict(labels=[0, 1, 2] * 20, class_names=['a', 'b']), r'labels\[2\] = 2, but labels count'),
        (dict(labels=[0] * 60), r'a classifier needs two ID classes, and here it has 1'),
        (dict(labels=[0, 2] * 30), r"class '1' has no image to train on"),
        (dict(labels=[0.5] * 60), r"'labels' is float64"),
        (dict(), r'config\.data\.id: the images have no labels'),
    ],
)
def test_labels_that_will_not_do(tmp_path, nothing_runs, arrays, message):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    np.savez(tmp_path / 'a.npz', images=images, **{k: np.array(v) for k, v in arrays.items()})
    config = of_folder(tmp_path / 'a.npz')
    config.data.id.name = 'npz'
    refused(tmp_path / 'run', message, config)


# ---- workdirs ---------------------------------------------------------------------------------


def test_a_workdir_in_use(tmp_path, nothing_runs):
    with artefacts.lock(epath.Path(tmp_path / 'run')):
        refused(tmp_path / 'run', rf'in use by another jaxood process \(process {os.getpid()}\)')


def test_a_workdir_of_another_format(tmp_path, nothing_runs):
    (tmp_path / 'format.json').write_text('{"format": 0}')
    refused(tmp_path, r'was written in workdir format 0, this jaxood reads format \d+')
    (tmp_path / 'format.json').unlink()
    (tmp_path / 'runs.json').write_text('{}')
    refused(tmp_path, r'has a runs\.json but no format\.json: not a workdir of jaxood')


def test_a_workdir_that_is_a_file(tmp_path, nothing_runs):
    (tmp_path / 'run').write_text('hello')
    with pytest.raises(OSError, match='File exists') as e:
        main.execute(tiny.config(), str(tmp_path / 'run'))
    assert e.value.errno in main.DISK
    assert (tmp_path / 'run').read_text() == 'hello'


@pytest.mark.parametrize(
    ('only', 'message'),
    [
        (['sythesise'], r"--stages: stage 'sythesise' is not known\. Did you mean 'synthesise'"),
        (['train_detector'], r'train_detector builds on synthesise, which has not been made yet'),
        (['report'], r'report builds on'),
    ],
)
def test_stages_that_cannot_be_run_alone(tmp_path, nothing_runs, only, message):
    refused(tmp_path / 'run', message, only=only)


def test_a_stage_needs_the_one_it_builds_on(tmp_path, nothing_runs):
    message = "config.stages has 'synthesise', which builds on 'train_diffusion': add it"
    refused(tmp_path / 'run', message, stages=('synthesise', 'train_detector'))


# ---- what is planned --------------------------------------------------------------------------


def tasks_of(folder, **changes):
    return experiment.plan(experiment.check(tiny.config(**changes)), artefacts.Store(folder))


def test_what_runs_share_is_made_once(tmp_path):
    tasks = tasks_of(epath.Path(tmp_path), seeds=(0, 1))
    assert collections.Counter(t.stage for t in tasks) == {
        'train_diffusion': 1,
        'train_judges': 1,
        'synthesise': 2,  # noise, diffusion
        'train_detector': 6,
        'score': 6,
        'report': 1,
    }
    names = {experiment.name_of(t) for t in tasks if t.stage == 'train_judges'}
    assert names == {'diffusion+noise'}
    (report,) = (t for t in tasks if t.stage == 'report')
    assert {name for name in report.inputs if name.endswith('/score')} == {
        f'{arm}/{seed}/score' for arm in ('none', 'noise', 'diffusion') for seed in (0, 1)
    }


def test_tasks_come_after_what_they_build_on(tmp_path):
    seen = set()
    for task in tasks_of(epath.Path(tmp_path)):
        assert {a.folder for a in task.inputs.values()} <= seen
        seen.add(task.artefact.folder)


def test_the_table_tells_what_is_reused_and_how_long_the_rest_takes(tmp_path):
    store = artefacts.Store(epath.Path(tmp_path))
    tasks = experiment.plan(experiment.check(tiny.config(seeds=(0, 1))), store)
    detectors = [t for t in tasks if t.stage == 'train_detector']
    detectors[0].artefact.finish(seconds=4.0)
    (detectors[1].artefact / 'log.jsonl').parent.mkdir(parents=True)
    text = experiment.table(tasks, ['train_judges', 'train_detector'], store)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert lines['train_detector'] == ['1', '1', '4', '20', 's']
    assert lines['train_judges'] == ['0', '0', '1', 'not', 'known', 'yet']
    assert lines['score'] == ['0', '0', '6', 'not', 'asked', 'for']


# ---- a disk that refuses ----------------------------------------------------------------------


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch, capsys, number):
    """The judges are trained, saving their scores fails; the next call trains nothing again."""
    config = tiny.config(parallel__num_devices=1)
    only = ['train_judges']
    save = artefacts.save

    def full(path, **arrays):
        raise OSError(number, os.strerror(number), os.fspath(path))

    def execute():
        main.execute(config, str(tmp_path), only)

    monkeypatch.setattr(artefacts, 'save', full)
    assert main.run_command(lambda argv: (), execute, []) == 2
    error = capsys.readouterr().err
    assert error.count('jaxood: ') == 1
    assert f'jaxood: {os.strerror(number)}: {tmp_path}' in error
    (folder,) = (tmp_path / 'artefacts/train_judges').iterdir()
    assert (folder / 'weights').exists()
    assert not (folder / 'done.json').exists()
    monkeypatch.setattr(artefacts, 'save', save)
    assert main.run_command(lambda argv: (), execute, []) == 0
    assert 'resumed' in capsys.readouterr().err
    assert json.loads((folder / 'done.json').read_text())['validation_accuracy']


@pytest.mark.slow
def test_a_full_disk_in_a_process_of_its_own(tmp_path):
    """No file may grow beyond 16 KiB: the first checkpoint fails, inside Orbax. One message, 2."""
    here = os.path.dirname(tiny.__file__)
    code = (
        f'import sys; sys.path.insert(0, {here!r}); import resource, signal, tiny\n'
        'from jaxood import main\n'
        'config = tiny.config(parallel__num_devices=1)\n'
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
        'import jax, jaxood.experiment\n'
        'jax.config.update("jax_enable_compilation_cache", False)\n'  # not half-written ones
        'resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))\n'
        f'execute = lambda: main.execute(config, {str(tmp_path)!r}, ["train_diffusion"])\n'
        'sys.exit(main.run_command(lambda argv: (), execute, []))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count('jaxood: ') == 1
    assert done.stderr.splitlines()[-1].startswith(f'jaxood: File too large: {tmp_path}')
    assert 'Traceback' not in done.stderr
    assert 'Error' not in done.stderr
