"""`configs/dog.py`, cut down: from words to a report, with a tiny pipeline that knows nothing."""

import collections
import json

import numpy as np
import pytest
import spoken
from etils import epath

from jaxood import artefacts, experiment, main
from jaxood import config as configs
from jaxood.errors import ConfigError, UserError
from jaxood.stages import STAGES, common, train_pipeline

CONFIG = 'configs/dog.py'
ARMS = ('none', 'latent_noise', 'dog')


def tiny(variant='digits', arms=ARMS, **changes):
    """Trainings of a few steps, few outliers, two steps of sampling; `changes` as a__b=value."""
    c = main.load_config(f'{CONFIG}:{variant}')
    small = {
        'seeds': (0,),
        'generator__path': str(spoken.pipeline()),
        'parallel__num_devices': 1,
        'parallel__inference_batch': 32,
        'tokens__steps': 2,
        'tokens__batch_size': 2,
        'words__k': 4,
        'words__keep': 1.0,
        'sampler__steps': 2,
        'outliers__per_class': 5,
        'backbone__base': 4,
        'report__draws': 20,
        'report__tsne': False,
    }
    for section in ('pretraining', 'detector'):
        small |= {f'{section}__steps': 6, f'{section}__batch_size': 16}
    small |= {'detector__warmup': 3}
    for path, value in (small | changes).items():
        *sections, key = path.split('__')
        place = c
        for section in sections:
            place = place[section]
        with place.unlocked():
            place[key] = value
    with c.unlocked():
        c.arms = {k: c.arms[k] for k in arms}
        c.arms.dog.filter = dict(name='clip', margin=-2.0)  # it looks at each, and lets all pass
    return c


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dog')
    main.execute(tiny(), str(folder))
    return folder


def made(folder, stage, arm='dog'):
    return folder / json.loads((folder / 'runs.json').read_text())[arm]['0'][stage]


def index(folder, arm='dog'):
    lines = (made(folder, 'synthesise', arm) / 'index.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_each_class_gets_its_images_and_its_words_take_turns(finished):
    lines = index(finished)
    names = ('zero', 'one', 'two', 'three', 'four', 'five')
    assert collections.Counter(line['class_name'] for line in lines) == dict.fromkeys(names, 5)
    anchors = json.loads((made(finished, 'words') / 'anchors.json').read_text())['anchors']
    for y, name in enumerate(names):
        mine = [line for line in lines if line['class_name'] == name]
        turns = [anchors[y][slot % len(anchors[y])] for slot in range(5)]
        assert [line['word'] for line in mine] == [word for word, *_ in turns]
        np.testing.assert_allclose(
            [line['similarity'] for line in mine], [s for _, s, _ in turns], atol=1e-5
        )
    assert [line['seed'] for line in lines] == list(range(30))
    outliers = artefacts.load_table(epath.Path(made(finished, 'synthesise')) / 'outliers')
    assert outliers['images'].shape == (30, 8, 8, 3)


@pytest.mark.slow
def test_clip_has_looked_at_each(finished):
    lines = index(finished)
    assert all(line['kept'] and abs(line['margin']) <= 2.0 for line in lines)
    assert len({line['margin'] for line in lines}) > 10
    assert json.loads((made(finished, 'synthesise') / 'done.json').read_text())['acceptance'] == 1.0


@pytest.mark.slow
def test_the_report_tells_of_words_images_and_ways(finished):
    found = json.loads((finished / 'results.json').read_text())['summary']['sections']
    ways = found['near_words']['strategies']
    assert set(ways) == {'energy'}  # on its own, where the report's score is that
    rows = {row['arm']: row for row in ways['energy']}
    assert set(rows) == set(ARMS)
    assert rows['dog']['published'] == [[2.57, 99.36], [22.87, 95.41]]
    assert rows['latent_noise']['paper'].startswith('(a)')
    assert rows['latent_noise']['published'] == []  # CLIP looks at the chief arm's alone
    assert rows['none']['published'] == [[32.98, 91.85], [59.31, 84.46]]
    assert 0.0 <= rows['dog']['cells']['held_out']['auroc']['mean'] <= 1.0
    (kind,) = found['near_words']['words']
    assert kind['arms'] == ['dog']
    assert sum(len(words['kept']) for words in kind['classes'].values()) == 6 * 4
    page = (finished / 'report.html').read_text()
    assert 'Words near the classes' in page
    word = index(finished)[0]['word']
    assert f'<figcaption>zero: {word}</figcaption>' in page
    assert '25.27 / 92.76' not in page  # published, (a)


@pytest.mark.slow
def test_more_images_render_anew_and_look_nothing_up(finished):
    """Another M: tokens, words and the pretrained network stay; another λ: tokens do, too."""
    for changes, todo in (
        (dict(outliers__per_class=6), {'synthesise', 'train_detector', 'score', 'report'}),
        (dict(words__keep=0.9), {'words', 'synthesise', 'train_detector', 'score', 'report'}),
    ):
        config = tiny(arms=('none', 'dog'), **changes)
        store = artefacts.Store(artefacts.place(finished / 'artefacts'))
        tasks = experiment.plan(experiment.check(config), store)
        assert {task.stage for task in tasks if task.artefact.done is None} == todo


def test_without_a_folder_the_small_pipeline_is_trained_first_on_its_own_images(tmp_path):
    config = tiny(generator__path=None)
    store = artefacts.Store(artefacts.place(tmp_path))
    tasks = experiment.plan(experiment.check(config), store)
    (task,) = [task for task in tasks if task.stage == 'train_pipeline']
    own = train_pipeline.own_data(config)
    assert own.class_names == tuple('01234567')
    assert common.load_data(config).class_names == tuple('012345')
    tested = common.load_data(config).id.test.images
    seen = {image.tobytes() for image in own.id.train.images}
    same = [image for image in tested if image.tobytes() in seen]
    assert not same
    makers = {t.stage for t in tasks if task.artefact in t.inputs.values()}
    assert {'learn_tokens', 'words', 'synthesise'} <= makers
    small = main.load_config('configs/small_sd.py:digits')
    (alike,) = experiment.plan(experiment.check(small), store)
    assert alike.artefact.fingerprint == task.artefact.fingerprint  # what that command made serves


@pytest.mark.parametrize('variant', ['cifar10', 'cifar100', 'imagenet', 'digits,ablation'])
def test_every_variant_asks_for_what_only_the_user_has(variant):
    """With a pipeline and words at hand nothing else is wrong with it."""
    if variant == 'digits,ablation':
        runs = experiment.check(main.load_config(f'{CONFIG}:{variant}'))
        counts = {run.arm: run.config.outliers.get('per_class') for run in runs}
        assert counts['M72'] == 72
        return
    config = main.load_config(f'{CONFIG}:{variant}')
    with pytest.raises(UserError, match=r'config\.generator\.path names no pipeline folder'):
        experiment.check(config)
    config.generator.path = 'pipeline'
    for run in configs.runs(config):
        for stage in (STAGES[name] for name in run.config.stages):
            if stage.applies(run.config):
                assert {*stage.inputs(run.config)} <= {*run.config.stages}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(outliers__count=3), r'count=3, per_image=None, per_class=5\. Set one of them'),
        (dict(generator__path='/nowhere'), r'config\.generator\.path: /nowhere: there is no such'),
        (dict(generator__name='unet'), "generator.name='unet' reads no prompts"),
        (dict(sampler__name='ddpm'), "the sampler of Stable Diffusion 'ddpm' is not known"),
        (dict(filter__name='clips'), "filter.name='clips' is not known. Did you mean 'clip'"),
        (dict(filter__name='clip'), "an ID class, and .*'latent_noise' paints"),
        (dict(generator__paths='x'), r"config\.generator\.paths: 'stable_diffusion' takes a path"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(UserError, match=message):
        experiment.check(tiny(**changes))


def test_grey_images_are_not_the_pipelines(tmp_path):
    with pytest.raises(ConfigError, match=r'config\.data\.channels=3'):
        main.execute(tiny(data__channels=1), str(tmp_path))
