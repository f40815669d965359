"""Which labels the images were given, and how they agree with those that people wrote."""

import numpy as np

from jaxood import artefacts, console
from jaxood import config as configs
from jaxood.report import page, tables
from jaxood.stages.common import PSEUDO, Context

SHOWN = 20  # classes of a table that is shown whole


def applies(config) -> bool:
    return PSEUDO in config.stages


def check(config) -> None:
    pass


def fits(config, data) -> None:
    pass


def tell(context: Context) -> tuple[list[dict], page.Section]:
    found = [describe(folder, arms) for folder, arms in context.sharing(PSEUDO)]
    tables_ = [page.Table(*_sizes(one)) for one in found]
    names = context.data.class_names
    for one in found:
        if 'confusion' in one and len(names) <= SHOWN:
            tables_.append(page.Table(*_confusion(one, names)))
    how = configs.plain(context.config.pseudo_label)
    text = (
        f'The stages after this one learn from labels that {how["name"]} gave the training images. '
        'Labels that people wrote, where there are any, are compared with here and teach nothing; '
        'but they say which classes are held out.'
    )
    note = (
        'Accuracy: under the one-to-one matching of clusters with classes that is best on the '
        'training images (Hungarian method). NMI: normalised mutual information; ARI: adjusted '
        'Rand index, 0 by chance. Validation images were seen by no training.'
    )
    return found, page.Section('pseudo', 'Labels from the images alone', [text, *tables_], note)


def describe(folder, arms) -> dict:
    """What the stage wrote, as plain values."""
    facts, clusters = folder.done, artefacts.load(folder / 'clusters.npz')
    found = {'arms': arms, 'sizes': facts['sizes'], 'agreement': facts.get('agreement')}
    found['neighbours_alike'] = facts.get('neighbours_alike')
    if 'confusion' in clusters:
        order = np.argsort(clusters['match'], kind='stable')  # the matched class on the diagonal
        found['confusion'] = clusters['confusion'][order].tolist()
        found['clusters'] = order.tolist()
    return found


def _sizes(one):
    percent = tables.percent
    rows = []
    for part, a in (one['agreement'] or {}).items():
        rows.append((part, percent(a['accuracy']), f'{a["nmi"]:.3f}', f'{a["ari"]:.3f}'))
    if (alike := one['neighbours_alike']) is not None:
        rows.append(('mined neighbours of the same class', percent(alike), '', ''))
    sizes = one['sizes']
    rows.append((f'{len(sizes)} clusters', f'{min(sizes)} to {max(sizes)} images', '', ''))
    title = f'For {", ".join(one["arms"][:3])}{" and more" if len(one["arms"]) > 3 else ""}'
    return ('images', 'accuracy, %', 'NMI', 'ARI'), rows, title


def _confusion(one, names):
    rows = [
        (f'cluster {cluster}', *(str(n) for n in counts))
        for cluster, counts in zip(one['clusters'], one['confusion'])
    ]
    return ('training images', *names), rows, 'Clusters (rows) and classes'


def show(found: list[dict], config) -> None:
    """One line for each labelling."""
    for one in found:
        for part, a in (one['agreement'] or {}).items():
            console.say(
                f'labels from the images alone, {part}: accuracy {100 * a["accuracy"]:.2f} %, '
                f'NMI {a["nmi"]:.3f}, ARI {a["ari"]:.3f}'
            )
