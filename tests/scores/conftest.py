"""The two worlds of toy.py, built once."""

import jax
import numpy as np
import pytest
from toy import HEAD, MEANS, D, K, Network, bank_of, outputs_through, plain_forward


@pytest.fixture(scope='session')
def gaussians():
    """(bank, sets, head): unit Gaussians around 5 e_c, and four kinds of outliers.

    An image is the feature vector in each of 2x2 pixels, plus noise that cancels in their mean, and
    passes through two stages unchanged.
    """
    rng = np.random.default_rng(0)
    n = 4000

    def near_a_class():
        labels = rng.integers(K, size=n)
        return MEANS[labels] + rng.normal(size=(n, D)), labels

    features, labels = near_a_class()
    orth, _ = near_a_class()
    orth[:, 10] += 6.0
    sets = {
        'id': near_a_class()[0],
        'mid': 0.5 * (MEANS[0] + MEANS[1]) + rng.normal(size=(n, D)),
        'orth': orth,
        'origin': rng.normal(size=(n, D)),
        'double': 2.0 * near_a_class()[0],
    }
    validation, validation_labels = near_a_class()
    identity = np.eye(D, dtype=np.float32)[None, None]
    std = np.ones(D, np.float32)
    network = Network((identity, identity), HEAD, std, activation=lambda x: x)
    head = HEAD | {'network': network}

    def outputs(h, labels=None):
        noise = rng.normal(size=(len(h), 2, 2, D))
        images = h[:, None, None, :] + noise - noise.mean(axis=(1, 2), keepdims=True)
        return outputs_through(images, head, labels)

    held_out = bank_of(outputs(validation, validation_labels), head)
    bank = bank_of(outputs(features, labels), head, validation=held_out)
    return bank, {name: outputs(h) for name, h in sets.items()}, head


@pytest.fixture(scope='session')
def network():
    """`head` of a random network: [B, 4, 6, 3] -> 5 channels -> 6 channels -> 4 classes.

    The bias is such that all classes are predicted.
    """
    rng = np.random.default_rng(1)
    kernels = (0.4 * rng.normal(size=(3, 3, 3, 5)), 0.4 * rng.normal(size=(3, 3, 5, 6)))
    kernels = tuple(map(np.float32, kernels))
    kernel = 3.0 * rng.normal(size=(6, 4))
    head = jax.tree.map(np.float32, {'kernel': kernel, 'bias': np.zeros(4)})
    std = np.float32([0.2, 0.25, 0.3])
    images = rng.normal(size=(200, 4, 6, 3))
    logits = plain_forward(Network(kernels, head, std), images)['logits']
    head['bias'] = np.float32(-logits.mean(axis=0))
    return head | {'network': Network(kernels, head, std)}


@pytest.fixture(scope='session')
def small(network):
    """(bank, outputs, head): 120 and 9 random images through that network."""
    rng = np.random.default_rng(2)
    images = rng.normal(size=(120, 4, 6, 3))
    predicted = outputs_through(images, network)['logits'].argmax(-1)
    labels = np.where(rng.random(120) < 0.7, predicted, rng.integers(4, size=120))
    bank = bank_of(outputs_through(images, network, labels), network)
    return bank, outputs_through(rng.normal(size=(9, 4, 6, 3)), network), network


@pytest.fixture(scope='session')
def densenet(real_data):
    """(bank, sets, head): a public CIFAR-10 DenseNet on real images, as PyTorch computed them."""
    reference = np.load(real_data / 'ref_densenet100_cifar10_mini.npz')
    weights = np.load(real_data / 'ckpt_densenet100_cifar10.npz')
    head = {'kernel': weights['fc.weight'].T, 'bias': weights['fc.bias']}

    def outputs(name):
        features = reference[f'{name}_features'].astype(np.float32)
        return {'logits': reference[f'{name}_logits'], 'features': features}

    names = [key.removesuffix('_logits') for key in reference if key.endswith('_logits')]
    sets = {name: outputs(name) for name in names}
    return sets.pop('cifar10_train'), sets, head
