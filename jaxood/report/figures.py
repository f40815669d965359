"""Figures as HTML fragments: inline SVG for lines, embedded PNG or JPEG for images.

Every chart is a row of small panels that wrap on a narrow screen, under one HTML legend. Nothing
refers to another file. The same content gives the same bytes.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from jaxood.errors import UserError
from jaxood.report.tables import MEAN, TEST, Scored

# Okabe & Ito's palette for colour-blind readers, its yellow left out (too pale on white).
ARM_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#4d4d4d')
# Paul Tol's "muted", in an order that sets neighbours apart; the ID set is grey everywhere.
SET_COLOURS = ('#882255', '#44AA99', '#DDAA33', '#332288', '#CC6677', '#117733', '#88CCEE')
ID_COLOUR = '#8a939c'

STYLE = {
    'svg.fonttype': 'none',  # text stays text, in the page's font
    'svg.hashsalt': 'jaxood',  # ids, and so the page's bytes, do not depend on the run
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.edgecolor': '#8a939c',
    'axes.linewidth': 0.8,
    'axes.labelcolor': '#333a41',
    'axes.titlesize': 10,
    'axes.titlelocation': 'left',
    'text.color': '#1c2126',
    'text.parse_math': False,  # a dollar sign in a class name is a dollar sign
    'xtick.color': '#59626b',
    'ytick.color': '#59626b',
    'grid.color': '#e6e9ec',
    'grid.linewidth': 0.8,
    'lines.linewidth': 1.6,
    'path.simplify_threshold': 0.5,
}
TILE = 64  # pixels to which the short sides of small images are enlarged
LARGEST = 128  # and to which large ones are reduced


def colours(names: Sequence[str], palette: Sequence[str] = ARM_COLOURS) -> dict[str, str]:
    """A colour for each name by its position, so that an arm has one colour on the whole page."""
    return {name: palette[i % len(palette)] for i, name in enumerate(dict.fromkeys(names))}


# ---- curves ---------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def score_histograms(scored: Sequence[Scored], method: str, *, bins: int = 32) -> Markup:
    """Scores of the ID test set (filled) and of each OOD set (lines): one panel for each arm.

    Shows each arm's first seed. The view holds the central 99 % of all scores, rows beyond are in
    the outer bins. The dashed line is the threshold that accepts 95 % of ID.
    """
    panels, sets = [], {}
    for s in _first_seeds(scored, method):
        sets = colours([k for k in s.scores if k != TEST], SET_COLOURS)
        edges = np.linspace(*_view(np.concatenate(list(s.scores.values()))), bins + 1)
        figure, ax = _panel(3.0, 2.1)
        for name, colour in {TEST: ID_COLOUR, **sets}.items():
            clipped = np.clip(s.scores[name], edges[0], edges[-1])
            share = 100 * np.histogram(clipped, edges)[0] / len(clipped)
            fill = {'fill': True, 'alpha': 0.45, 'linewidth': 0} if name == TEST else {}
            ax.stairs(share, edges, color=colour, **{'linewidth': 1.4, **fill})
        accepted = np.sort(s.scores[TEST])[-(-95 * len(s.scores[TEST]) // 100) - 1]
        ax.axvline(np.clip(accepted, edges[0], edges[-1]), color='#333a41', lw=0.9, ls=(0, (4, 3)))
        ax.set(title=s.arm, xlabel=f'{method} score (larger = more outlying)')
        ax.set(ylabel='share of images, %', xlim=(edges[0], edges[-1]), ylim=(0, None))
        ax.locator_params(nbins=5)
        panels.append(_svg(figure, f'Histogram of {method} scores, arm {s.arm}'))
    return _row(panels, {'ID test': ID_COLOUR, **sets}) if panels else Markup()


@matplotlib.rc_context(STYLE)
def roc_curves(scored: Sequence[Scored], method: str, *, arms: Sequence[str] = ()) -> Markup:
    """ROC curves, OOD positive: one panel for each OOD set, one line for each arm.

    A line is the mean over seeds of the true positive rate at each false positive rate. Dotted
    lines mark where the two FPR95 are read off.

    Args:
        arms: all arms in the page's order, for their colours; by default those of `scored`.
    """
    chosen = [s for s in scored if s.method == method]
    arms = colours(arms or [s.arm for s in scored])
    grid = np.concatenate([[0], np.geomspace(1e-3, 1, 200)])
    panels = []
    for name in [k for k in (chosen[0].scores if chosen else ()) if k != TEST]:
        figure, ax = _panel(3.0, 2.8)
        ax.plot([0, 1], [0, 1], color='#c3c9cf', lw=0.8)
        ax.axhline(0.95, color='#59626b', lw=0.9, ls=':')
        ax.axvline(0.05, color='#59626b', lw=0.9, ls=':')
        for arm, colour in arms.items():
            runs = [s for s in chosen if s.arm == arm]
            if runs:
                caught = np.mean([_roc(s.scores[TEST], s.scores[name], grid) for s in runs], axis=0)
                ax.plot(grid, caught, color=colour)
        ax.set(title=name, xlabel='ID flagged (false positive rate)')
        ax.set(ylabel='OOD caught (true positive rate)', xlim=(0, 1), ylim=(0, 1.01))
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ['0', '.25', '.5', '.75', '1'])
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ['0', '.25', '.5', '.75', '1'])
        panels.append(_svg(figure, f'ROC curves on {name}'))
    present = {a: c for a, c in arms.items() if any(s.arm == a for s in chosen)}
    return _row(panels, present) if panels else Markup()


@matplotlib.rc_context(STYLE)
def intervals(summary: Mapping, method: str) -> Markup:
    """Means with their intervals, one line for each arm: mean AUROC, mean FPR95-ID, ID accuracy."""
    arms = colours(list(summary['cells']))
    asked = [(MEAN, 'auroc', 'mean AUROC ↑, %'), (MEAN, 'fpr95_id', 'mean FPR95-ID ↓, %')]
    asked += [(TEST, 'id_acc', 'ID accuracy ↑, %')]
    panels = []
    for column, metric, title in asked:
        cells = {a: summary['cells'][a].get(method, {}).get(column, {}).get(metric) for a in arms}
        cells = {a: c for a, c in cells.items() if c is not None}
        if not cells:
            continue
        figure, ax = _panel(3.0, 0.62 + 0.24 * len(cells))
        for row, (arm, c) in enumerate(cells.items()):
            ax.plot([100 * c['low'], 100 * c['high']], [row, row], color=arms[arm], lw=2.2)
            ax.plot(100 * c['mean'], row, 'o', ms=5, color=arms[arm])
        ax.set_yticks(range(len(cells)), cells)
        ax.set(title=title, ylim=(len(cells) - 0.4, -0.6))
        ax.tick_params(axis='y', length=0)
        ax.spines['left'].set_visible(False)
        ax.grid(axis='x')
        ax.set_axisbelow(True)
        ax.locator_params(axis='x', nbins=5)
        panels.append(_svg(figure, title))
    return _row(panels, {})


@matplotlib.rc_context(STYLE)
def learning_curves(
    curves: Mapping[str, Mapping[str, Sequence[Mapping]]], *, metric: str = 'loss', arms=()
) -> Markup:
    """Training curves: panel title -> line name -> rows `{'step': …, 'loss': …}`.

    Drawn faintly as logged, with a moving mean over a twentieth of the rows on top.

    Args:
        arms: all arms in the page's order; a line named after one gets its colour.
    """
    known, legend, panels = colours(arms), {}, []
    for title, lines in curves.items():
        rows = {k: [r for r in v if metric in r] for k, v in lines.items()}
        rows = {k: v for k, v in rows.items() if v}
        if not rows:
            continue
        others = [k for k in rows if k not in known]
        used = known | colours(others, SET_COLOURS)
        if len(rows) == 1 and others:
            used = {others[0]: '#333a41'}  # the title says it all
        else:
            legend |= {k: used[k] for k in rows}
        figure, ax = _panel(3.0, 2.1)
        for name, line in rows.items():
            step = np.array([r['step'] for r in line])
            value = np.array([r[metric] for r in line], float)
            width = max(1, len(value) // 20)
            ax.plot(step, value, color=used[name], lw=0.7, alpha=0.35)
            ax.plot(step, _moving_mean(value, width), color=used[name])
        ax.set(title=title, xlabel='step', ylabel=metric)
        ax.grid(axis='y')
        ax.locator_params(nbins=5)
        panels.append(_svg(figure, f'{metric} over steps, {title}'))
    return _row(panels, legend) if panels else Markup()


@matplotlib.rc_context(STYLE)
def over_settings(panels: Mapping[str, Mapping[str, Mapping]], xlabel: str, ylabel: str) -> Markup:
    """A metric over a setting: panel title -> line name -> {value of the setting: percent}."""
    used = colours([name for lines in panels.values() for name in lines], SET_COLOURS)
    drawn = []
    for title, lines in panels.items():
        figure, ax = _panel(3.0, 2.1)
        for name, points in lines.items():
            at = sorted(points)
            ax.plot(at, [points[x] for x in at], 'o-', ms=3.5, color=used[name])
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale='log')
        ticks = sorted({x for points in lines.values() for x in points})
        ax.set_xticks(ticks, [f'{x:g}' for x in ticks])
        ax.minorticks_off()
        ax.grid(axis='y')
        drawn.append(_svg(figure, f'{ylabel} over {xlabel}, {title}'))
    return _row(drawn, used)


def tsne(
    features: Mapping[str, np.ndarray], *, limit: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """t-SNE (van der Maaten & Hinton 2008) of several sets of features in one map.

    Args:
        features: group name -> float32[n, D].
        limit: rows in all; each group gives at most its share, drawn at random.

    Returns:
        group name -> float32[k, 2]. The same input and seed give the same map on one machine.
    """
    from sklearn.decomposition import PCA  # a second to import
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    share = max(2, limit // max(len(features), 1))
    rng = np.random.default_rng(seed)
    rows = {k: np.asarray(v)[np.sort(rng.permutation(len(v))[:share])] for k, v in features.items()}
    stacked = np.concatenate([np.asarray(v, np.float32) for v in rows.values()])
    if len(stacked) < 5:
        raise UserError(f't-SNE needs at least 5 rows of features, got {len(stacked)}.')
    if not np.isfinite(stacked).all():
        raise UserError('features hold NaN or infinite values: look at the training log.')
    if stacked.shape[1] > 50:  # as its authors do: noise out, distances faster
        size = min(50, len(stacked))
        stacked = PCA(size, svd_solver='full', random_state=seed).fit_transform(stacked)
    perplexity = min(30.0, (len(stacked) - 1) / 4)
    with threadpool_limits(1):  # sums in one order; and its threads only wait for each other
        points = TSNE(
            2, perplexity=perplexity, init='pca', max_iter=600, random_state=seed
        ).fit_transform(stacked)
    ends = np.cumsum([len(v) for v in rows.values()])[:-1]
    return dict(zip(rows, np.split(points.astype(np.float32), ends)))


@matplotlib.rc_context(STYLE)
def tsne_figure(points: Mapping[str, np.ndarray]) -> Markup:
    """A map of points [n, 2], one colour a group. The first group is the ID set, in grey, the
    next ones have the colours of the histograms' OOD sets."""
    groups = list(points)
    used = {groups[0]: ID_COLOUR, **colours(groups[1:], SET_COLOURS)}
    figure, ax = _panel(6.4, 4.6)
    for name, colour in used.items():
        x, y = np.asarray(points[name], float).T
        # one raster layer: thousands of vector dots would make the page heavy
        ax.scatter(x, y, s=9, color=colour, alpha=0.75, linewidths=0, rasterized=True)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[['left', 'bottom']].set_visible(False)
    return _row([_svg(figure, 't-SNE map of features', dpi=160)], used)


# ---- images ---------------------------------------------------------------------------------


def gallery(
    images, columns: int = 12, *, captions: Sequence[str] | None = None, label: str = 'images'
) -> Markup:
    """A contact sheet of uint8[N, H, W, C] (C = 1 or 3); with captions, one figure an image.

    Small images are enlarged by a whole factor without smoothing, so that pixels are visible;
    large ones are reduced. No images, no markup.
    """
    pictures = [_picture(image) for image in images]
    if not pictures:
        return Markup()
    # PNG keeps enlarged pixels sharp and small; photographs of some size want JPEG
    kind = 'JPEG' if min(images[0].shape[:2]) > TILE else 'PNG'
    if captions is not None:
        tile = Markup('<figure style="width:{}px">{}<figcaption>{}</figcaption></figure>')
        tiles = [
            tile.format(max(p.width, 72), _img(p, kind, ''), c)
            for p, c in zip(pictures, captions, strict=True)
        ]
        return Markup('<div class="tiles">{}</div>').format(Markup().join(tiles))
    columns, gap = min(columns, len(pictures)), 3
    width, height = pictures[0].width + gap, pictures[0].height + gap
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new(pictures[0].mode, (columns * width - gap, rows * height - gap), 'white')
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return Markup('<div class="sheet">{}</div>').format(_img(sheet, kind, label))


def mistaken(
    images,
    scores,
    pred=None,
    *,
    highest: bool,
    count: int = 12,
    label=None,
    class_names: Sequence[str] | None = None,
) -> Markup:
    """The images at one end of the scores, with score, predicted and (for ID) true class.

    Args:
        images: anything that gives uint8[H, W, C] for an index.
        highest: True for the ID images that look most outlying, False for the OOD images that
            look most ordinary.
    """
    scores = np.asarray(scores, float)
    order = np.argsort(-scores if highest else scores, kind='stable')[:count]

    def named(k):
        return class_names[k] if class_names else f'class {k}'

    digits = int(np.clip(1 - np.floor(np.log10(scores.std() or 1.0)), 0, 9))
    captions = []
    for i in order:
        lines = [f'{scores[i]:.{digits}f}'.replace('-', '−')]
        if label is not None and label[i] >= 0:
            lines.append(f'is {named(label[i])}')
        if pred is not None and pred[i] >= 0:
            lines.append(f'seen as {named(pred[i])}')
        captions.append('\n'.join(lines))
    return gallery([images[int(i)] for i in order], captions=captions)


# ---- inside ---------------------------------------------------------------------------------


def _panel(width, height):
    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, figure.add_subplot()


def _svg(figure, label, *, dpi=100):
    """The figure as an `<svg>` element: no prolog, no metadata, no date."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    figure.savefig(buffer, format='svg', metadata=nothing, dpi=dpi, transparent=True)
    text = buffer.getvalue()
    text = text[text.index('<svg ') :].replace(
        '<style type="text/css">*{stroke-linejoin: round; stroke-linecap: butt}</style>', ''
    )
    named = Markup('<svg role="img" aria-label="{}" ').format(label)
    return named + Markup(text[len('<svg ') :])


def _row(panels, legend):
    """Panels side by side as far as there is room, under a legend."""
    key = Markup('<span><i style="background:{}"></i>{}</span>')
    keys = Markup().join(key.format(colour, name) for name, colour in legend.items())
    head = Markup('<div class="legend">{}</div>').format(keys) if legend else Markup()
    return head + Markup('<div class="panels">{}</div>').format(Markup().join(panels))


def _first_seeds(scored, method):
    """Each arm's run with its smallest seed."""
    first = {}
    for s in scored:
        if s.method == method and (s.arm not in first or s.seed < first[s.arm].seed):
            first[s.arm] = s
    return list(first.values())


def _view(scores):
    low, high = np.quantile(np.asarray(scores, np.float64), [0.005, 0.995])
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _roc(a, b, grid):
    """Share of b caught at each false positive rate, the curve's corners joined by lines."""
    v = np.unique(np.concatenate([a, b]))[::-1]
    flagged, caught = (1 - np.searchsorted(np.sort(x), v, side='left') / len(x) for x in (a, b))
    # where several points share an abscissa np.interp takes the last: the top of the step
    return np.interp(grid, np.append(0, flagged), np.append(0, caught))


def _moving_mean(values, width):
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (total[end] - total[start]) / (end - start)


def _picture(image):
    """uint8[H, W, C] -> a PIL image of a size to look at."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise UserError(
            f'a gallery shows uint8 [H, W, 1 or 3] images, got {image.dtype} {image.shape}.'
        )
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        return picture
    factor = max(1, round(TILE / min(picture.size)))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def _img(picture, kind, label):
    """An `<img>` with its content inside."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({'quality': 88} if kind == 'JPEG' else {'optimize': True}))
    content = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img src="data:image/{};base64,{}" width="{}" height="{}" alt="{}">').format(
        kind.lower(), content, *picture.size, label
    )
