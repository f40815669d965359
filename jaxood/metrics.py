"""How well scores separate in-distribution (ID) from out-of-distribution (OOD) images.

Scores are larger for outliers; a threshold τ accepts an image as ID when s <= τ. `id_scores` are
a_1..a_n, `ood_scores` b_1..b_m; everything is float64 on the host and every count a whole number.

All ranking metrics read one thing, the curve of accepted counts over the distinct thresholds

    A_k = #{a <= v_k},   B_k = #{b <= v_k},   v_0 = -inf < v_1 < ... < v_V,

so each is a few lines on (A, B), and the bootstrap runs the very same lines on resampled counts
(a second axis, one column a draw). All metrics are fractions; percent is for printing.
"""

import math
import statistics
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxood.errors import UserError, lookup


def auroc(id_scores, ood_scores) -> float:
    """P(b > a) + P(b = a) / 2: the share of (ID, OOD) pairs in the right order, ties one half.

    The same number as from mid-ranks of the pooled scores, (Σ_j r(b_j) - m(m+1)/2) / (nm).
    Independent of the ID:OOD ratio; unchanged by any strictly increasing map of the scores.
    """
    return float(_auroc(*_curve(id_scores, ood_scores)))


def aupr_in(id_scores, ood_scores, *, convention: str = 'average_precision') -> float:
    """Area under precision over recall with ID as the positive class, score -s.

    Average precision Σ_k (R_k - R_{k-1}) P_k over distinct thresholds: rows tied at a threshold
    enter together. Depends on the ID:OOD ratio (a random score gives the base rate).

    Args:
        convention: 'openood' for the trapezoid from the point (R, P) = (0, 1), as OpenOOD v1.5
            (official code) has it: another number, too optimistic with ties; for parity only.
    """
    area = lookup(_AUPR, convention, 'convention')
    return float(area(*_curve(id_scores, ood_scores)))


def aupr_out(id_scores, ood_scores, *, convention: str = 'average_precision') -> float:
    """As `aupr_in`, with OOD as the positive class, score s."""
    area = lookup(_AUPR, convention, 'convention')
    return float(area(*_mirror(*_curve(id_scores, ood_scores))))


def fpr95_id(id_scores, ood_scores, *, level: int = 95) -> float:
    """Share of OOD that slips through when `level` % of ID is accepted: the papers' FPR95.

    τ = the ⌈level/100 · n⌉-th smallest a (whole-number arithmetic); the value is #{b <= τ} / m:
    a tie at τ counts against the method. DOG's, DLSR's and the energy paper's figure.
    """
    return float(_fpr_id(*_curve(id_scores, ood_scores), level=level))


def fpr95_ood(id_scores, ood_scores, *, level: int = 95) -> float:
    """Share of ID falsely flagged when `level` % of OOD is caught: OpenOOD's FPR95 since 2023.

    τ = the ⌈level/100 · m⌉-th largest b; the value is #{a >= τ} / n, ties against the method.
    Not a function of `fpr95_id`: the two can differ by tens of points.
    """
    return float(_fpr_id(*_mirror(*_curve(id_scores, ood_scores)), level=level))


def detection_error(id_scores, ood_scores) -> float:
    """min_τ ½ [#{a > τ} / n + #{b <= τ} / m], equal priors, over all observed values and -inf.

    In [0, ½] and the same whichever class is positive; detection accuracy is 1 minus this.
    """
    return float(_detection_error(*_curve(id_scores, ood_scores)))


def oscr(id_scores, ood_scores, correct) -> float:
    """Area under CCR(τ) over FPR(τ) (Dhamija et al. 2018, arXiv:1811.04110), in closed form:

        1/(nm) Σ_{i correct} Σ_j ([b_j > a_i] + ½ [b_j = a_i])  <=  min(AUROC, ID accuracy).

    Args:
        correct: bool[n], whether the classifier is right about each ID row.
    """
    a, correct = _with_correct(id_scores, correct)
    if not correct.any():
        return 0.0
    return float(auroc(a[correct], ood_scores) * correct.mean())


def ccr_at_fpr(id_scores, ood_scores, correct, *, fpr: float) -> float:
    """Largest CCR(τ) = #{i correct, a_i <= τ} / n with FPR(τ) = #{b <= τ} / m at most `fpr`.

    Raises:
        UserError: fewer than 1/fpr OOD rows, which cannot resolve such a rate.
    """
    a, correct = _with_correct(id_scores, correct)
    b = np.sort(_finite(ood_scores, 'ood_scores'))
    allowed = int(np.floor(fpr * b.size + 1e-9))  # fpr·m is whole more often than floats admit
    if allowed < 1:
        raise UserError(
            f'CCR at an FPR of {fpr:g} needs at least {int(np.ceil(1 / fpr))} OOD images, '
            f'got {b.size}. Take a larger fpr or the whole test set.'
        )
    below = a < b[allowed] if allowed < b.size else np.ones_like(correct)
    return float(np.mean(correct & below))


def accuracy(predictions, labels) -> float:
    """Share of rows whose predicted class is the label."""
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def evaluate(
    id_scores,
    ood_scores,
    *,
    correct=None,
    name: str = 'the score',
    convention: str = 'average_precision',
) -> dict[str, float | int | None]:
    """Every metric of one score on one OOD set, under the column names of `results.csv`.

    Args:
        id_scores: [n], larger = more outlying.
        ood_scores: [m].
        correct: bool[n], or None: then `oscr` and `id_acc` are None.
        name: the method, for the message when a score is NaN or infinite.
        convention: 'openood' reproduces OpenOOD v1.5's AUPR (see `aupr_in`); its AUROC is
            `auroc` and its FPR@95 is `fpr95_ood` as they are (with many ties, scikit-learn's
            dropping of collinear ROC points can lift OpenOOD's FPR@95).

    Raises:
        UserError: a score is not finite, or a set is empty.
    """
    a, b = _finite(id_scores, f'{name} on ID'), _finite(ood_scores, f'{name} on OOD')
    A, B = _curve(a, b)
    area = lookup(_AUPR, convention, 'convention')
    row = {'n_id': a.size, 'n_ood': b.size} | {k: float(f(A, B)) for k, f in _METRICS.items()}
    row |= {'aupr_in': float(area(A, B)), 'aupr_out': float(area(*_mirror(A, B)))}
    if correct is None:
        return row | {'oscr': None, 'id_acc': None}
    a, correct = _with_correct(a, correct)
    return row | {'oscr': oscr(a, b, correct), 'id_acc': float(correct.mean())}


def bootstrap(
    id_scores,
    ood_scores,
    metric: str = 'auroc',
    *,
    draws: int = 1000,
    seed: int = 0,
    correct=None,
    ood_set: str = '',
) -> np.ndarray:
    """Draws of a metric's mean over training seeds: what the interval is taken from.

    See `bootstraps`, which does several metrics at once.

    Args:
        metric: a key of `evaluate`'s row.

    Returns:
        float64[draws].
    """
    more = dict(draws=draws, seed=seed, correct=correct, ood_set=ood_set)
    return bootstraps(id_scores, ood_scores, (metric,), **more)[metric]


def bootstraps(
    id_scores,
    ood_scores,
    wanted: Sequence[str],
    *,
    draws: int = 1000,
    seed: int = 0,
    correct=None,
    ood_set: str = '',
) -> dict[str, np.ndarray]:
    """Draws of several metrics' means over training seeds, from the same resampled rows.

    Each draw resamples, with replacement and stratified, the S training seeds, the n ID rows and
    the m OOD rows; all seeds see the same rows. The resampling is a function of (`seed`, S, n)
    and of (`seed`, `ood_set`, m) alone, so for a paired comparison of two arms, scores or methods,
    subtract their draws; for a mean over OOD sets, average the draws of the sets: the ID rows are
    shared by all of them. (Our choice; with 3-5 seeds, resampling them is only a rough guide.)

    Args:
        id_scores: [S, n], or [n] for one trained network.
        ood_scores: [S, m], or [m].
        wanted: keys of `evaluate`'s row.
        correct: bool[S, n], for 'oscr' and 'id_acc'.
        ood_set: the OOD set's name, so that two sets of one size are resampled independently.

    Returns:
        metric -> float64[draws].
    """
    a = np.atleast_2d(_finite(id_scores, 'id_scores', ndim=(1, 2)))
    b = np.atleast_2d(_finite(ood_scores, 'ood_scores', ndim=(1, 2)))
    (S, n), m = a.shape, b.shape[1]
    if len(b) != S:
        raise UserError(f'id_scores has {S} training seeds, ood_scores {len(b)}: give the same.')
    for metric in wanted:
        lookup(_METRICS | dict.fromkeys(_CORRECT_METRICS), metric, 'metric')
        if metric in _CORRECT_METRICS:
            correct = np.atleast_2d(correct)
            if correct.shape != a.shape:
                raise UserError(f'{metric} needs `correct` of shape {a.shape}: {correct.shape}.')
    orders = [(np.argsort(x), np.argsort(y), *_curve(x, y)) for x, y in zip(a, b)]

    root = np.random.SeedSequence(seed)
    seed_rng, id_rng = (np.random.default_rng(s) for s in root.spawn(2))
    ood_rng = np.random.default_rng([seed, zlib.crc32(ood_set.encode()) + 1])
    values = {metric: np.empty((S, draws)) for metric in wanted}
    chunk = max(1, _CELLS // (n + m))
    for start in range(0, draws, chunk):
        columns = slice(start, min(start + chunk, draws))
        size = columns.stop - start
        id_counts, ood_counts = _counts(id_rng, n, size), _counts(ood_rng, m, size)
        for s, (id_order, ood_order, A, B) in enumerate(orders):
            # A_k rows lie at or below v_k, so the first A_k sorted rows' counts are the draw's A_k.
            B_draw = _cumulative(ood_counts[ood_order])[B]
            A_draw = _cumulative(id_counts[id_order])[A]
            for metric, into in values.items():
                if metric in _CORRECT_METRICS:
                    right = _cumulative((id_counts * correct[s][:, None])[id_order])[A]
                    won = right[-1] / n if metric == 'id_acc' else _pairs(right, B_draw) / (n * m)
                    into[s, columns] = won
                else:
                    into[s, columns] = _METRICS[metric](A_draw, B_draw)
    picks = _counts(seed_rng, S, draws)  # how often each draw takes each seed
    return {metric: np.sum(picks * found, axis=0) / S for metric, found in values.items()}


def interval(draws, *, level: float = 0.95) -> tuple[float, float]:
    """The central `level` of the draws: a percentile bootstrap interval."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def proportion(hits: int, count: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share: hits of count independent trials. Wilson 1927, Eq. 4-6."""
    if not 0 <= hits <= count or count < 1:
        raise UserError(f'{hits} of {count} is no share.')
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    p, n = hits / count, count
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return tuple((middle + s * half) / (1 + z * z / n) for s in (-1, 1))


# ---- the equations, on curves A, B of shape [V + 1] or [V + 1, draws] -----------------------


def _curve(id_scores, ood_scores):
    """(A, B) int[V + 1]: rows accepted at each distinct threshold, entry 0 at -inf."""
    a, b = _finite(id_scores, 'id_scores'), _finite(ood_scores, 'ood_scores')
    v = np.unique(np.concatenate([a, b]))
    accepted = [np.searchsorted(np.sort(x), v, side='right') for x in (a, b)]
    return tuple(np.concatenate([[0], c]) for c in accepted)


def _mirror(A, B):
    """The curve with the classes exchanged and the scores negated."""
    return (B[-1] - B)[::-1], (A[-1] - A)[::-1]


def _pairs(A, B):
    """#{a < b} + ½ #{a = b} over all pairs."""
    return np.sum(np.diff(B, axis=0) * (A[:-1] + A[1:]), axis=0) / 2


def _auroc(A, B):
    return _pairs(A, B) / (A[-1] * B[-1])


def _average_precision(A, B):
    precision = A[1:] / np.maximum(A[1:] + B[1:], 1)  # a draw may hold no row up to v_1
    return np.sum(np.diff(A, axis=0) * precision, axis=0) / A[-1]


def _trapezoid(A, B):
    precision = np.concatenate([[1.0], A[1:] / (A[1:] + B[1:])])
    return np.sum(np.diff(A) * (precision[:-1] + precision[1:])) / (2 * A[-1])


def _fpr_id(A, B, *, level=95):
    needed = -(-level * A[-1] // 100)  # the ceiling without floats: .95 n is whole too often
    at = np.argmax(needed <= A, axis=0)
    return np.take_along_axis(B, np.expand_dims(at, 0), axis=0)[0] / B[-1]


def _detection_error(A, B):
    return np.min((A[-1] - A) / A[-1] + B / B[-1], axis=0) / 2


_AUPR: dict[str, Callable] = {'average_precision': _average_precision, 'openood': _trapezoid}
_METRICS: dict[str, Callable] = {
    'auroc': _auroc,
    'aupr_in': _average_precision,
    'aupr_out': lambda A, B: _average_precision(*_mirror(A, B)),
    'fpr95_id': _fpr_id,
    'fpr95_ood': lambda A, B: _fpr_id(*_mirror(A, B)),
    'det_err': _detection_error,
}
_CORRECT_METRICS = ('oscr', 'id_acc')  # these count correct ID rows only
_CELLS = 2**20  # rows x draws at a time: 8 MB an array


# ---- resampling and input ----------------------------------------------------------------


def _counts(rng, rows, draws):
    """int[rows, draws]: how often each of `draws` bootstrap samples of size `rows` holds a row."""
    picked = rng.integers(rows, size=(draws, rows)) * draws + np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=rows * draws).reshape(rows, draws)


def _cumulative(counts):
    """Column sums of the first 0, 1, ..., rows rows."""
    total = np.zeros((len(counts) + 1, counts.shape[1]), np.int64)
    np.cumsum(counts, axis=0, out=total[1:])
    return total


def _finite(scores, name, *, ndim=(1,)):
    """Scores in float64 (cast before any arithmetic), refused if empty, NaN or infinite."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim not in ndim or not scores.size:
        raise UserError(f'{name}: expected a non-empty row of scores, got shape {scores.shape}.')
    bad = np.count_nonzero(~np.isfinite(scores))
    if bad:
        raise UserError(
            f'{name}: {bad} of {scores.size} scores are NaN or infinite, which is an error and '
            'not a value. Look at the features it reads (a diverged network, a bank that is too '
            'small) or drop the method from config.scores.'
        )
    return scores


def _with_correct(id_scores, correct):
    a, correct = _finite(id_scores, 'id_scores'), np.asarray(correct, dtype=bool)
    if correct.shape != a.shape:
        raise UserError(f'correct has shape {correct.shape}, id_scores {a.shape}: one a row.')
    return a, correct
