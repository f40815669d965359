"""Real CIFAR-10 and SVHN images through the same chain, where JAXOOD_TEST_DATA has them."""

import csv
import runpy

import numpy as np
import pytest
import tiny

from jaxood import main


@pytest.fixture(scope='module')
def mini(real_data, tmp_path_factory):
    """Plain NPZ files of the first few images of each class."""
    folder = tmp_path_factory.mktemp('mini')
    unpack = runpy.run_path(str(real_data / 'unpack.py'))
    unpack['main'](
        str(folder), '--mini', 'cifar10_train', 'cifar10_test', 'ood_svhn', 'ood_textures'
    )
    return folder


@pytest.mark.slow
def test_cifar10_goes_through_with_the_same_code(mini, tmp_path):
    config = tiny.config(
        'cifar10',
        data__root=str(mini),
        generator__multipliers=(1, 1, 1),  # attention in the middle is at 8 x 8, not 32 x 32
        filter__name='none',  # a dozen steps make no judges
    )
    main.execute(config, str(tmp_path))
    with open(tmp_path / 'results.csv') as f:
        rows = list(csv.DictReader(f))
    counts = {row['ood_dataset']: (row['n_id'], row['n_ood']) for row in rows}
    assert counts['svhn'] == ('1000', '500')
    assert counts['textures'] == ('1000', '500')
    assert {row['arm'] for row in rows} == set(config.arms)
    values = np.array([[float(row[k]) for k in ('auroc', 'fpr95_id', 'id_acc')] for row in rows])
    assert np.all((values >= 0) & (values <= 1))
