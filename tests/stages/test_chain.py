"""The whole chain, tiny: what is made, what is reused, and what changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from etils import epath

from jaxood import artefacts, experiment, main, parallel, predict
from jaxood.errors import UserError
from jaxood.stages import STAGES, common, synthesise


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A workdir in which the tiny chain has run on one device."""
    folder = tmp_path_factory.mktemp('chain') / 'run'
    config = tiny.config(parallel__num_devices=1)
    main.execute(config, str(folder))
    return folder, config


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
    images = artefacts.load(epath.Path(place / 'outliers.npz'))['images']
    assert images.shape == (config.outliers.count, 8, 8, 1)
    assert images.dtype == np.uint8


def test_second_run_redoes_nothing(finished, monkeypatch):
    folder, config = finished
    before = {p: p.stat().st_mtime_ns for p in folder.glob('artefacts/*/*/*')}

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


def run_command(folder, *more):
    """The chain in a process of its own, with the tiny config."""
    here = os.path.dirname(tiny.__file__)
    code = (
        f'import sys; sys.path.insert(0, {here!r}); import tiny; from jaxood import main; '
        f'main.execute(tiny.config(parallel__num_devices=1), {str(folder)!r})'
    )
    return subprocess.Popen([sys.executable, '-c', code, *more], stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_bits(finished, tmp_path):
    """SIGKILL in the middle of training, of synthesis and of detectors; then once more to the end."""
    folder, _ = finished
    other = tmp_path / 'killed'
    marks = ('train_diffusion/*/log.jsonl', 'synthesise/*/shards/*', 'train_detector/*/log.jsonl')
    for mark in marks:
        process = run_command(other)
        deadline = time.monotonic() + 300
        while not list(other.glob(f'artefacts/{mark}')) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run_command(other).wait() == 0
    for name in ('results.json', 'results.csv'):
        assert (other / name).read_bytes() == (folder / name).read_bytes()
    for name in ('outliers.npz', 'index.jsonl'):
        ours, theirs = (made(f, 'synthesise') / name for f in (folder, other))
        assert ours.read_bytes() == theirs.read_bytes()


def candidates(finished, mode, num_devices, batch):
    """The first 16 mixtures before rounding, on other devices or in other batches."""
    folder, config = finished
    run = next(r for r in experiment.check(config) if r.arm == 'diffusion')
    devices = parallel.setup(mode, num_devices)
    place = artefacts.Artefact('train_diffusion', '', epath.Path(made(folder, 'train_diffusion')))
    context = common.Context(
        config=run.config,
        data=common.load_data(run.config),
        devices=devices,
        artefact=place,
        inputs={'train_diffusion': place},
        what='',
        runs=[run],
        repro={},
    )
    rows, shared = synthesise.renderer(context)
    compiled, shared = devices.compile_rows(rows), devices.replicate(shared)
    size = devices.batch_size(batch)
    numbers = np.arange(16, dtype=np.int32)
    chunks = (parallel.pad_rows(numbers[at : at + size], size) for at in range(0, 16, size))
    made_rows = list(parallel.map_rows(devices, compiled, shared, chunks))
    return np.concatenate([part['image'] for part in made_rows])


def test_candidates_do_not_depend_on_batch_devices_or_mode(finished):
    expected = candidates(finished, 'jit', 1, 16)
    assert np.ptp(expected) > 0.5
    for mode, num_devices, batch in [('jit', 1, 7), ('jit', 8, 8), ('pmap', 8, 16)]:
        got = candidates(finished, mode, num_devices, batch)
        np.testing.assert_allclose(got, expected, atol=1e-5)


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


def test_predict_separates_and_decides(finished, tmp_path, capsys):
    folder, config = finished
    from PIL import Image

    data = common.load_data(config)
    for i in range(5):
        Image.fromarray(data.id.test.images[i, ..., 0]).save(tmp_path / f'digit{i}.png')
    (tmp_path / 'broken.png').write_bytes(b'')
    assert predict.main(['predict', f'--workdir={folder}', str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'file,score,p_value,decision,class,threshold'
    assert len(lines) == 7
    assert lines[1].split(',')[0].endswith('broken.png')
    assert lines[1].split(',')[3] == 'error'
    stored = artefacts.load(epath.Path(made(folder, 'score') / 'msp/test.npz'))
    got = [float(line.split(',')[1]) for line in lines[2:]]
    np.testing.assert_allclose(got, stored['score'][:5], rtol=1e-4, atol=1e-6)


def test_a_stage_without_the_one_below_says_so(tmp_path):
    config = tiny.config(stages=('synthesise', 'train_detector'))
    with pytest.raises(UserError, match="'synthesise', which builds on 'train_diffusion'"):
        main.execute(config, str(tmp_path))
