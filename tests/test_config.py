"""What a config means: entries and their keywords, arms, fingerprints, and what it may not hold."""

from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import pytest
import tiny
from ml_collections import config_dict

from jaxood import artefacts, experiment
from jaxood import config as configs
from jaxood.errors import ConfigError, UserError


def ddim(now, draw, *, eta: float = 0.0, levels: Sequence[int] = (1, 2), clip: float | None = None):
    return eta


def folder(*, path: str, flat: bool = False, anything: Any = None):
    return path


TABLE = {'ddim': (ddim, 'more'), 'folder': folder}


def pick(**section):
    return configs.pick(TABLE, section, 'config.sampler', given=('now', 'draw'))


# ---- sections ---------------------------------------------------------------------------------


def test_a_section_is_a_name_and_keywords():
    entry, keywords = pick(name='ddim', eta=1, levels=[3, 4], clip=None)
    assert entry == (ddim, 'more')
    assert keywords == {'eta': 1, 'levels': (3, 4)}  # None: not set


def test_the_stages_own_keys_are_not_the_entrys():
    assert pick(name='ddim', steps=5, guidance=2.0)[1] == {}  # of config.sampler
    with pytest.raises(ConfigError, match=r'config\.other\.steps'):
        configs.pick(TABLE, {'name': 'ddim', 'steps': 5}, 'config.other', given=('now', 'draw'))
    like = dict(like='sampler', given=('now', 'draw'))
    assert configs.pick(TABLE, {'name': 'ddim', 'steps': 5}, 'config.other', **like)[1] == {}


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        (dict(), r'config\.sampler\.name is not set. Known: ddim, folder'),
        (dict(name=None), r'config\.sampler\.name is not set'),
        (dict(name='dim'), r"config\.sampler\.name='dim' is not known. Did you mean 'ddim'"),
        (dict(name='ddim', etta=1.0), r"config\.sampler\.etta \(of 'ddim'\).*Did you mean 'eta'"),
        (dict(name='ddim', now=1.0), r'config\.sampler\.now .*Known: eta, levels, clip\.'),
        (dict(name='folder'), r"config\.sampler\.path is not set, and 'folder' needs it"),
        (dict(name='ddim', eta='1'), r"config\.sampler\.eta='1' must be float"),
        (dict(name='ddim', eta=True), r'config\.sampler\.eta=True must be float'),
        (dict(name='ddim', clip='no'), r"config\.sampler\.clip='no' must be float \| None"),
        (dict(name='ddim', levels=3), r'config\.sampler\.levels=3 must be Sequence\[int\]'),
        (dict(name='ddim', levels=(1.5,)), r'config\.sampler\.levels=\(1\.5,\) must be Sequence'),
        (dict(name='folder', path=3), r'config\.sampler\.path=3 must be str'),
        (dict(name='folder', path='x', flat=1), r'config\.sampler\.flat=1 must be bool'),
    ],
)
def test_what_a_section_may_not_say(section, message):
    with pytest.raises(ConfigError, match=message):
        pick(**section)


def test_a_section_must_be_one():
    with pytest.raises(ConfigError, match=r"config\.sampler='ddim' must be a section"):
        configs.pick(TABLE, 'ddim', 'config.sampler')


def test_annotations_that_say_little_accept_all():
    assert pick(name='folder', path='x', anything=dict(a=1))[1]['anything'] == {'a': 1}


def test_build_calls_the_entry():
    assert configs.build(TABLE, dict(name='folder', path='here'), 'config.x') == 'here'


# ---- fingerprints -----------------------------------------------------------------------------


def test_fingerprints_follow_content_alone():
    a = configs.fingerprint({'a': 1, 'b': (1, 2)}, 'x')
    assert a == configs.fingerprint({'b': [1, 2], 'a': 1}, 'x')
    assert a == configs.fingerprint(ml_collections.ConfigDict({'b': (1, 2), 'a': 1}), 'x')
    others = [({'a': 1, 'b': (2, 1)}, 'x'), ({'a': 1, 'b': (1, 2)}, 'y'), ({'a': 1}, 'x'), ('x',)]
    assert a not in {configs.fingerprint(*parts) for parts in others}


def test_fingerprints_do_not_depend_on_the_process():
    """SHA-256 of the canonical JSON '[{"a": 1}]': artefacts are found again by another process."""
    assert configs.fingerprint({'a': 1}) == '2696610e78752a9e'


def fingerprints(**changes):
    """stage -> the fingerprint that the tiny chain's main arm has for it."""
    runs = [run for run in experiment.check(tiny.config(**changes)) if run.arm == 'diffusion']
    tasks = experiment.plan(runs, artefacts.Store('/nonexistent'))
    return {task.stage: task.artefact.fingerprint for task in tasks}


def test_layout_and_logging_change_no_fingerprint():
    other = dict(
        parallel__mode='pmap',
        parallel__num_devices=2,
        parallel__inference_batch=32,
        parallel__shard_state=True,
        generator__remat=True,
        diffusion__log_every=3,
        detector__checkpoint_every=7,
        filter__training__log_every=5,
        outliers__shard_size=100,
        artefacts_dir='/elsewhere',
    )
    assert fingerprints(**other) == fingerprints()


TRAINED = tiny.config().stages


@pytest.mark.parametrize(
    ('change', 'kept'),
    [
        (dict(diffusion__steps=13), {'train_judges'}),
        (dict(filter__quantile=0.5), {'train_diffusion', 'train_judges'}),
        (dict(detector__weight=1.0), {'train_diffusion', 'train_judges', 'synthesise'}),
        (dict(seeds=(1,)), {'train_diffusion', 'train_judges', 'synthesise'}),
        (
            dict(scores__knn__k=3),
            {'train_diffusion', 'train_judges', 'synthesise', 'train_detector'},
        ),
        (dict(data__ood__photos__count=50), {*TRAINED} - {'score', 'report'}),
        (dict(report__title='Other'), {*TRAINED} - {'report'}),
        (dict(seed=1), set()),
        (dict(data__validation=0.2), set()),
    ],
)
def test_a_setting_changes_what_builds_on_it(change, kept):
    before, after = fingerprints(), fingerprints(**change)
    assert {stage for stage in before if before[stage] == after[stage]} == kept


# ---- arms and seeds ---------------------------------------------------------------------------


def small(**arms):
    c = ml_collections.ConfigDict()
    c.seeds = (0, 7)
    count = config_dict.FieldReference(10)
    c.outliers = dict(name='label_mixup', mix='label', count=count, shard_size=5)
    c.detector = dict(name='oe', weight=0.5, steps=3, optimizer=dict(name='sgd', momentum=0.9))
    c.data = dict(count=count)
    c.arms = arms
    return c


def test_an_experiment_is_arms_times_seeds():
    runs = list(configs.runs(small(a={}, b=dict(detector=dict(weight=1.0)))))
    assert [run.name for run in runs] == ['a/0', 'a/7', 'b/0', 'b/7']
    assert [run.config.seeds for run in runs] == [(0,), (7,), (0,), (7,)]
    assert [run.config.detector.weight for run in runs] == [0.5, 0.5, 1.0, 1.0]


def test_without_arms_there_is_one():
    config = small()
    assert [run.name for run in configs.runs(config)] == ['main/0', 'main/7']


def test_an_arm_merges_key_by_key():
    (run, _) = configs.runs(small(a=dict(detector=dict(optimizer=dict(momentum=0.5)))))
    assert run.config.detector.optimizer.to_dict() == {'name': 'sgd', 'momentum': 0.5}
    assert run.config.detector.weight == 0.5


def test_another_name_drops_the_old_entrys_keywords():
    """The stage's own keys stay: count and shard_size, not mix."""
    (run, _) = configs.runs(small(a=dict(outliers=dict(name='uniform_noise', count=4))))
    assert run.config.outliers.to_dict() == {'name': 'uniform_noise', 'count': 4, 'shard_size': 5}
    optimizer = dict(optimizer=dict(name='adam', clip=1.0))
    (run, _) = configs.runs(small(a=dict(detector=optimizer)))
    assert run.config.detector.optimizer.to_dict() == {'name': 'adam', 'clip': 1.0}


def test_arms_leave_each_other_and_the_config_alone():
    config = small(a=dict(outliers=dict(count=3)), b={})
    a, _, b, _ = configs.runs(config)
    assert (a.config.outliers.count, b.config.outliers.count, config.outliers.count) == (3, 10, 10)
    with pytest.raises((AttributeError, TypeError)):
        a.config.outliers.count = 5  # resolved and frozen


@pytest.mark.parametrize(
    ('arm', 'message'),
    [
        (dict(outlier=dict(count=3)), r"config\.arms\.a\.outlier .*Did you mean 'outliers'"),
        (dict(seeds=(1,)), r'config\.arms\.a\.seeds: all arms share config\.seeds'),
        (dict(data=dict(count=2)), r'config\.arms\.a\.data: all arms share'),
        (dict(detector=dict(steps='many')), r"config\.arms\.a\.detector\.steps='many'"),
    ],
)
def test_what_an_arm_may_not_say(arm, message):
    with pytest.raises(ConfigError, match=message):
        list(configs.runs(small(a=arm)))


# ---- whole configs ----------------------------------------------------------------------------


def broken(path, value):
    """The tiny config with one value put in, whatever its type was; DELETE takes it out."""
    config = tiny.config()
    *sections, key = path.split('.')
    place = config
    for section in sections:
        place = place[section]
    with place.unlocked(), place.ignore_type():
        if value is DELETE:
            del place[key]
        else:
            place[key] = value
    return config


DELETE = object()


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('sampling', {}, r"config\.sampling is not known\. Did you mean 'sampler'"),
        ('detector', DELETE, r'config\.detector is missing'),
        ('sampler', DELETE, r'config\.sampler is missing'),
        ('detector', 'oe', r"config\.detector='oe' must be a section"),
        ('detector.name', DELETE, r'config\.detector\.name=None must name'),
        ('detector.optimizer', DELETE, r'config\.detector\.optimizer is missing'),
        ('detector.wait', 1.0, r"config\.detector\.wait \(of 'oe'\) .* Did you mean 'weight'"),
        ('detector.optimizer.lr', 1.0, r"config\.detector\.optimizer\.lr \(of 'sgd'\)"),
        ('detector.optimizer.learning_rate', 0.0, r'config\.detector\.optimizer: learning_rate=0'),
        ('detector.optimizer.learning_rate', '1', r"learning_rate='1' must be float"),
        ('detector.steps', 0, r'config\.detector\.steps=0 must be a whole number of at least 1'),
        ('detector.steps', 10.0, r'config\.detector\.steps=10\.0 must be a whole number'),
        ('detector.steps', True, r'config\.detector\.steps=True must be a whole number'),
        ('detector.crop', -1, r'config\.detector\.crop=-1 must be a whole number of at least 0'),
        ('detector.flip', 'yes', r"config\.detector\.flip='yes' must be True or False"),
        ('detector.outlier_ratio', 0.0, r'config\.detector\.outlier_ratio=0\.0 must be a number'),
        ('detector.outlier_ratio', 9.0, r'a batch takes 144 outliers, but config\.outliers\.count'),
        ('outliers.count', 0, r'config\.outliers\.count=0 must be a whole number of at least 1'),
        ('outliers.max_candidates', 39, r'max_candidates=39 must be a whole number of at least 40'),
        ('outliers.name', 'labelmixup', r"Did you mean 'label_mixup'"),
        ('filter.quantil', 0.1, r"config\.filter\.quantil is not known\. Did you mean 'quantile'"),
        (
            'filter.quantile',
            2,
            r'config\.filter\.quantile=2\.0 must be a number, between 0\.0 and 1',
        ),
        ('filter.training.crop', DELETE, r'config\.filter\.training\.crop is missing'),
        ('filter.training.name', 'oe', r'judges see ID images alone'),
        ('backbone.depth', 11, r'config\.backbone: depth=11 is no Wide ResNet'),
        ('backbone.depth', '10', r"config\.backbone\.depth='10' must be int"),
        ('backbone.dtype', 'float16', r"config\.backbone\.dtype \(of 'wrn'\) is not known"),
        ('head.num_classes', 3, r"config\.head\.num_classes \(of 'linear'\) is not known"),
        ('generator.channel', 8, r"Did you mean 'channels'"),
        ('diffusion.step', 8, r"config\.diffusion\.step is not known\. Did you mean 'steps'"),
        ('diffusion.prediction', 'x0', r"Did you mean 'x_0'"),
        ('diffusion.label_dropout', 1.5, r'config\.diffusion\.label_dropout=1\.5 must be a number'),
        ('diffusion.schedule.num_steps', 0, r'config\.diffusion\.schedule\.num_steps=0 must be'),
        ('diffusion.schedule', dict(name='linear', num_steps=9, beta_end=2.0), r'signal must fall'),
        ('diffusion.optimizer.warmup', 12, r'config\.diffusion\.optimizer: warmup=12 must be less'),
        ('sampler.steps', 5000, r'config\.sampler: steps=5000 cannot be taken'),
        ('sampler.guidance', float('nan'), r'config\.sampler\.guidance=nan must be a finite'),
        ('sampler.eta', 1.0, r"config\.sampler\.eta \(of 'dpmpp_2m'\) is not known"),
        ('dtype', 'float64', r"config\.dtype='float64' is not known"),
        ('seeds', (), r'config\.seeds=\(\): give one or more different integers'),
        ('seeds', (1, 1), r'config\.seeds=\(1, 1\): give one or more different'),
        ('seeds', 3, r'config\.seeds=3: give one or more'),
        ('seeds', (0.5,), r'config\.seeds\[0\]=0\.5 must be a whole number'),
        ('seed', 2**32, r'config\.seed=4294967296 must be a whole number .* at most 4294967295'),
        ('stages', ('trian_judges',), r"'trian_judges' is not known\. Did you mean 'train_judges'"),
        ('parallel.inference_batch', 0, r'config\.parallel\.inference_batch=0 must be'),
        ('parallel.num_device', 1, r"Did you mean 'num_devices'"),
        ('data.validation', '0.1', r"config\.data\.validation='0\.1' must be a number"),
        ('data.on_eror', 'stop', r"config\.data\.on_eror is not known\. Did you mean 'on_error'"),
        ('data.ood.photos.group', 'middle', r"group='middle' is not known\. Known: near, far"),
        ('data.ood.test', dict(name='photos'), r'config\.data\.ood\.test: a set of the run has'),
        ('data.root', np.arange(3), r'config\.data\.root is a ndarray\. A config holds numbers'),
        ('preprocessing.std', 0.0, r'config\.preprocessing\.std\.0=0\.0 must be a number'),
        ('scores', {}, r'config\.scores is empty'),
        ('scores.enrgy', {}, r"config\.scores\.enrgy\.name='enrgy'.*Did you mean 'energy'"),
        ('scores.msp', 1, r'config\.scores\.msp=1 must be a section'),
        ('scores.knn.k', 2.5, r'config\.scores\.knn\.k=2\.5 must be int'),
        ('report.score', 'knn5', r"config\.report\.score='knn5' is not known\. Did you mean 'knn'"),
        ('report.arm', 'difusion', r"Did you mean 'diffusion'"),
        ('report.title_', 'x', r"config\.report\.title_ is not known\. Did you mean 'title'"),
        ('arms.noise', 'x', r"config\.arms\.noise='x' must be a section"),
    ],
)
def test_what_a_config_may_not_say(path, value, message):
    with pytest.raises(UserError, match=message):
        experiment.check(broken(path, value))


@pytest.mark.parametrize(
    ('arm', 'message'),
    [
        (
            dict(detector=dict(name='plain')),
            r"name='label_mixup' makes outliers that .*'plain' doe",
        ),
        (dict(outliers=dict(name='none')), r"config\.detector\.name='oe' trains on outliers, but"),
    ],
)
def test_outliers_and_the_method_go_together(arm, message):
    with pytest.raises(ConfigError, match=message):
        experiment.check(tiny.config(arms=dict(main=arm), report__arm='main'))


def test_guidance_needs_an_unconditional_branch():
    config = tiny.config(sampler__guidance=1.0, diffusion__label_dropout=0.0)
    with pytest.raises(ConfigError, match=r'label_dropout=0\.0 trains none'):
        experiment.check(config)


def test_the_tiny_config_is_sound():
    assert [run.name for run in experiment.check(tiny.config())] == [
        *('diffusion/0', 'noise/0', 'none/0')
    ]
