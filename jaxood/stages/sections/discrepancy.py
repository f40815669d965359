"""What semantic-discrepant outliers are, and what detectors that were trained on them have learnt.

SD-outliers are made of the ID *test* images too, by the generator of the report's own arm, and
every detector is asked about them: the poster's last table. Led to their own class instead, the
same images must still pass for ID: a detector that flags them sees the denoiser, not the class.
"""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
from markupsafe import Markup

from jaxood import artefacts, console, detectors, metrics
from jaxood import config as configs
from jaxood.data.examples import Examples
from jaxood.models import heads
from jaxood.report import figures, page, published, tables
from jaxood.stages import score, synthesise
from jaxood.stages.common import TEST, Context
from jaxood.stages.parts import candidates, networks, scorers

VERSION = 1  # of the images made of the test set
NAME = 'sd_outliers'  # of that set, where resampling asks for a name
MAPPED = 300  # images of each kind in the maps
TRIPLETS = 24


def applies(config) -> bool:
    return 'synthesise' in config.stages and config.outliers.name == 'semantic_discrepant'


def check(config) -> None:
    pass


def fits(config, data) -> None:
    pass


def tell(context: Context) -> tuple[dict, page.Section]:
    chief = context.chief()
    asked = {run.name: Asked(context, run) for run in context.runs}
    sets = test_edits(context, chief, asked[chief.name])
    found = {
        'count': len(sets['discrepant']),
        'test': [row(context, arm, asked, sets) for arm in _arms(context)],
        'scores': differences(context, chief.arm),
    }
    parts = [
        'Each image below is a triplet: an ID training image, the outlier made of it, and an ID '
        'image of the class that was asked for.',
        triplets(context, chief),
        _about_test(found, chief),
        page.Table(*_test_table(found, context)),
    ]
    if any(one['binary'] for one in found['test']):
        parts += [
            'What the heads for “outlier or not” (g_bin) say of each kind, share they get right:',
            page.Table(*_binary_table(found)),
        ]
    parts += [
        f'Under {chief.arm}, what is left of the score if one of its terms is taken away:',
        page.Table(*_difference_table(found)),
    ]
    if context.config.report.tsne:
        parts += maps(context, chief, asked[chief.name])
    parts += [page.Table(*published.sd_outliers())]
    return found, page.Section('discrepancy', 'Semantic-discrepant outliers', parts, NOTE)


NOTE = (
    'Intervals: 95 % bootstrap over seeds and images; of shares, Wilson’s over images. '
    'Led to its own class: the same edit, c_r = ỹ, which shows an ID image after the denoiser and '
    'should pass for ID. The class ỹ of a test image is what the detector of the report’s own '
    'arm takes it for; that arm’s generator makes these sets for all arms.'
)


# ---- the images, and who is asked about them --------------------------------------------------


class Asked:
    """One run's detector, and its scores of images that no other stage has."""

    def __init__(self, context: Context, run):
        inputs, self.config = context.inputs, run.config
        self.context, self.data = context, context.seen_by(run)
        self.network = networks.load(
            *(inputs[f'{run.name}/{score.detector(run.config)}'], run.config),
            *(context.devices, context.num_rows()),
        )
        banked = scorers.banked(self.data, inputs.get(f'{run.name}/synthesise'))
        self.bank = scorers.Bank(context.store, self.network, banked)

    def features(self, examples: Examples, what: str) -> dict[str, np.ndarray]:
        return self.network.features(self.context.store, examples, f'features of {what}')

    def scores(self, label: str, examples: Examples) -> np.ndarray:
        method = next(m for m in scorers.methods(self.config) if m.label == label)
        tuning = self.data.tuning if method.sweep else None
        return scorers.Scorer(self.bank, method, tuning)(examples)

    def binary(self, examples: Examples, what: str) -> np.ndarray | None:
        """bool[N]: whether g_bin says outlier; None for a detector that has none or trains none."""
        trained = self.config.get('detector') and detectors.DETECTORS[self.config.detector.name]
        if not trained or trained.head != 'three':
            return None
        features = jnp.asarray(np.asarray(self.features(examples, what)['features']))
        logits = heads.branch(self.network.variables['params']['head'], 'bin', features)
        return np.asarray(logits[:, 1] > logits[:, 0])


def test_edits(context: Context, run, asked: Asked) -> dict[str, Examples]:
    """The ID test images, each led to another class (`discrepant`) and to its own (`same`).

    Kept in the store, as features are; made by the generator and settings of one run.
    """
    config, data = run.config, asked.data
    test = data.id.test
    predicted = asked.features(test, TEST)['logits'].argmax(-1).astype(np.int32)
    labelled = dataclasses.replace(test, labels=predicted, class_names=data.class_names)
    data = dataclasses.replace(data, id=dataclasses.replace(data.id, train=labelled))
    trained = context.inputs.get(f'{run.name}/train_diffusion')
    recipe = synthesise.settings(config)
    for key in ('count', 'per_image', 'same'):
        recipe['outliers'].pop(key, None)
    made = context.store.find(
        'test_edits', configs.fingerprint(VERSION, recipe, trained.fingerprint, labelled.digest)
    )
    if made.done is None:
        with artefacts.lock(made.folder):
            rows, shared = candidates.renderer(config, data, trained)
            rows = _apart_from_training(rows)
            numbers, size = np.arange(len(test), dtype=np.int32), context.num_rows()
            for name, share in (('discrepant', 0.0), ('same', 1.0)):
                placed = context.devices.replicate(shared | {'same': np.float32(share)})
                facts = candidates.rendered(context.devices, rows, placed, numbers, size=size)
                artefacts.save(made / f'{name}.npz', images=facts['image'])
            made.finish(rows=len(test))
    load = lambda name: Examples(artefacts.load(made / f'{name}.npz')['images'])
    return {name: load(name) for name in ('discrepant', 'same')}


@functools.lru_cache(maxsize=4)
def _apart_from_training(rows):
    """The same rows with noise of their own: candidate i of the training has (key, i) already."""
    return lambda shared, index: rows(shared, index + 2**24)


# ---- what they say ----------------------------------------------------------------------------


def row(context: Context, arm: str, asked: dict[str, Asked], sets: dict[str, Examples]) -> dict:
    """One arm's AUROC of ID test images against SD-outliers made of them, and what g_bin says."""
    runs = [asked[run.name] for run in context.runs if run.arm == arm]
    found = {'arm': arm, 'auroc': {}, 'binary': {}}
    for method in scorers.methods(runs[0].config):
        a = np.stack([one.scores(method.label, one.data.id.test) for one in runs])
        b = np.stack([one.scores(method.label, sets['discrepant']) for one in runs])
        found['auroc'][method.label] = _auroc(a, b, context.config.report.draws)
    for name, examples, outlying in (
        ('ID test images', None, False),
        ('led to their own class', sets['same'], False),
        ('led to another class', sets['discrepant'], True),
    ):
        said = [one.binary(examples or one.data.id.test, f'{name}, {arm}') for one in runs]
        if said[0] is not None:
            right = float(np.mean(np.stack(said) == outlying))
            low, high = metrics.proportion(round(right * len(said[0])), len(said[0]))
            found['binary'][name] = {'mean': right, 'low': low, 'high': high}
    return found


def differences(context: Context, arm: str) -> list[dict]:
    """Mean AUROC over the OOD sets of one arm under each score, and minus the report's own score;
    paired, for all see the same images and networks."""
    runs = [run for run in context.runs if run.arm == arm]
    labels = [method.label for method in scorers.methods(runs[0].config)]
    draws, means = {}, {}
    for label in labels:
        load = lambda name, label=label: np.stack(
            [
                artefacts.load(context.inputs[f'{run.name}/score'] / f'{label}/{name}.npz')['score']
                for run in runs
            ]
        )
        known = {name: load(name) for name in (TEST, *context.data.ood)}
        pairs = [(known[TEST], known[name], name) for name in context.data.ood]
        means[label] = np.mean([[metrics.auroc(*ab) for ab in zip(a, b)] for a, b, _ in pairs])
        draws[label] = np.mean(
            [
                metrics.bootstrap(a, b, draws=context.config.report.draws, ood_set=name)
                for a, b, name in pairs
            ],
            axis=0,
        )
    own = context.config.report.score
    found = []
    for label in labels:
        low, high = metrics.interval(draws[own] - draws[label])
        gain = {'mean': float(means[own] - means[label]), 'low': low, 'high': high}
        found.append({'score': label, 'auroc': float(means[label]), 'gain': gain})
    return found


def _auroc(a, b, draws) -> dict:
    """Mean over seeds, float[S, n] against float[S, m], with interval."""
    low, high = metrics.interval(metrics.bootstrap(a, b, draws=draws, ood_set=NAME))
    mean = np.mean([metrics.auroc(*pair) for pair in zip(a, b)])
    return {'mean': float(mean), 'low': low, 'high': high}


# ---- pictures ---------------------------------------------------------------------------------


def triplets(context: Context, run) -> Markup:
    """Source, outlier, and an ID image of the class asked for, side by side."""
    folder, data = context.inputs[f'{run.name}/synthesise'], context.seen_by(run)
    train = data.id.train
    index = [json.loads(line) for line in (folder / 'index.jsonl').read_text().splitlines()]
    kept = [line for line in index if line['kept']][:TRIPLETS]
    outliers = artefacts.load_table(folder / 'outliers')['images']
    pictures, captions = [], []
    for i, line in enumerate(kept):
        example = np.flatnonzero(train.labels == line['first'])[i % 7 :][:1]
        rows = np.concatenate([[line['source']], example]).astype(int)
        source, *others = train.take(rows)
        pictures.append(_beside([source, outliers[line['outlier']], *others]))
        captions.append(f'{data.class_names[line["label"]]} → {data.class_names[line["first"]]}')
    return figures.gallery(pictures, captions=captions)


def _beside(images):
    """One picture of several, a white column between them."""
    gap = np.full((images[0].shape[0], 1, images[0].shape[2]), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)


def maps(context: Context, run, asked: Asked) -> list:
    """t-SNE of early and of late features of ID images and outliers, coloured by the label of the
    image that they are made of: the poster's figure 3."""
    folder, train = context.inputs[f'{run.name}/synthesise'], asked.data.id.train
    outliers = artefacts.load_table(folder / 'outliers')
    rows = np.linspace(0, len(train) - 1, min(MAPPED, len(train))).astype(int)
    sets = {
        '': (train.subset(rows), train.labels[rows]),
        ', outliers': (Examples(outliers['images'][:MAPPED]), outliers['label'][:MAPPED]),
    }
    found = []
    for name, about in (
        ('early', 'Early features (mean over space of the first stage)'),
        ('late', 'Late features (what the heads read)'),
    ):
        groups = {}
        for kind, (examples, labels) in sets.items():
            network = asked.network
            parts = network.inside(LAYERS[name], {}, network.chunks(examples))
            h = np.concatenate(list(parts))
            for k, of_class in enumerate(asked.data.class_names):
                if kind == '' or k < 3:
                    groups[f'{of_class}{kind}'] = h[labels == k]
        groups = {k: v for k, v in groups.items() if len(v) > 1}
        found += [
            f'{about} of {run.name}, coloured by the label of the image; of outliers, of the image '
            'that they were made of (three labels are shown).',
            figures.tsne_figure(figures.tsne(groups)),
        ]
    return found


def _early(params, outputs, head):
    return jnp.mean(outputs['maps'][0].astype(jnp.float32), axis=(1, 2))


def _late(params, outputs, head):
    return outputs['features'].astype(jnp.float32)


LAYERS = {'early': _early, 'late': _late}


# ---- tables -----------------------------------------------------------------------------------


def _about_test(found, chief) -> str:
    return (
        f'SD-outliers as a test set: the {found["count"]:,} ID test images against the outliers '
        f'made of them by the generator of {chief.arm}, one each. AUROC, percent:'
    )


def _test_table(found, context):
    labels = list(found['test'][0]['auroc'])
    rows = [
        (one['arm'], *(tables.with_interval(one['auroc'][label]) for label in labels))
        for one in found['test']
    ]
    return ('arm', *labels), rows, ''


def _binary_table(found):
    rows = [one for one in found['test'] if one['binary']]
    names = list(rows[0]['binary'])
    lines = [(one['arm'], *(tables.with_interval(one['binary'][k]) for k in names)) for one in rows]
    return ('arm', *names), lines, ''


def _difference_table(found):
    sign = functools.partial(tables.percent, sign=True)
    rows = []
    for one in found['scores']:
        gain = one['gain']
        between = f'{sign(gain["low"])} to {sign(gain["high"])}'
        cell = (sign(gain['mean']), between) if gain['low'] != gain['high'] else '–'
        rows.append((one['score'], tables.percent(one['auroc']), cell))
    return ('score', 'mean AUROC, %', 'the report’s own score minus it, points'), rows, ''


def show(found: dict, config) -> None:
    """What each arm makes of SD-outliers of the test images, and what each term brings."""
    label = config.report.score
    for one in found['test']:
        a = one['auroc'][label]
        text = (
            f'SD-outliers made of ID test images, {one["arm"]}: AUROC {100 * a["mean"]:.2f} % '
            f'({100 * a["low"]:.2f} to {100 * a["high"]:.2f})'
        )
        if control := one['binary'].get('led to their own class'):
            text += f'; g_bin passes {100 * control["mean"]:.1f} % of those led to their own class'
        console.say(text)
    for one in found['scores']:
        if one['score'] != label:
            g = one['gain']
            console.say(
                f'{label} minus {one["score"]}: {100 * g["mean"]:+.2f} points of mean AUROC '
                f'({100 * g["low"]:+.2f} to {100 * g["high"]:+.2f})'
            )


def _arms(context: Context) -> list[str]:
    return list(dict.fromkeys(run.arm for run in context.runs))
