"""Scores at work: which a config asks for, what they are fitted on, what they say of a set.

What a method says of a set is computed once for the same weights, bank, images and settings, and
kept beside the features.
"""

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxood import artefacts, metrics
from jaxood import config as configs
from jaxood.artefacts import Store
from jaxood.data.examples import Examples
from jaxood.errors import ConfigError, UserError, blame
from jaxood.scores import SCORES, reconstruction
from jaxood.stages import common
from jaxood.stages.common import TRAIN, TUNING, VALIDATION
from jaxood.stages.parts import networks

VERSION = 1  # raised when a score says something else for the same settings
INSIDE = ('maps', 'network')  # `needs` of scores that look inside the network
RESTORED = 'restored'  # ... of scores of what a restorer makes of the tapped features
OUTLIERS = 'outliers'  # the bank's name for those that a detector was trained on
VALIDATED = '_validated'  # ends the label of a score whose settings were chosen on validation data


class Method(NamedTuple):
    """One row of the table.

    Attributes:
        label: `config.scores`' key, with `VALIDATED` behind it if its settings were chosen.
        section: the score's name and keywords, without the sweep.
        sweep: keyword -> values to choose from; empty to take the section as it is.
    """

    label: str
    section: dict[str, Any]
    sweep: dict[str, tuple]

    @property
    def where(self) -> str:
        return f'config.scores.{self.label.removesuffix(VALIDATED)}'

    def candidates(self) -> Iterator[dict[str, Any]]:
        """The section with each combination of the sweep's values."""
        found = [self.section]
        for key, values in self.sweep.items():
            found = [one | {key: value} for one in found for value in values]
        yield from found


def restored(section: Mapping, where: str) -> reconstruction.Restored | None:
    """What a score reads of restorations; None if it reads none. (Its fit looks at no bank.)"""
    entry, keywords = pick(section, where)
    return entry.fit({}, {}, **keywords) if entry.needs == RESTORED else None


def depth_of(section: Mapping, where: str) -> int | None:
    """From where features are restored for a score; None for scores that read no restoration."""
    found = restored(section, where)
    return None if found is None else found.depth


def depths(config) -> list[int]:
    """Every depth that some score of a config asks for."""
    found = {depth_of(s, m.where) for m in methods(config) for s in m.candidates()}
    return sorted(found - {None})


def methods(config) -> list[Method]:
    """What is scored: every section as it stands, and again, chosen, if it has a sweep."""
    found = []
    for label, section in config.scores.items():
        section = {'name': label} | configs.plain(section)
        sweep = section.pop('sweep', None) or {}
        found.append(Method(label, section, {}))
        if sweep:
            found.append(Method(label + VALIDATED, section, sweep))
    return found


def banked(data: common.Data, synthesised: artefacts.Artefact | None = None) -> dict[str, Examples]:
    """The sets that scores are fitted on; most on the first alone.

    Args:
        synthesised: the outliers that the detector was trained on, if it was.
    """
    images = {TRAIN: data.id.train, VALIDATION: data.id.validation}
    if synthesised is not None:
        images[OUTLIERS] = Examples(artefacts.load_table(synthesised / 'outliers')['images'])
    return images if data.validation_ood is None else images | {TUNING: data.validation_ood}


class Bank:
    """A network's outputs on the sets that scores are fitted on.

    Args:
        images: 'train', 'validation', perhaps 'outliers' and 'validation_ood' -> `Examples`; or
            their digests, to find what was computed before.
        read: digests alone -> the `Examples`, for the scores that need the images themselves.
    """

    def __init__(self, store: Store, network: networks.Network, images: Mapping, read=None):
        self.store, self.network, self.read = store, network, read
        self.images = images if read is None else None
        self.digests = {k: v if read else v.digest for k, v in images.items()}

    def examples(self, name: str) -> Examples:
        if self.images is None:
            self.images = self.read()
        return self.images[name]

    def outputs(self, name: str) -> dict[str, Any]:
        """Logits, features and labels of one set."""
        artefact = networks.find_features(self.store, self.network.key, self.digests[name])
        if artefact.done is None:
            self.network.features(self.store, self.examples(name), f'features of {name}')
        found = networks.load_features(artefact)
        return found | {'index': np.arange(len(found['logits']))}

    def map(self, name: str, f, rows=None) -> Iterator[Any]:
        """`f(outputs, head)` over the images of one set, or some rows of it."""
        examples = self.examples(name)
        examples = examples if rows is None else examples.subset(rows)
        return self.network.inside(_of_nothing(f), {}, self.network.chunks(examples))

    def whole(self, on: str | None = None) -> Mapping[str, Any]:
        """The training set as a fit gets it, with the validation sets inside. `on`: see `seen`."""
        others = {name: _OnDemand(self, name, on) for name in self.digests if name != TRAIN}
        return _OnDemand(self, TRAIN, on, others)


def seen(outputs: Mapping[str, Any], on: str | None) -> Mapping[str, Any]:
    """Outputs as a score reads them: on 'taps', tapped features in place of penultimate ones, and
    one class for all, so that KNN and Mahalanobis know no more than a restorer does."""
    if on is None:
        return outputs
    count = len(outputs['taps'])
    one = {'labels': np.zeros(count, np.int32), 'logits': np.zeros((count, 1), np.float32)}
    return {**outputs, **one, 'features': outputs['taps']}


@functools.lru_cache(maxsize=16)
def _of_nothing(f):
    """f as a score without parameters; the same object for the same f, so that it compiles once."""
    return lambda params, outputs, head: f(outputs, head)


class _OnDemand(Mapping):
    """One set of a bank. What no score reads is not computed: many are fitted on nothing."""

    def __init__(self, bank, name, on, others=None):
        self.known = {'map': functools.partial(bank.map, name), **(others or {})}
        self.outputs = lambda: seen(bank.outputs(name), on)

    def __getitem__(self, key):
        if key not in self.known and key in (*networks.OUTPUTS, 'labels', 'index'):
            self.known |= self.outputs()
        return self.known[key]

    def __iter__(self):
        return iter(self.known | self.outputs())

    def __len__(self):
        return len(list(iter(self)))


class Scorer:
    """One method on one network: fitted when it is first needed, each set scored once for all.

    Args:
        tuning: the OOD images to choose settings against, for a method with a sweep.

    Attributes:
        facts: what the side-car tells of it: settings, how they were chosen, what it costs.
    """

    def __init__(self, bank: Bank, method: Method, tuning: Examples | None = None):
        self.bank, self.method, self.fitted = bank, method, None
        section, aurocs = method.section, []
        if method.sweep:
            candidates = list(method.candidates())
            aurocs = [self._validate(one, tuning) for one in candidates]
            section = candidates[int(np.argmax(aurocs))]
            aurocs = [{'settings': one, 'auroc': a} for one, a in zip(candidates, aurocs)]
        self.section, self.reads = section, restored(section, method.where)
        made = bank.network.key if self.reads is None else bank.network.restorer.key
        key = configs.fingerprint(VERSION, made, bank.digests, section)
        self.folder = bank.store.find('scores', key)
        chosen = 'validated' if method.sweep else 'default'
        self.facts = {'settings': section, 'chosen': chosen, 'validation': aurocs}

    def __call__(self, examples: Examples) -> np.ndarray:
        """float32[N]"""
        path = self.folder / f'{examples.digest[:16]}.npz'
        if not artefacts.exists(path):
            self._compute(examples, path)
        found = artefacts.load(path)
        self.facts |= {k: float(found[k]) for k in ('fit_s', 'score_ms_per_image')}
        return found['score']

    def _compute(self, examples, path):
        network, store = self.bank.network, self.bank.store
        what, before = f'features for {self.method.label}', 0.0
        outputs = network.features(store, examples, what)
        if self.reads is not None:
            depth, snapshots = self.reads.depth, 2 if self.reads.snapshot is None else 1
            outputs |= network.restorer.outputs(store, network, examples, [depth], what)
            cost = network.restorer.find(store, examples.digest, depth).done['ms_per_image']
            before = cost * snapshots
        if self.fitted is None:
            started = time.monotonic()
            score = fit(self.bank, self.section, self.method.where)
            self.fitted = score, time.monotonic() - started
            first = jax.tree.map(lambda v: v[:1], outputs)
            score(first, network.chunks(examples.subset([0])))  # compiles
        score, fit_s = self.fitted
        started = time.monotonic()
        values = score(outputs, network.chunks(examples))
        each = before + 1e3 * (time.monotonic() - started) / len(values)
        artefacts.save(path, score=values, fit_s=round(fit_s, 4), score_ms_per_image=round(each, 5))

    def _validate(self, section, tuning):
        """AUROC of ID validation images against the validation outliers."""
        one = Scorer(self.bank, Method(self.method.label, section, {}))
        return round(metrics.auroc(one(self.bank.examples(VALIDATION)), one(tuning)), 6)


def fit(bank: Bank, section: Mapping, where: str):
    """Fits one score -> `score(outputs, chunks) -> float32[N]` of any number of images.

    `outputs` are the network's, for scores that read those; `chunks` of uint8 images, as
    `Network.stream` takes them, for scores that look inside the network.

    Raises:
        UserError: settings that the bank does not allow, or a score that is not finite.
    """
    network, on = bank.network, section.get('on')
    entry, keywords = pick(section, where)
    head = network.head
    if on is not None:
        width = bank.outputs(TRAIN)['taps'].shape[1]
        head = {'kernel': np.zeros((width, 1), np.float32), 'bias': np.zeros(1, np.float32)}
    with blame(where):
        params = entry.fit(bank.whole(on), head, **keywords)

    def score(outputs, chunks):
        if entry.needs in INSIDE:
            parts = network.inside(entry.score, params, chunks)
        else:
            parts = network.outside(entry.score, params, seen(outputs, on), head)
        values = np.concatenate(list(parts))
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise UserError(
                f'{where}: the score of image {bad[0]} is {values[bad[0]]}, not a number '
                f'({bad.size} of {len(values)} are so). Leave the score out, or look at what it '
                'is fitted on.'
            )
        return values

    return score


def pick(section: Mapping, where: str):
    """The score that a section names, and its keywords."""
    found = configs.pick(SCORES, section, where, like='scores', given=('bank', 'head'))
    on = section.get('on')
    if on not in (None, 'taps') or (on and found[0].needs != 'features'):
        raise ConfigError(
            f"{where}.on={on!r}: leave it unset, or set 'taps' for a score that reads features "
            f'({", ".join(k for k, v in SCORES.items() if v.needs == "features")}).'
        )
    return found
