"""Scoring images with a run whose validation scores are made by hand."""

import csv
import io
import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

from jaxood import artefacts, deployed, predict
from jaxood import config as configs
from jaxood.data import augment, decoding
from jaxood.models import Classifier
from jaxood.models.backbones.cnn import CNN
from jaxood.models.heads import Linear
from jaxood.scores import logit
from jaxood.stages.parts import networks
from jaxood.train import checkpoint

CLASSES = ('cat', 'dog', 'owl')
KNOWN = np.linspace(0.30, 0.49, 20).astype(np.float32)[::-1]  # 0.30, 0.31, ... 0.49, in no order
COLUMNS = ['file', 'score', 'p_value', 'decision', 'class', 'threshold']


@pytest.fixture(autouse=True)
def _forgotten():
    """Flags outlive a call of `main`, which a process makes only once."""
    yield
    for name in predict.FLAGS:
        predict.FLAGS[name].unparse()


def lay_out(folder, shape=(8, 8, 1)):
    """A workdir as a finished run leaves it, untrained; returns images -> logits."""
    arms = dict(main=dict(outliers=dict(name='none'), detector=dict(name='plain')))
    backbone = dict(name='cnn', widths=(4, 8))
    config = tiny.config(seeds=(0, 3), arms=arms, report__arm='main', report__score='msp')
    config.backbone = backbone
    model = Classifier(backbone=CNN(widths=(4, 8)), head=Linear(num_classes=len(CLASSES)))
    variables = model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
    variables['params']['head']['kernel'] = variables['params']['head']['kernel'] * 30.0
    places = {k: epath.Path(folder / 'artefacts' / k / 'f') for k in ('train_detector', 'score')}
    checkpoint.save_weights(places['train_detector'] / 'weights', variables)
    made = {k: artefacts.Artefact(k, 'f', place) for k, place in places.items()}
    look = configs.plain(config.preprocessing)
    head = {'name': 'linear'}
    network = dict(backbone=backbone, head=head, preprocessing=look, num_classes=len(CLASSES))
    made['train_detector'].finish(**network)
    outputs = dict(logits=np.zeros((9, 3), np.float32), features=np.eye(9, 8, dtype=np.float32))
    digests = {'train': 'a', 'validation': 'b'}
    for digest in digests.values():
        key = configs.fingerprint('train_detector', 'f', 'float32')
        features = networks.find_features(artefacts.Store(folder / 'artefacts'), key, digest)
        features.folder.mkdir(parents=True)
        for name, array in outputs.items():
            artefacts.save_rows(features / f'{name}.npy', [array], len(array))
        features.finish(labels=False)
    for label, known in (('msp', KNOWN), ('energy', KNOWN - 50.0)):
        artefacts.save(places['score'] / f'{label}/validation.npz', score=known)
        sidecar = json.dumps({'settings': {'name': label}})
        artefacts.write(places['score'] / f'{label}.json', sidecar)
    made['score'].finish(class_names=CLASSES, shape=shape, bank=digests)
    paths = {k: os.path.relpath(place, folder) for k, place in places.items()}
    index = {'main': {'0': paths, '3': {'train_detector': 'artefacts/train_detector/other'}}}
    (folder / 'runs.json').write_text(json.dumps(index))
    resolved = configs.plain(config.copy_and_resolve_references())
    (folder / 'config.json').write_text(json.dumps(resolved))
    (folder / 'format.json').write_text(json.dumps({'format': configs.FORMAT}))

    def logits(images):
        x = augment.standardise(np.stack(images), **configs.plain(config.preprocessing))
        return np.asarray(model.apply(variables, x, train=False)['logits'])

    return logits


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp('run')


@pytest.fixture(scope='module')
def logits(workdir):
    return lay_out(workdir)


@pytest.fixture
def pictures(tmp_path):
    """Twelve images of the run's own shape, in folders: (paths in order, images)."""
    rng, paths, images = np.random.default_rng(0), [], []
    for i in range(12):
        path = tmp_path / 'photos' / 'ab'[i // 6] / f'{i:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        images.append(rng.integers(0, 256, (8, 8, 1), np.uint8))
        Image.fromarray(images[-1][..., 0]).save(path)
        paths.append(str(path))
    return paths, images


@pytest.fixture
def run(workdir, logits, capsys):
    """Runs the command -> (rows of the CSV, standard error); `code` is what it must return."""

    def run(*argv, code=0):
        assert predict.main(['predict', f'--workdir={workdir}', *map(str, argv)]) == code
        captured = capsys.readouterr()
        return list(csv.DictReader(io.StringIO(captured.out))), captured.err

    return run


def top(path):
    return os.path.dirname(os.path.dirname(path))


# ---- rows -------------------------------------------------------------------------------------


def test_rows_follow_their_formulas(run, logits, pictures):
    """Score, class, threshold of 95 %, decision and conformal p-value, recomputed from scratch."""
    paths, images = pictures
    rows, _ = run(top(paths[0]))
    assert [row['file'] for row in rows] == paths
    assert list(rows[0]) == COLUMNS
    z = logits(images)
    for row, score, k in zip(rows, np.asarray(logit.msp(z)), z.argmax(-1)):
        assert float(row['score']) == pytest.approx(score, rel=1e-4, abs=1e-6)
        assert row['class'] == CLASSES[k]
        assert float(row['threshold']) == np.sort(KNOWN)[18]  # 19 of 20 at most
        assert row['decision'] == ('OOD' if score > np.sort(KNOWN)[18] else 'ID')
        assert float(row['p_value']) == pytest.approx((1 + np.sum(score <= KNOWN)) / 21, abs=1e-6)
    assert {row['decision'] for row in rows} == {'ID', 'OOD'}
    assert len({row['p_value'] for row in rows}) > 2


@pytest.fixture
def decide(workdir, logits):
    """Rows of a detector that gives its next images these scores."""
    detectors = {}

    def decide(keep, scores, known=None):
        options = dict(arm=None, seed=None, score=None, on_error='stop', batch=64)
        if keep not in detectors:
            detectors[keep] = deployed.Detector(workdir, keep=keep, **options)
        detector = detectors[keep]
        detector.known = detector.known if known is None else np.sort(known)
        detector.score = lambda out, chunks: np.float32(scores)
        return list(detector._decide(np.zeros((len(scores), 8, 8, 1), np.uint8)))

    return decide


@pytest.mark.parametrize(
    ('keep', 'kept'), [(0.95, 19), (0.9, 18), (0.05, 1), (0.051, 2), (0.5, 10), (0.999, 20)]
)
def test_the_threshold_keeps_at_least_that_share_and_no_more_than_it_must(decide, keep, kept):
    rows = decide(keep, KNOWN[:8])
    threshold = rows[0]['threshold']
    assert np.sum(threshold >= KNOWN) == kept >= keep * 20 - 1e-9
    rows = [row for at in (0, 8, 12) for row in decide(keep, KNOWN[at : at + 8])[: 20 - at]]
    assert all((row['decision'] == 'ID') == (row['score'] <= threshold) for row in rows)


def test_p_values_by_hand(decide):
    """The share of 20 known images and the new one that score at least as high; ties count."""
    rows = decide(0.95, [0.1, float(np.sort(KNOWN)[0]), 0.395, float(np.sort(KNOWN)[19]), 0.6])
    expected = [21 / 21, 21 / 21, 11 / 21, 2 / 21, 1 / 21]
    assert [row['p_value'] for row in rows] == pytest.approx(expected, abs=1e-6)


def test_p_values_are_valid(decide):
    """Over known and new images of one distribution, P(p <= a) is at most a, and hardly less."""
    rng, p_values = np.random.default_rng(0), []
    for _ in range(200):
        known, new = rng.normal(size=20), rng.normal(size=50)
        p_values += [row['p_value'] for row in decide(0.95, new, known=known)]
    for k in (1, 2, 5, 10):
        share = np.mean(np.array(p_values) <= k / 21 + 1e-6)
        assert share == pytest.approx(k / 21, abs=0.03)


def test_another_score_has_another_threshold(run, pictures):
    rows, _ = run('--score=energy', pictures[0][0])
    assert float(rows[0]['threshold']) == pytest.approx(np.sort(KNOWN)[18] - 50.0, rel=1e-6)


def test_json_has_the_same_rows(workdir, logits, pictures, run, capsys):
    rows, _ = run(*pictures[0][:3])
    argv = ['predict', f'--workdir={workdir}', '--format=json', *pictures[0][:3]]
    assert predict.main(argv) == 0
    as_json = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(row) for row in as_json] == [COLUMNS] * 3
    assert [{k: str(v) for k, v in row.items()} for row in as_json] == rows


def test_rows_go_to_a_file(run, pictures, tmp_path):
    rows, _ = run(*pictures[0])
    assert run(f'--out={tmp_path}/rows.csv', *pictures[0])[0] == []
    with open(tmp_path / 'rows.csv', newline='') as f:
        assert list(csv.DictReader(f)) == rows


# ---- files ------------------------------------------------------------------------------------


def test_pictures_of_every_kind(run, logits, pictures, tmp_path):
    """Colour, transparency, palettes, other sizes: each is fitted as the training images were."""
    rng = np.random.default_rng(1)
    colour = Image.fromarray(rng.integers(0, 256, (20, 12, 3), np.uint8))
    kinds = {
        'colour.png': colour,
        'large.jpg': colour.resize((300, 200)),
        'alpha.png': colour.convert('RGBA'),
        'palette.gif': colour.quantize(16),
        'two.bmp': colour.convert('1'),
    }
    (tmp_path / 'kinds').mkdir()
    for name, image in kinds.items():
        image.save(tmp_path / 'kinds' / name)
    rows, error = run(tmp_path / 'kinds')
    assert error == ''
    assert [os.path.basename(row['file']) for row in rows] == sorted(kinds)
    fitted = [
        decoding.read(row['file'], lambda picture: decoding.fit(picture, 8, 1)) for row in rows
    ]
    np.testing.assert_allclose(
        [float(row['score']) for row in rows], logit.msp(logits(fitted)), rtol=1e-4, atol=1e-6
    )


def test_files_that_cannot_be_read_have_a_row_that_says_so(run, pictures, tmp_path):
    paths, _ = pictures
    with open(paths[3], 'wb'):
        pass
    with open(paths[4], 'r+b') as f:
        f.truncate(50)
    rows, error = run(top(paths[0]))
    assert [row['file'] for row in rows] == paths
    assert [i for i, row in enumerate(rows) if row['decision'] == 'error'] == [3, 4]
    assert all(rows[3][k] == '' for k in COLUMNS if k not in ('file', 'decision'))
    assert error.count('cannot be read') == 2
    rows, error = run('--on_error=stop', top(paths[0]), code=2)
    assert error.startswith(f'jaxood: {paths[3]} cannot be read')
    assert error.count('\n') == 1


def test_a_batch_of_nothing_but_broken_files(run, tmp_path):
    for i in range(3):
        (tmp_path / f'{i}.png').write_bytes(b'no')
    rows, _ = run('--batch=2', tmp_path)
    assert [row['decision'] for row in rows] == ['error'] * 3


def test_other_files_are_passed_over_unless_named(run, pictures, tmp_path):
    paths, _ = pictures
    (tmp_path / 'photos' / 'notes.txt').write_text('hello')
    rows, _ = run(top(paths[0]))
    assert len(rows) == 12
    os.rename(paths[0], tmp_path / 'picture')  # no ending
    assert run(tmp_path / 'picture')[0][0]['decision'] in ('ID', 'OOD')


def test_names_of_any_bytes(run, pictures, tmp_path):
    odd = os.fsencode(tmp_path) + b'/\xff,"\n.png'
    os.rename(pictures[0][0], odd)
    assert run(f'--out={tmp_path}/rows.csv', os.fsdecode(odd))[0] == []
    with open(tmp_path / 'rows.csv', newline='', errors='surrogateescape') as f:
        (row,) = csv.DictReader(f)
    assert os.fsencode(row['file']) == odd


@pytest.mark.parametrize('batch', [1, 5, 8, 100])
def test_batches_change_nothing(run, pictures, batch):
    rows, _ = run(*pictures[0])
    again, _ = run(f'--batch={batch}', *pictures[0])
    for row, other in zip(rows, again, strict=True):
        assert float(row['score']) == pytest.approx(float(other['score']), rel=1e-4, abs=1e-6)
        assert {**row, 'score': ''} == {**other, 'score': ''}


def test_memory_does_not_grow_with_the_number_of_files(workdir, logits, pictures):
    """Of an endless list of files, no more than one batch has been opened when rows come out."""
    opened = []

    def endless():
        for i in itertools.count():
            opened.append(i)
            yield pictures[0][i % 12]

    options = dict(arm=None, seed=None, score=None, keep=0.95, on_error='stop', batch=8)
    rows = deployed.Detector(workdir, **options).rows(endless())
    for n in range(40):
        next(rows)
        assert len(opened) == 8 * (n // 8 + 1)


def test_images_that_are_not_square(tmp_path, capsys):
    lay_out(tmp_path, shape=(6, 8, 1))
    Image.new('RGB', (8, 6)).save(tmp_path / 'a.png')
    Image.new('RGB', (8, 8)).save(tmp_path / 'b.png')
    assert predict.main(['predict', f'--workdir={tmp_path}', str(tmp_path)]) == 0
    captured = capsys.readouterr()
    decisions = [row['decision'] for row in csv.DictReader(io.StringIO(captured.out))]
    assert decisions[0] in ('ID', 'OOD')
    assert decisions[1:] == ['error']
    assert 'b.png is 8 x 8 pixels; this run takes 8 x 6 alone' in captured.err


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['nowhere'], 'nowhere: there is no such file or folder'),
        ([], 'give a run and what to score'),
        (['--keep=1', '.'], '--keep=1.0 must lie between 0 and 1'),
        (['--keep=0', '.'], '--keep=0.0 must lie between 0 and 1'),
        (['--keep=most', '.'], '--keep'),
        (['--batch=0', '.'], '--batch=0 must be at least 1'),
        (['--format=xml', '.'], '--format'),
        (['--scor=msp', '.'], "--scor is not known. Did you mean 'score'"),
        (['--arm=man', 'PICTURE'], "arm 'man' is not known. Did you mean 'main'"),
        (['--seed=1', 'PICTURE'], "seed '1' is not known"),
        (['--seed=3', 'PICTURE'], 'run main/3 has no finished train_detector'),
        (['--score=mps', 'PICTURE'], "--score 'mps' is not known. Did you mean 'msp'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run, pictures, argv, message):
    argv = [pictures[0][0] if a == 'PICTURE' else a for a in argv]
    rows, error = run(*argv, code=2)
    assert rows == []
    assert error.startswith('jaxood: ')
    assert error.count('\n') == 1
    assert message in error


def test_a_folder_without_images(run, tmp_path):
    (tmp_path / 'notes.txt').write_text('hello')
    _, error = run(tmp_path, code=2)
    assert f'{tmp_path}: no images there. Known endings: .png' in error


def test_no_row_is_written_before_all_places_are_known(run, pictures):
    rows, error = run(pictures[0][0], 'nowhere', code=2)
    assert rows == []
    assert 'nowhere: there is no such' in error


def test_what_is_no_workdir(pictures, tmp_path, capsys):
    def error():
        assert predict.main(['predict', f'--workdir={tmp_path}/run', pictures[0][0]]) == 2
        return capsys.readouterr().err

    assert 'run has no config.json: it is not the workdir of a run' in error()
    (tmp_path / 'run').mkdir()
    lay_out(tmp_path / 'run')
    (tmp_path / 'run' / 'format.json').write_text('{"format": 0}')
    assert 'was written in workdir format 0' in error()
