"""A made-up experiment: Gaussian scores, so that which arm is better is known."""

import numpy as np
import pytest

from jaxood.report.tables import Scored

GROUPS = {'held_out': 'near', 'photos': 'far', 'noise': 'far'}


@pytest.fixture
def groups():
    return dict(GROUPS)


@pytest.fixture
def experiment():
    """Makes runs in which an arm's OOD scores lie `shifts[arm]` above its ID scores."""

    def make(shifts, *, seeds=(0, 1), methods=('energy', 'msp'), n=80):
        runs = []
        for arm, seed, method in ((a, s, m) for a in shifts for s in seeds for m in methods):
            rng = np.random.default_rng([seed, len(method)])  # all arms: the same images
            scores = {'test': rng.normal(size=n).astype(np.float32)}
            for k, name in enumerate(GROUPS):
                ood = rng.normal(size=n - 10 * k) + shifts[arm] + 0.2 * k
                scores[name] = ood.astype(np.float32)
            label = np.arange(n, dtype=np.int32) % 4
            pred = {'test': np.where(np.arange(n) < 5 + seed, (label + 1) % 4, label)}
            settings = {'b': 1, 'a': 2.5}
            runs.append(Scored(arm, seed, method, settings, scores, pred, label, 1.5, 0.25))
        return runs

    return make


@pytest.fixture
def runs(experiment):
    return experiment({'none': 0.5, 'diffusion': 2.0})


@pytest.fixture
def facts():
    """What the rows say about each run."""

    def make(runs):
        about = {'id_dataset': 'digits', 'backbone': 'wrn', 'training': 'oe', 'outliers': 'mix'}
        return {(s.arm, s.seed): about | {'run_id': f'{s.arm}-{s.seed}'} for s in runs}

    return make
