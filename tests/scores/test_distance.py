"""Distances in feature space against plain computations of their formulas."""

import jax
import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from toy import bank_rows, outputs_of, run

from jaxood.errors import UserError
from jaxood.scores import SCORES


def head_of(W, b):
    return {'kernel': np.float32(W).T, 'bias': np.float32(b)}


@pytest.fixture(scope='module')
def random():
    """(bank, outputs, head): 333 and 150 images of five classes, no full block and batch."""
    rng = np.random.default_rng(5)
    head = head_of(rng.normal(size=(5, 9)), rng.normal(size=5))
    h = np.maximum(rng.normal(size=(333, 9)) + 0.3, 0)
    bank = outputs_of(h, head)
    labels = np.where(rng.random(333) < 0.6, bank['logits'].argmax(1), rng.integers(5, size=333))
    return bank | {'labels': np.int32(labels)}, outputs_of(rng.normal(size=(150, 9)), head), head


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def f64(outputs):
    return outputs['features'].astype(np.float64), outputs['logits'].astype(np.float64)


# ---- knn ------------------------------------------------------------------------------------


def knn(bank, features, k):
    return run('knn', {'features': np.float32(bank)}, {'features': np.float32(features)}, {}, k=k)


@pytest.mark.parametrize('n_k', [(200, 1), (200, 5), (193, 50), (193, 193), (3, 2), (31, 31)])
def test_knn_is_exact(n_k):
    """Rows that don't fill a block, more neighbours than blocks, more queries than a batch."""
    n, k = n_k
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(n, 8)), rng.normal(size=(140, 8))
    table = np.linalg.norm(unit(queries)[:, None] - unit(bank)[None], axis=-1)
    want = np.sort(table, axis=1)[:, k - 1]
    np.testing.assert_allclose(knn(bank, queries, k), want, atol=1e-5)


def test_padding_takes_no_neighbours_place():
    """The last block's best is a zero of the padding when every similarity is negative."""
    rng = np.random.default_rng(0)
    bank = -np.abs(rng.normal(size=(33 * 32 + 1, 4)))  # 34 blocks, 31 columns of padding
    queries = np.abs(rng.normal(size=(20, 4)))
    cosine = unit(queries) @ unit(bank).T
    for k in (1, 33, 34, 50):
        want = np.sqrt(2 - 2 * np.sort(cosine, axis=1)[:, -k])
        np.testing.assert_allclose(knn(bank, queries, k), want, atol=1e-5)


def test_knn_hand_numbers():
    assert knn([[5.0, 0.0]], [[0.6, 0.8]], 1) == pytest.approx(np.sqrt(0.8))
    assert knn([[1.0, 0.0]], [[-3.0, 0.0]], 1) == pytest.approx(2.0)
    features = np.random.default_rng(0).normal(size=(40, 6))
    np.testing.assert_allclose(knn(features, features, 1), 0.0, atol=1e-6)
    assert (knn(features, features, 2) > 0.01).all()


@pytest.mark.parametrize('name', ['knn', 'nnguide', 'relation'])
def test_outliers_are_left_out_of_the_bank(name, random):
    bank, outputs, head = random
    kept = np.arange(333) % 3 > 0
    keywords = {} if name == 'relation' else {'k': 7}
    got = run(name, bank | {'is_outlier': ~kept}, outputs, head, **keywords)
    chosen = {k: v[kept] for k, v in bank.items()}
    np.testing.assert_array_equal(got, run(name, chosen, outputs, head, **keywords))


@pytest.mark.parametrize('name', ['knn', 'nnguide'])
@pytest.mark.parametrize('k', [0, 334])
def test_a_neighbour_that_is_not_there_is_refused(name, k, random):
    with pytest.raises(UserError, match='Set k from 1 to 333'):
        SCORES[name].fit(*random[::2], k=k)


@pytest.mark.parametrize('name', ['knn', 'nnguide', 'relation'])
def test_all_pairs_are_never_held(name):
    n = 4096
    bank = {'features': np.ones((n, 2), np.float32), 'logits': np.ones((n, 2), np.float32)}
    params = SCORES[name].fit(bank, {})
    memory = jax.jit(SCORES[name].score).lower(params, bank, {}).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * n * 4 / 10


# ---- nnguide, relation --------------------------------------------------------------------------


@pytest.mark.parametrize('k', [1, 10, 333])
def test_nnguide_is_its_formula(k, random):
    bank, outputs, head = random
    (H, Z), (X, z) = f64(bank), f64(outputs)
    table = unit(X) @ (unit(H) * logsumexp(Z, axis=1)[:, None]).T
    want = -logsumexp(z, axis=1) * np.sort(table, axis=1)[:, -k:].mean(axis=1)
    np.testing.assert_allclose(run('nnguide', bank, outputs, head, k=k), want, rtol=1e-5, atol=1e-5)


def test_nnguide_draws_by_number_and_says_what_turns_signs(random, capsys):
    bank, outputs, head = random
    got = run('nnguide', bank, outputs, head, k=5, fraction=0.1)
    shuffled = bank_rows(bank | {'map': None}, np.random.default_rng(0).permutation(333))
    again = run('nnguide', shuffled, outputs, head, k=5, fraction=0.1)
    np.testing.assert_allclose(again, got, rtol=1e-5)
    assert np.abs(got - run('nnguide', bank, outputs, head, k=5)).max() > 0.1
    with pytest.raises(UserError, match='1 to 33'):  # of the rows that were drawn
        SCORES['nnguide'].fit(bank, head, k=34, fraction=0.1)
    with pytest.raises(UserError, match='fraction=0.0'):
        SCORES['nnguide'].fit(bank, head, fraction=0.0)
    negative = np.mean(logsumexp(bank['logits'], axis=1) < 0)
    assert negative > 0
    assert f'{negative:.1%}' in capsys.readouterr().err


@pytest.mark.parametrize(('cut', 'power'), [(0.03, 1), (0.0, 1), (0.2, 4)])
def test_relation_is_its_formula(cut, power, random):
    bank, outputs, head = random
    (H, Z), (X, z) = f64(bank), f64(outputs)
    e = np.maximum(unit(X) @ unit(H).T, 0) * (softmax(z, axis=1) @ softmax(Z, axis=1).T)
    want = -np.sum(np.where(e > cut, e, 0) ** power, axis=1)
    got = run('relation', bank, outputs, head, cut=cut, power=power)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize('keywords', [{'cut': -0.1}, {'power': 0}])
def test_relation_refuses(keywords, random):
    with pytest.raises(UserError, match='must not be negative'):
        SCORES['relation'].fit(*random[::2], **keywords)


# ---- means and weights ----------------------------------------------------------------------


def test_fdbd_hand_numbers():
    """W = I, b = 0, h = (3, 1), μ = (1, 1): (3 - 1) / √2 / 2."""
    head = head_of(np.eye(2), [0, 0])
    bank = outputs_of([[0, 2], [2, 0]], head)
    assert run('fdbd', bank, outputs_of([[3, 1]], head), head) == pytest.approx(-0.707107)


def test_fdbd_is_its_formula(random):
    bank, outputs, head = random
    X, z = f64(outputs)
    W, off = head['kernel'].T.astype(float), X - bank['features'].mean(axis=0)
    want = []
    for i, y in enumerate(z.argmax(axis=1)):
        others = [c for c in range(5) if c != y]
        to = [(z[i, y] - z[i, c]) / np.linalg.norm(W[y] - W[c]) for c in others]
        want.append(-np.sum(to) / np.linalg.norm(off[i]))
    np.testing.assert_allclose(run('fdbd', bank, outputs, head), want, rtol=1e-4, atol=1e-5)


def test_fdbd_of_two_classes_with_the_same_weights_is_finite():
    head = head_of([[1, 0], [1, 0], [0, 1]], [0, -1, 0])
    bank = outputs_of([[0, 2], [2, 0]], head)
    want = -(3 - 1) / np.sqrt(2) / 2
    assert run('fdbd', bank, outputs_of([[3, 1]], head), head) == pytest.approx(want)


@pytest.mark.parametrize('alpha', [0.0, 0.1])
def test_nci_is_its_formula(alpha, random):
    bank, outputs, head = random
    X, z = f64(outputs)
    w, off = head['kernel'].T[z.argmax(axis=1)], X - bank['features'].mean(axis=0)
    cosine = np.sum(w * off, axis=1) / np.linalg.norm(off, axis=1)
    want = -(cosine + alpha * np.abs(X).sum(axis=1))
    got = run('nci', bank, outputs, head, alpha=alpha)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_she_is_its_formula(random):
    bank, outputs, head = random
    (H, Z), (X, z) = f64(bank), f64(outputs)
    right = Z.argmax(axis=1) == bank['labels']
    assert 0.2 < right.mean() < 0.95
    stored = [H[right & (bank['labels'] == c)].mean(axis=0) for c in range(5)]
    want = [-x @ stored[y] for x, y in zip(X, z.argmax(axis=1))]
    s = run('she', bank, outputs, head)
    np.testing.assert_allclose(s, want, rtol=1e-4, atol=1e-5)
    twice = outputs | {'features': 2 * outputs['features']}
    np.testing.assert_allclose(run('she', bank, twice, head), 2 * s, rtol=1e-5)


def test_she_of_a_class_that_is_never_right(random, capsys):
    bank, outputs, head = random
    never = bank['logits'].argmax(axis=1) == 2
    wrong = bank | {'labels': np.where(never, 1, bank['labels'])}
    mean = bank['features'][wrong['labels'] == 2].mean(axis=0)
    params = SCORES['she'].fit(wrong, head)
    np.testing.assert_allclose(params['means'][2], mean, rtol=1e-5)
    assert not capsys.readouterr().err
    params = SCORES['she'].fit(bank | {'labels': np.zeros(333, np.int32)}, head)
    assert '4 classes (1, 2, 3, 4)' in capsys.readouterr().err
    np.testing.assert_array_equal(params['means'][1:], 0)
