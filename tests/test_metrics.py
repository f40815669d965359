import tracemalloc

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn import metrics as sk

from jaxood import metrics
from jaxood.errors import UserError

# A worked example with ties across the classes; every number below is done by hand.
A = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
B = np.array([0.3, 0.45, 0.6, 0.7])
CORRECT = np.array([True, True, False, True, True])


def tied(seed, n=60, m=45):
    """Scores on a coarse grid: many ties within and between the classes."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 12, n) / 10, rng.integers(3, 16, m) / 10


def test_worked_example():
    row = metrics.evaluate(A, B, correct=CORRECT)
    expected = {
        'n_id': 5,
        'n_ood': 4,
        'auroc': 0.825,
        'aupr_in': 0.852857,
        'aupr_out': 0.830357,
        'fpr95_id': 0.5,
        'fpr95_ood': 0.6,
        'det_err': 0.225,
        'oscr': 0.65,
        'id_acc': 0.8,
    }
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=5e-7), name


def test_worked_example_in_the_single_functions():
    assert metrics.auroc(A, B) == pytest.approx(0.825)
    assert metrics.aupr_in(A, B, convention='openood') == pytest.approx(0.868095, abs=5e-7)
    assert metrics.aupr_out(A, B, convention='openood') == pytest.approx(0.823512, abs=5e-7)
    assert metrics.fpr95_id(A, B, level=80) == 0.25
    assert metrics.fpr95_ood(A, B, level=75) == 0.2
    assert metrics.detection_error(A, B) == pytest.approx(0.225)
    assert metrics.oscr(A, B, CORRECT) == pytest.approx(0.65)


def test_a_second_example_without_predictions():
    row = metrics.evaluate([0.1, 0.2, 0.3, 0.4], [0.35, 0.5])
    assert row['auroc'] == 0.875
    assert row['aupr_out'] == pytest.approx(0.83333, abs=5e-6)
    assert row['aupr_in'] == pytest.approx(0.95)
    assert row['fpr95_id'] == 0.5
    assert row['oscr'] is None
    assert row['id_acc'] is None


def test_constant_score_and_perfect_separation():
    row = metrics.evaluate(np.ones(5), np.ones(4))
    assert [row[k] for k in ('auroc', 'fpr95_id', 'fpr95_ood', 'det_err')] == [0.5, 1.0, 1.0, 0.5]
    assert row['aupr_out'] == pytest.approx(4 / 9)
    assert metrics.aupr_out(np.ones(5), np.ones(4), convention='openood') == pytest.approx(0.722222)
    row = metrics.evaluate(A, A + 1)
    assert [row[k] for k in ('auroc', 'aupr_in', 'aupr_out')] == [1.0, 1.0, 1.0]
    assert [row[k] for k in ('fpr95_id', 'fpr95_ood', 'det_err')] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize('seed', range(3))
def test_symmetries_of_auroc(seed):
    a, b = tied(seed)
    assert metrics.auroc(a, b) + metrics.auroc(b, a) == pytest.approx(1.0, abs=1e-15)
    assert metrics.auroc(-a, -b) == pytest.approx(1.0 - metrics.auroc(a, b), abs=1e-15)
    assert metrics.auroc(np.exp(3 * a), np.exp(3 * b)) == metrics.auroc(a, b)
    ranks, m = rankdata(np.concatenate([a, b])), len(b)
    assert metrics.auroc(a, b) == (ranks[len(a) :].sum() - m * (m + 1) / 2) / (len(a) * m)


@pytest.mark.parametrize('seed', range(3))
def test_agrees_with_scikit_learn(seed):
    a, b = tied(seed)
    score, is_ood = np.concatenate([a, b]), np.repeat([0, 1], [len(a), len(b)])
    fpr, tpr, _ = sk.roc_curve(is_ood, score, drop_intermediate=False)
    assert metrics.auroc(a, b) == pytest.approx(sk.roc_auc_score(is_ood, score), abs=1e-12)
    assert metrics.fpr95_ood(a, b) == fpr[np.argmax(tpr >= 0.95)]
    assert metrics.detection_error(a, b) == pytest.approx(np.min(1 - tpr + fpr) / 2)
    for area, labels, sign in ((metrics.aupr_out, is_ood, 1), (metrics.aupr_in, 1 - is_ood, -1)):
        ap = sk.average_precision_score(labels, sign * score)
        assert area(a, b) == pytest.approx(ap, abs=1e-12)
        precision, recall, _ = sk.precision_recall_curve(labels, sign * score)
        trapezoid = sk.auc(recall, precision)
        assert area(a, b, convention='openood') == pytest.approx(trapezoid, abs=1e-12)


def test_openood_parity_on_float32_scores():
    """OpenOOD v1.5 as it computes its row, from a dump of float32 confidences."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 400).astype(np.float32), rng.normal(1, 1, 300).astype(np.float32)
    score, is_ood = np.concatenate([a, b]), np.repeat([0, 1], [len(a), len(b)])
    fpr, tpr, _ = sk.roc_curve(is_ood, score)
    row = metrics.evaluate(a, b, convention='openood')
    assert row['fpr95_ood'] == fpr[np.argmax(tpr >= 0.95)]
    assert row['auroc'] == pytest.approx(sk.auc(fpr, tpr), abs=1e-12)
    for name, labels, sign in (('aupr_out', is_ood, 1), ('aupr_in', 1 - is_ood, -1)):
        precision, recall, _ = sk.precision_recall_curve(labels, sign * score)
        assert row[name] == pytest.approx(sk.auc(recall, precision), abs=1e-12)


def test_threshold_rank_is_exact_for_every_size():
    """With a = b = 0..n-1, FPR is the rank of τ over n; float ceilings of .95 n go wrong."""
    for n in range(1, 250):
        rank = next(k for k in range(1, n + 1) if 100 * k >= 95 * n)
        assert metrics.fpr95_id(np.arange(n), np.arange(n)) == rank / n
        assert metrics.fpr95_ood(np.arange(n), np.arange(n)) == rank / n


@pytest.mark.parametrize('seed', range(3))
def test_fpr_and_detection_error_against_their_definitions(seed):
    a, b = tied(seed)
    tau = np.sort(a)[-(-95 * len(a) // 100) - 1]
    assert metrics.fpr95_id(a, b) == np.mean(b <= tau)
    tau = np.sort(b)[::-1][-(-95 * len(b) // 100) - 1]
    assert metrics.fpr95_ood(a, b) == np.mean(a >= tau)
    taus = [-np.inf, *a, *b]
    error = min((np.mean(a > t) + np.mean(b <= t)) / 2 for t in taus)
    assert metrics.detection_error(a, b) == pytest.approx(error, abs=1e-15)
    assert metrics.detection_error(-b, -a) == pytest.approx(error, abs=1e-15)


@pytest.mark.parametrize('seed', range(3))
def test_oscr_and_ccr_against_their_definitions(seed):
    a, b = tied(seed)
    correct = np.random.default_rng(seed).random(len(a)) < 0.7
    pairs = (b > a[:, None]) + 0.5 * (b == a[:, None])
    value = metrics.oscr(a, b, correct)
    assert value == pytest.approx(pairs[correct].sum() / pairs.size)
    assert value <= min(metrics.auroc(a, b), correct.mean())
    assert metrics.oscr(a, b, np.ones_like(correct)) == metrics.auroc(a, b)
    assert metrics.oscr(a, b, np.zeros_like(correct)) == 0.0
    taus = [-np.inf, *a, *b]
    for fpr in (0.1, 0.3, 1.0):
        best = max(np.mean(correct & (a <= t)) for t in taus if np.mean(b <= t) <= fpr)
        assert metrics.ccr_at_fpr(a, b, correct, fpr=fpr) == best
    with pytest.raises(UserError, match='at least 1000 OOD images'):
        metrics.ccr_at_fpr(a, b, correct, fpr=1e-3)


def test_accuracy():
    assert metrics.accuracy([0, 1, 2, 2], [0, 1, 1, 2]) == 0.75


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_names_the_method(bad):
    with pytest.raises(UserError, match='knn200 on OOD: 1 of 4 scores are NaN or infinite'):
        metrics.evaluate(A, [0.1, bad, 0.2, 0.3], name='knn200')
    with pytest.raises(UserError, match='non-empty'):
        metrics.evaluate(A, [])


# ---- bootstrap ----------------------------------------------------------------------------

PLAIN = ('auroc', 'aupr_in', 'aupr_out', 'fpr95_id', 'fpr95_ood', 'det_err')


@pytest.fixture
def resampled(monkeypatch):
    """Every table of counts that the bootstrap draws, in order."""
    drawn, counts = [], metrics._counts

    def record(*args):
        drawn.append(counts(*args))
        return drawn[-1]

    monkeypatch.setattr(metrics, '_counts', record)
    return drawn


@pytest.mark.parametrize('metric', [*PLAIN, 'oscr', 'id_acc'])
def test_a_draw_is_the_metric_of_the_repeated_rows(metric, resampled):
    a, b = (np.stack(x) for x in zip(tied(0), tied(1)))
    correct = np.random.default_rng(2).random(a.shape) < 0.8
    values = metrics.bootstrap(a, b, metric, draws=7, correct=correct)
    id_counts, ood_counts, picks = resampled
    assert (id_counts.sum(0) == a.shape[1]).all()
    assert (ood_counts.sum(0) == b.shape[1]).all()
    for d, s_counts in enumerate(picks.T):
        i, j = (np.repeat(np.arange(len(c)), c[:, d]) for c in (id_counts, ood_counts))
        per_seed = [metrics.evaluate(x[i], y[j], correct=c[i]) for x, y, c in zip(a, b, correct)]
        expected = np.average([row[metric] for row in per_seed], weights=s_counts)
        assert values[d] == pytest.approx(expected, abs=1e-12)


def test_draws_do_not_depend_on_the_chunks(monkeypatch):
    a, b = tied(0)
    whole = metrics.bootstrap(a, b, draws=20)
    monkeypatch.setattr(metrics, '_CELLS', 3 * (len(a) + len(b)))
    np.testing.assert_array_equal(metrics.bootstrap(a, b, draws=20), whole)


def test_pairing(resampled, monkeypatch):
    """Arms share all indices, OOD sets of any size the ID rows; sets of one size are apart."""
    monkeypatch.setattr(metrics, '_CELLS', 500)  # other sets, other chunks
    a, b = tied(0)
    draws = metrics.bootstrap(a, b, draws=50, ood_set='svhn')
    np.testing.assert_array_equal(metrics.bootstrap(2 * a, 2 * b, draws=50, ood_set='svhn'), draws)
    assert not np.array_equal(metrics.bootstrap(a, b, draws=50, ood_set='lsun'), draws)
    assert not np.array_equal(metrics.bootstrap(a, b, draws=50, seed=1, ood_set='svhn'), draws)

    def id_rows(ood):
        resampled.clear()
        metrics.bootstrap(a, ood, draws=50)
        return np.concatenate([c for c in resampled if len(c) == len(a)], axis=1)

    np.testing.assert_array_equal(id_rows(b), id_rows(b[:20]))


def test_spread_is_the_sampling_error():
    """ID accuracy is a mean of Bernoulli draws: its bootstrap has their standard error."""
    n, p = 400, 0.8
    correct = np.arange(n) < p * n
    draws = metrics.bootstrap(np.arange(n), np.arange(n), 'id_acc', draws=4000, correct=correct)
    assert draws.mean() == pytest.approx(p, abs=0.002)
    assert draws.std() == pytest.approx(np.sqrt(p * (1 - p) / n), rel=0.05)


def test_interval():
    assert metrics.interval(np.arange(1001)) == pytest.approx((25.0, 975.0))
    assert metrics.interval(np.arange(1001), level=0.5) == pytest.approx((250.0, 750.0))


def test_memory_is_bounded():
    """At the size of CIFAR-10 against SVHN, far below one table of rows x 1,000 draws (288 MB)."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 10_000)), rng.normal(1.0, size=(2, 26_032))
    tracemalloc.start()
    draws = metrics.bootstrap(a, b, draws=60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6
    assert abs(draws.mean() - np.mean([metrics.auroc(*x) for x in zip(a, b)])) < 0.005


def test_bootstrap_refuses_what_does_not_fit():
    with pytest.raises(UserError, match='2 training seeds'):
        metrics.bootstrap(np.zeros((2, 5)), np.zeros((3, 5)))
    with pytest.raises(UserError, match="Did you mean 'fpr95_id'"):
        metrics.bootstrap(A, B, 'fpr95id')
    with pytest.raises(UserError, match='needs `correct`'):
        metrics.bootstrap(A, B, 'oscr')
    with pytest.raises(UserError, match='NaN'):
        metrics.bootstrap(A * np.nan, B)


def test_pairing_narrows_a_difference():
    """The difference of two arms has less spread paired than unpaired."""
    rng = np.random.default_rng(0)
    common_a, common_b = rng.normal(size=200), rng.normal(1.0, size=150)
    arms = [
        (common_a + 0.1 * rng.normal(size=200), common_b + 0.1 * rng.normal(size=150))
        for _ in range(2)
    ]
    x, y = (metrics.bootstrap(*arm, draws=300) for arm in arms)
    y_unpaired = metrics.bootstrap(*arms[1], draws=300, seed=1)
    assert np.std(x - y) < 0.5 * np.std(x - y_unpaired)


def test_only_the_order_matters_and_the_classes_mirror():
    """Ranking metrics see nothing but the order: an increasing map leaves all of them alone."""
    a, b = tied(4)
    before = metrics.evaluate(a, b)
    after = metrics.evaluate(*(np.arctan(x) * 5 - 3 for x in (a, b)))
    for name in before:
        assert before[name] == after[name]
    swapped = metrics.evaluate(-b, -a)
    for one, other in (('aupr_in', 'aupr_out'), ('fpr95_id', 'fpr95_ood')):
        assert swapped[one] == pytest.approx(before[other], abs=1e-15)


def test_a_share_has_wilsons_interval():
    """Numbers of the closed form: 0 of n gives z²/(n + z²) at the top; 1/2 is symmetric."""
    z2 = 1.959963984540054**2
    low, high = metrics.proportion(0, 50)
    assert low == pytest.approx(0.0, abs=1e-12)
    assert high == pytest.approx(z2 / (50 + z2))
    low, high = metrics.proportion(30, 60)
    assert low + high == pytest.approx(1.0)
    assert high - low == pytest.approx(np.sqrt(z2 / 60 + z2**2 / 3600) / (1 + z2 / 60))
    with pytest.raises(UserError, match='no share'):
        metrics.proportion(3, 2)
