"""Measures speed, beside PyTorch equivalents where those are installed, in one run.

    python -m jaxood.bench --suite=classifiers --weights=CHECKPOINT[,CHECKPOINT ...]
    python -m jaxood.bench --suite=scores

`classifiers`: images/s of a network's forward pass, beside PyTorch on the same weights (channels
last). `scores`: fit and scoring of every score that reads logits and features, 27,763 images
against a bank of 50,000 x 342, beside pytorch-ood. Ours and theirs take turns; each figure is the
median of `--rounds`, without compilation. `--out` writes everything as JSON.
"""

import functools
import importlib.util
import json
import os
import resource
import statistics
import sys
import time
import types

from absl import flags

from jaxood.errors import UserError, unknown
from jaxood.main import read_flags, run_command

FLAGS = flags.FlagValues()
flags.DEFINE_list('suite', ['scores'], 'classifiers, scores, or both.', flag_values=FLAGS)
flags.DEFINE_list('weights', [], 'Checkpoints for --suite=classifiers.', flag_values=FLAGS)
flags.DEFINE_integer('rounds', 3, 'How often each is measured.', flag_values=FLAGS)
flags.DEFINE_integer('bank', 50_000, 'Training images of the scores.', flag_values=FLAGS)
flags.DEFINE_integer('queries', 27_763, 'Images to score.', flag_values=FLAGS)
flags.DEFINE_integer('dim', 342, 'Features of an image.', flag_values=FLAGS)
flags.DEFINE_string('out', None, 'JSON file to write.', flag_values=FLAGS)

CLASSES, BATCH = 10, 256


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for what the user can mend."""
    return run_command(parse, execute, sys.argv if argv is None else argv)


def parse(argv: list[str]):
    """The suites and their flags."""
    rest = read_flags(FLAGS, argv, __doc__)
    if rest:
        raise UserError(f'{rest[0]!r} is not a flag. All arguments start with --.')
    for name in FLAGS.suite:
        if name not in SUITES:
            raise UserError(unknown(f'--suite={name}', name, SUITES))
    if 'classifiers' in FLAGS.suite and not FLAGS.weights:
        raise UserError('--suite=classifiers needs --weights=CHECKPOINT, the networks to measure.')
    return FLAGS.suite, FLAGS.out


def execute(suites, out) -> None:
    """Runs the suites, prints a table of each, and writes what was measured."""
    measured = {name: list(SUITES[name]()) for name in suites}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == 'darwin' else 1024
    )
    for name, rows in measured.items():
        _print(name, rows)
    print(f'peak memory {peak / 2**30:.2f} GiB, {os.cpu_count()} CPU cores')
    if out:
        with open(out, 'w') as f:
            json.dump(measured | {'peak_bytes': peak, 'cpu_count': os.cpu_count()}, f, indent=2)


def classifiers():
    """Rows of images/s."""
    import jax  # noqa: PLC0415 - `--help` need not wait for it
    import numpy as np  # noqa: PLC0415

    from jaxood.models import pretrained  # noqa: PLC0415

    for path in FLAGS.weights:
        found = pretrained.load(path)
        model, size = found.build(), found.preprocessing.size
        channels = len(found.preprocessing.mean)
        x = np.random.default_rng(0).normal(size=(BATCH, size, size, channels)).astype(np.float32)
        forward = jax.jit(lambda v, x, model=model: model.apply(v, x, train=False)['logits'])
        ours = functools.partial(lambda f, *a: jax.block_until_ready(f(*a)), forward)
        variables = jax.device_put(found.variables)
        theirs = _torch_forward(path, found, x)
        a, b = _take_turns(functools.partial(ours, variables, x), theirs)
        yield {
            'what': f'{os.path.basename(path)} ({found.backbone["name"]}), images/s',
            'ours': BATCH / a,
            'peer': 'PyTorch, channels last',
            'theirs': None if b is None else BATCH / b,
            'ratio': None if b is None else b / a,
        }


def _torch_forward(path, found, x):
    """The same network in PyTorch, or None where it is not installed or the weights are ours."""
    if importlib.util.find_spec('torch') is None or os.path.isdir(path):
        return None
    import torch  # noqa: PLC0415

    from jaxood.models import pretrained, torch_originals  # noqa: PLC0415

    original = torch_originals.ORIGINALS[found.backbone['name']]
    state = {k: torch.from_numpy(v.copy()) for k, v in pretrained.read(path).items()}
    last = torch.channels_last
    state = {k: v.to(memory_format=last) if v.ndim == 4 else v for k, v in state.items()}
    images = torch.from_numpy(x.transpose(0, 3, 1, 2)).contiguous(memory_format=last)
    keywords = {k: v for k, v in found.backbone.items() if k != 'name'}

    def forward():
        with torch.inference_mode():
            return original(state, keywords, images)

    return forward


def scores():
    """Rows of seconds to fit and to score, then their sums over what both have."""
    import numpy as np  # noqa: PLC0415

    from jaxood import parallel  # noqa: PLC0415
    from jaxood.scores import SCORES  # noqa: PLC0415
    from jaxood.stages.parts import networks  # noqa: PLC0415

    bank, head = _features(FLAGS.bank, seed=0)
    queries, _ = _features(FLAGS.queries, seed=1)
    network = networks.Network(None, {'params': {'head': head}}, {}, '', parallel.setup(), BATCH)
    peers = _pytorch_ood(head)
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
            a, b = _take_turns(mine, other)
            if what == 'fit' and a < 1e-4:
                continue  # there is nothing to fit
            if b is not None:
                sums[what][0] += a
                sums[what][1] += b
            yield _seconds(f'{name}, {what}', a, b)
    for what, (a, b) in sums.items():
        if b:
            yield _seconds(f'sum of those that both have, {what}', a, b)


def _features(count, seed):
    """ReLU features of ten overlapping classes, and the logits of a linear head on them."""
    import numpy as np  # noqa: PLC0415

    rng = np.random.default_rng(0)
    means = rng.normal(size=(CLASSES, FLAGS.dim)) - 1.0
    scale = 2.0 / FLAGS.dim**0.5  # logits of a few units, most of them right
    kernel, bias = scale * means.T, -0.5 * scale * np.square(np.maximum(means, 0)).sum(axis=1)
    head = {'kernel': kernel.astype(np.float32), 'bias': bias.astype(np.float32)}
    rng = np.random.default_rng([1, seed])
    labels = rng.integers(CLASSES, size=count).astype(np.int32)
    h = np.maximum(means[labels] + rng.normal(size=(count, FLAGS.dim)), 0).astype(np.float32)
    logits = h @ head['kernel'] + head['bias']
    return {'logits': logits, 'features': h, 'labels': labels}, head


def _pytorch_ood(head):
    """Our score -> a function that makes pytorch-ood's -> (bank, queries) -> (fit, score)."""
    found = importlib.util.find_spec('pytorch_ood')
    if found is None or importlib.util.find_spec('torch') is None:
        return {}
    import torch  # noqa: PLC0415

    package = types.ModuleType('pytorch_ood')  # its own __init__ wants torchvision, for data sets
    package.__path__ = list(found.submodule_search_locations)
    sys.modules.setdefault('pytorch_ood', package)
    from pytorch_ood import detector as d  # noqa: PLC0415

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

    half = FLAGS.dim // 2
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


def _take_turns(ours, theirs):
    """Median seconds of both, measured alternately; None for what is not there."""
    times = ([], [])
    for f in (ours, theirs):
        if f is not None:
            f()  # warm
    for _ in range(FLAGS.rounds):
        for f, into in zip((ours, theirs), times):
            if f is not None:
                started = time.perf_counter()
                f()
                into.append(time.perf_counter() - started)
    return tuple(statistics.median(t) if t else None for t in times)


def _seconds(what, ours, theirs):
    ratio = None if theirs is None else theirs / ours
    peer = '' if theirs is None else 'pytorch-ood'
    return {'what': f'{what}, s', 'ours': ours, 'peer': peer, 'theirs': theirs, 'ratio': ratio}


def _print(name, rows):
    print(f'\n{name}\n{"":<50}{"ours":>12}{"theirs":>12}{"x faster":>10}  beside')
    for row in rows:
        cells = [row['ours'], row['theirs'], row['ratio']]
        text = ['-' if c is None else f'{c:.4g}' for c in cells]
        print(f'{row["what"]:<50}{text[0]:>12}{text[1]:>12}{text[2]:>10}  {row["peer"]}')


SUITES = {'classifiers': classifiers, 'scores': scores}

if __name__ == '__main__':
    sys.exit(main())
