"""The whole chain, tiny: what is made, what is reused, and what changes nothing."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

from jaxood import artefacts, experiment, main, metrics, parallel, predict
from jaxood.errors import UserError
from jaxood.stages import STAGES, common, synthesise


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A workdir in which the tiny chain has run on one device."""
    folder = tmp_path_factory.mktemp('chain') / 'run'
    config = tiny.config(parallel__num_devices=1)
    main.execute(config, str(folder))
    return folder, config


@pytest.fixture(autouse=True)
def _forgotten():
    """Flags outlive a call of `predict`, which a process makes only once."""
    yield
    for name in predict.FLAGS:
        predict.FLAGS[name].unparse()


def made(folder, stage, arm='diffusion', seed='0'):
    return folder / json.loads((folder / 'runs.json').read_text())[arm][seed][stage]


def test_a_run_leaves_what_the_readme_promises(finished):
    folder, _ = finished
    for name in (
        'report.html',
        'results.json',
        'results.csv',
        'runs.json',
        'config.json',
        'repro.json',
    ):
        assert (folder / name).stat().st_size > 0
    for arm, seeds in json.loads((folder / 'runs.json').read_text()).items():
        for stages in seeds.values():
            assert ('synthesise' in stages) == (arm != 'none')
            for place in stages.values():
                assert (folder / place / 'done.json').exists()


def test_arms_share_what_they_agree_on(finished):
    folder, _ = finished
    assert made(folder, 'train_judges') == made(folder, 'train_judges', 'noise')
    assert made(folder, 'synthesise') != made(folder, 'synthesise', 'noise')


def test_index_accounts_for_every_candidate(finished):
    folder, config = finished
    place = made(folder, 'synthesise')
    index = [json.loads(line) for line in (place / 'index.jsonl').read_text().splitlines()]
    assert [row['candidate'] for row in index] == list(range(len(index)))
    kept = [row for row in index if row['kept']]
    assert [row['outlier'] for row in kept] == list(range(config.outliers.count))
    assert all('why' in row for row in index if not row['kept'])
    assert all(row['first'] != row['second'] for row in index)
    images = artefacts.load_table(epath.Path(place / 'outliers'))['images']
    assert images.shape == (config.outliers.count, 8, 8, 1)
    assert images.dtype == np.uint8


def test_second_run_redoes_nothing(finished, monkeypatch):
    folder, config = finished
    before = {p: p.stat().st_mtime_ns for p in folder.glob('artefacts/*/*/*')}
    (made(folder, 'synthesise') / 'shards').mkdir()  # as a kill may leave them

    def fail(context):
        raise AssertionError(f'{context.what} ran again')

    for stage in STAGES.values():
        monkeypatch.setattr(stage, 'run', fail)
    main.execute(config, str(folder))
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob('artefacts/*/*/*')}


def test_a_new_score_keeps_the_detectors(finished, tmp_path):
    folder, _ = finished
    config = tiny.config(parallel__num_devices=1, artefacts_dir=str(folder / 'artefacts'))
    with config.unlocked():
        config.scores.knn1 = {'name': 'knn', 'k': 1}
    tasks = experiment.plan(experiment.check(config), artefacts.Store(folder / 'artefacts'))
    states = {(task.stage, task.state) for task in tasks}
    assert ('train_detector', 'reused') in states
    assert ('score', 'to do') in states
    assert not {s for s in states if s[1] == 'to do'} - {('score', 'to do'), ('report', 'to do')}


# Runs the tiny chain in a process of its own, which dies as it writes for the nth time: at once, or
# a moment later in the midst of it.
DIES = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import tiny
from jaxood import artefacts, console, main
from jaxood.train import checkpoint

left = int(sys.argv[3])

def dying(function):
    def write(*args, **kwargs):
        global left
        left -= 1
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)
        if left == 0:
            die() if int(sys.argv[3]) % 2 else threading.Timer(0.002, die).start()
        return function(*args, **kwargs)
    return write

artefacts.write = dying(artefacts.write)
console.Log.write = dying(console.Log.write)
checkpoint.Checkpoints.save = dying(checkpoint.Checkpoints.save)
checkpoint.save_weights = dying(checkpoint.save_weights)
main.execute(tiny.config(parallel__num_devices=1), sys.argv[2])
"""


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bits(finished, tmp_path):
    """SIGKILL at the 6th write, the 14th of the next call, the 22nd, ... until it gets through."""
    folder, _ = finished
    here, codes = os.path.dirname(tiny.__file__), []
    while 0 not in codes:
        writes = str(6 + 8 * len(codes))
        command = [sys.executable, '-c', DIES, here, str(tmp_path), writes]
        codes.append(subprocess.run(command, stderr=subprocess.DEVNULL, timeout=300).returncode)
        assert codes[-1] in (0, -signal.SIGKILL)
    assert len(codes) > 4
    for name in ('results.json', 'results.csv'):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    for arm in ('noise', 'diffusion'):
        ours, theirs = (made(f, 'synthesise', arm) for f in (folder, tmp_path))
        for name in ('outliers/images.npy', 'rejected.npz', 'index.jsonl'):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    left = [
        p for p in tmp_path.rglob('*') if p.name in ('checkpoints', 'shards') or '-tmp' in p.name
    ]
    assert left == []


def candidates(finished, mode, num_devices, batch):
    """The first 16 mixtures before rounding, on other devices or in other batches."""
    folder, config = finished
    run = next(r for r in experiment.check(config) if r.arm == 'diffusion')
    devices = parallel.setup(mode, num_devices)
    place = artefacts.Artefact('train_diffusion', '', epath.Path(made(folder, 'train_diffusion')))
    rows, shared = synthesise.renderer(run.config, common.load_data(run.config), place)
    compiled, shared = devices.compile_rows(rows), devices.replicate(shared)
    size = devices.batch_size(batch)
    numbers = np.arange(16, dtype=np.int32)
    chunks = (parallel.pad_rows(numbers[at : at + size], size) for at in range(0, 16, size))
    made_rows = list(parallel.map_rows(devices, compiled, shared, chunks))
    return np.concatenate([part['image'] for part in made_rows])


def test_candidates_do_not_depend_on_batch_devices_or_mode(finished):
    expected = candidates(finished, 'jit', 1, 16)
    assert np.ptp(expected) > 0.5
    for mode, num_devices, batch in [('jit', 1, 7), ('jit', 1, 64), ('jit', 8, 8), ('pmap', 8, 16)]:
        got = candidates(finished, mode, num_devices, batch)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_leak_filter_does_not_depend_on_batch_or_devices(finished, tmp_path):
    """The same candidates are kept and rejected, and their pixels agree up to rounding."""
    folder, _ = finished
    for stage in ('train_diffusion', 'train_judges'):
        shutil.copytree(folder / 'artefacts' / stage, tmp_path / 'artefacts' / stage)
    config = tiny.config(parallel__num_devices=8, parallel__inference_batch=7)
    main.execute(config, str(tmp_path), only=['synthesise'])
    ours, theirs = (made(f, 'synthesise') for f in (folder, tmp_path))
    ours_index, theirs_index = (
        [json.loads(line) for line in (f / 'index.jsonl').read_text().splitlines()]
        for f in (ours, theirs)
    )
    assert 0 < sum(not row['kept'] for row in ours_index) < len(ours_index)
    for row, other in zip(ours_index, theirs_index, strict=True):
        assert {k: row[k] for k in ('candidate', 'outlier', 'first', 'second')} == {
            k: other[k] for k in ('candidate', 'outlier', 'first', 'second')
        }
    a, b = (artefacts.load_table(epath.Path(f / 'outliers'))['images'] for f in (ours, theirs))
    assert np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['jit', 'pmap'])
def test_eight_devices_train_as_one_does(finished, tmp_path, mode):
    """The losses of every logged step agree; BatchNorm sees the whole batch in both modes."""
    folder, _ = finished
    config = tiny.config(parallel__num_devices=8, parallel__mode=mode)
    main.execute(config, str(tmp_path), only=['train_diffusion', 'train_judges'])
    for stage, log in [('train_diffusion', 'log.jsonl'), ('train_judges', 'judge_1/log.jsonl')]:
        ours, theirs = (
            [json.loads(line)['loss'] for line in (made(f, stage) / log).read_text().splitlines()]
            for f in (folder, tmp_path)
        )
        np.testing.assert_allclose(ours, theirs, rtol=2e-3)


def test_second_call_of_every_step_compiles_nothing(finished, tmp_path, compiled):
    """The same chain under another seed of the detectors, in this process: nothing is compiled."""
    folder, _ = finished
    layout = dict(parallel__num_devices=1, artefacts_dir=str(folder / 'artefacts'))
    main.execute(tiny.config(seeds=(1,), **layout), str(tmp_path / 'a'))
    compiled.clear()
    only = ['train_detector', 'score']
    main.execute(tiny.config(seeds=(2,), **layout), str(tmp_path / 'b'), only=only)
    assert compiled == []


def test_each_training_step_is_compiled_once(tmp_path, compiled):
    config = tiny.config(parallel__num_devices=8, seed=1, filter__training__batch_size=24)
    main.execute(config, str(tmp_path), only=['train_diffusion', 'train_judges'])
    assert compiled.count('jit(train_step)') == 2  # the generator's; one for both judges


def test_predict_scores_as_the_score_stage_did(finished, tmp_path, capsys):
    folder, config = finished
    test = common.load_data(config).id.test
    for i in range(5):
        Image.fromarray(test.images[i, ..., 0]).save(tmp_path / f'digit{i}.png')
    for arm in ('none', 'diffusion'):
        assert predict.main(['predict', f'--workdir={folder}', f'--arm={arm}', str(tmp_path)]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        stored = artefacts.load(epath.Path(made(folder, 'score', arm) / 'msp/test.npz'))
        got = [float(row['score']) for row in rows]
        np.testing.assert_allclose(got, stored['score'][:5], rtol=1e-4, atol=1e-6)
        assert [row['class'] for row in rows] == [test.class_names[k] for k in stored['pred'][:5]]


@pytest.mark.slow
def test_predict_separates_mixed_files(tmp_path, capsys):
    """A detector that has learned something: digits in, patches of photographs out."""
    config = tiny.config(
        arms=dict(main=dict(outliers=dict(name='uniform_noise'), filter=dict(name='none'))),
        report__arm='main',
        outliers__count=500,
        backbone=dict(name='cnn', widths=(8, 16)),
        detector__steps=300,
        detector__batch_size=32,
        detector__noise=0.0,
    )
    main.execute(config, str(tmp_path / 'run'), ['synthesise', 'train_detector', 'score'])
    data = common.load_data(config)
    for name, examples in (('digit', data.id.test), ('photo', data.ood['photos'])):
        for i in range(60):
            Image.fromarray(examples.images[i, ..., 0]).save(tmp_path / f'{name}{i}.png')
    argv = ['predict', f'--workdir={tmp_path}/run', '--score=knn', str(tmp_path)]
    assert predict.main(argv) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 120
    ood = np.array(['photo' in row['file'] for row in rows])
    scores = np.array([float(row['score']) for row in rows])
    flagged = np.array([row['decision'] == 'OOD' for row in rows])
    assert metrics.auroc(scores[~ood], scores[ood]) > 0.98
    assert flagged[ood].mean() > 0.95
    assert flagged[~ood].mean() < 0.15  # 5 % of the validation images


def test_a_judge_that_lets_nothing_pass_says_so(finished, tmp_path):
    folder, _ = finished
    for stage in ('train_diffusion', 'train_judges'):
        shutil.copytree(folder / 'artefacts' / stage, tmp_path / 'artefacts' / stage)
    config = tiny.config(filter__quantile=0.0, outliers__max_candidates=60)
    with pytest.raises(UserError, match=r'only \d+ of \d+ candidates passed the leak filter'):
        main.execute(config, str(tmp_path), only=['synthesise'])
