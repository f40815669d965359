"""Fit and scoring of every score that reads logits and features, beside pytorch-ood."""

import importlib.util
import sys
import types

import numpy as np

from jaxood import parallel
from jaxood.bench import measure
from jaxood.scores import SCORES
from jaxood.stages.parts import networks

CLASSES, BATCH = 10, 256


def rows(flags):
    """Rows of seconds to fit and to score, then their sums over what both have."""
    bank, head = _features(flags.bank, flags.dim, seed=0)
    queries, _ = _features(flags.queries, flags.dim, seed=1)
    network = networks.Network(None, {'params': {'head': head}}, {}, '', parallel.setup(), BATCH)
    peers = _pytorch_ood(head, flags.dim)
    sums = {'fit': [0.0, 0.0], 'score': [0.0, 0.0]}
    for name, entry in SCORES.items():
        if entry.needs not in ('logits', 'features'):
            continue
        fitted, their_detector = {}, peers[name]() if name in peers else None

        def fit(entry=entry, fitted=fitted):
            fitted['params'] = entry.fit(bank, head)

        def score(entry=entry, fitted=fitted):
            return np.concatenate(list(network.outside(entry.score, fitted['params'], queries)))

        fit()
        score()  # compiles
        their_fit, their_score = their_detector(bank, queries) if their_detector else (None, None)
        for what, mine, other in (('fit', fit, their_fit), ('score', score, their_score)):
            a, b = measure.take_turns(mine, other, flags.rounds)
            if what == 'fit' and a < 1e-4:
                continue  # there is nothing to fit
            if b is not None:
                sums[what][0] += a
                sums[what][1] += b
            yield measure.row(f'{name}, {what}', 's', a, b, 'pytorch-ood')
    for what, (a, b) in sums.items():
        if b:
            yield measure.row(f'sum of those that both have, {what}', 's', a, b, 'pytorch-ood')


def _features(count, dim, seed):
    """ReLU features of ten overlapping classes, and the logits of a linear head on them."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(CLASSES, dim)) - 1.0
    scale = 2.0 / dim**0.5  # logits of a few units, most of them right
    kernel, bias = scale * means.T, -0.5 * scale * np.square(np.maximum(means, 0)).sum(axis=1)
    head = {'kernel': kernel.astype(np.float32), 'bias': bias.astype(np.float32)}
    rng = np.random.default_rng([1, seed])
    labels = rng.integers(CLASSES, size=count).astype(np.int32)
    h = np.maximum(means[labels] + rng.normal(size=(count, dim)), 0).astype(np.float32)
    logits = h @ head['kernel'] + head['bias']
    return {'logits': logits, 'features': h, 'labels': labels}, head


def _pytorch_ood(head, dim):
    """Our score -> a function that makes pytorch-ood's -> (bank, queries) -> (fit, score)."""
    found = importlib.util.find_spec('pytorch_ood')
    if found is None or not measure.has('torch'):
        return {}
    import torch

    package = types.ModuleType('pytorch_ood')  # its own __init__ wants torchvision, for data sets
    package.__path__ = list(found.submodule_search_locations)
    sys.modules.setdefault('pytorch_ood', package)
    from pytorch_ood import detector as d

    w, b = torch.from_numpy(head['kernel'].T.copy()), torch.from_numpy(head['bias'])
    linear = torch.nn.Linear(w.shape[1], w.shape[0])
    linear.load_state_dict({'weight': w, 'bias': b})
    same = torch.nn.Identity()
    flat = torch.nn.Sequential(torch.nn.Flatten(), linear)

    def of(kind, make):
        def detector(bank, queries):
            made = make()
            key = 'logits' if kind == 'logits' else 'features'
            z, y = torch.from_numpy(bank[key]), torch.from_numpy(bank['labels']).long()
            q = torch.from_numpy(queries[key])
            if kind == 'maps':
                q = q[:, :, None, None]
            fit, predict = None, made.predict
            if kind in ('logits', 'features'):
                fit = lambda: getattr(made, f'fit_{key}')(z, y)
                predict = getattr(made, f'predict_{key}')
            if fit:
                fit()

            def score():
                with torch.inference_mode():
                    return predict(q)

            return fit, score

        return lambda: detector

    half = dim // 2
    return {
        'msp': of('logits', lambda: d.MaxSoftmax(None)),
        'maxlogit': of('logits', lambda: d.MaxLogit(None)),
        'energy': of('logits', lambda: d.EnergyBased(None)),
        'tempscale': of('logits', lambda: d.TemperatureScaling(None)),
        'entropy': of('logits', lambda: d.Entropy(None)),
        'gen': of('logits', lambda: d.GEN(None, gamma=0.1, M=10)),
        'klm': of('logits', lambda: d.KLMatching(None)),
        'react': of('vectors', lambda: d.ReAct(same, linear, threshold=1.0)),
        'dice': of('features', lambda: d.DICE(None, w, b, 0.9)),
        'ash': of('maps', lambda: d.ASH(same, flat, 'ash-s', 0.9)),
        'scale': of('maps', lambda: d.SCALE(same, flat, 0.85)),
        'mds': of('features', lambda: d.Mahalanobis(None)),
        'rmds': of('features', lambda: d.RMD(None)),
        'knn': of('features', lambda: d.KNN(None, k=50)),
        'vim': of('features', lambda: d.ViM(None, half, w, b)),
        'she': of('features', lambda: d.SHE(same, linear)),
        'nnguide': of('features', lambda: d.NNGuide(same, linear, k=100)),
        'fdbd': of('features', lambda: d.fDBD(same, linear)),
        'nci': of('features', lambda: d.NCI(same, linear, alpha=1e-4)),
    }
