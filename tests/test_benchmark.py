"""Known figures come out: public checkpoints on real images, where JAXOOD_TEST_DATA has them."""

import csv
import runpy

import numpy as np
import pytest

from jaxood import main, metrics

SETS = ('svhn', 'lsun9_crop', 'lsun9_resize', 'textures', 'places', 'cifar100')
SCORES = dict(msp={}, maxlogit={}, energy={})
FILES = ('cifar10_train', 'cifar10_test', *(f'ood_{k}' for k in SETS[:-1]), 'cifar100_test_half')
# ResNet-20 (akamaster), all images: FPR95-ID / AUROC in percent of MSP, max-logit, energy, measured
# with PyTorch (README of the data).
RESNET20 = {
    'svhn': ((71.50, 88.88), (69.57, 87.44), (70.52, 87.30)),
    'lsun9_crop': ((61.84, 90.83), (27.52, 95.68), (27.42, 95.79)),
    'lsun9_resize': ((68.78, 87.87), (45.90, 91.80), (45.70, 91.85)),
    'textures': ((68.00, 87.93), (49.33, 90.16), (49.67, 90.17)),
    'places': ((69.09, 87.23), (45.82, 91.40), (45.54, 91.47)),
    'cifar100': ((72.66, 85.93), (57.38, 88.04), (57.68, 88.04)),
}


def benchmark(root, weights, workdir):
    """(score, OOD set) -> row of results.csv, in percent; the page is made, too."""
    config = main.load_config('configs/benchmark.py:cifar10')
    config.data.root, config.weights = str(root), str(weights)
    with config.unlocked():
        config.scores = SCORES
    config.report.draws, config.report.tsne = 20, False
    main.execute(config, str(workdir))
    assert (workdir / 'report.html').stat().st_size > 10_000
    with open(workdir / 'results.csv') as f:
        return {(row['method'], row['ood_dataset']): row for row in csv.DictReader(f)}


def unpacked(real_data, folder, *flags):
    runpy.run_path(str(real_data / 'unpack.py'))['main'](str(folder), *flags, *FILES)
    return folder


@pytest.mark.slow
def test_resnet20_in_full(real_data, tmp_path):
    root = unpacked(real_data, tmp_path / 'data')
    rows = benchmark(root, real_data / 'ckpt_resnet20_cifar10.npz', tmp_path / 'run')
    assert float(rows['msp', 'svhn']['id_acc']) == 0.9173  # published: 8.27 % wrong
    for name, cells in RESNET20.items():
        for method, (fpr, auroc) in zip(SCORES, cells):
            row = rows[method, name]
            assert row['n_id'] == '10000'
            # the reference's MSP is a float32 softmax: a quarter of the ID images tie at 1
            near = 0.1 if method == 'msp' else 0.05
            assert 100 * float(row['auroc']) == pytest.approx(auroc, abs=near + 0.005), name
            two_images = max(0.1, 200 / int(row['n_ood']))
            assert 100 * float(row['fpr95_id']) == pytest.approx(fpr, abs=two_images + 0.005), name


@pytest.mark.slow
def test_densenet_on_the_small_sets_is_the_reference(real_data, tmp_path):
    """From pixels through our network to the metrics, beside those of PyTorch's own logits."""
    root = unpacked(real_data, tmp_path / 'data', '--mini')
    rows = benchmark(root, real_data / 'ckpt_densenet100_cifar10.npz', tmp_path / 'run')
    with np.load(real_data / 'ref_densenet100_cifar10_mini.npz') as arrays:
        logits = {k: arrays[f'{k}_logits'].astype(float) for k in ('cifar10_test', *SETS)}
    with np.load(root / 'cifar10_test.npz') as arrays:
        right = logits['cifar10_test'].argmax(-1) == arrays['labels']
    lse = lambda z: np.log(np.exp(z).sum(-1))
    formulas = dict(
        msp=lambda z: lse(z) - z.max(-1), maxlogit=lambda z: -z.max(-1), energy=lambda z: -lse(z)
    )
    assert float(rows['msp', 'svhn']['id_acc']) == pytest.approx(right.mean(), abs=1e-9)
    for method, score in formulas.items():
        a = score(logits['cifar10_test'])
        for name in SETS:
            row, b = rows[method, name], score(logits[name])
            assert float(row['auroc']) == pytest.approx(metrics.auroc(a, b), abs=5e-4)
            assert float(row['fpr95_id']) == pytest.approx(metrics.fpr95_id(a, b), abs=4e-3)


def test_a_variant_is_named_in_words():
    for variant in ('cifar10', 'cifar100,features', 'imagenet'):
        config = main.load_config(f'configs/benchmark.py:{variant}')
        assert config.report.score in config.scores
        assert ('odin' in config.scores) == ('features' not in variant)
    with pytest.raises(main.ConfigError, match="Did you mean 'cifar10'"):
        main.load_config('configs/benchmark.py:cifar101')
    with pytest.raises(main.ConfigError, match="stands 'features', or nothing"):
        main.load_config('configs/benchmark.py:cifar10,feature')
