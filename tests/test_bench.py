"""The bench runs small, with and without something to stand beside."""

import json

import pytest

from jaxood import bench
from jaxood.scores import SCORES


@pytest.fixture(autouse=True)
def _forgotten():
    """Flags outlive a call of `main`, which a process makes only once."""
    yield
    for name in bench.FLAGS:
        bench.FLAGS[name].unparse()


def test_every_score_of_outputs_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, 'find_spec', lambda name: None)  # no PyTorch
    out = tmp_path / 'bench.json'
    small = ['--bank=400', '--queries=50', '--dim=12', '--rounds=1']
    assert bench.main(['bench', *small, f'--out={out}']) == 0
    measured = json.loads(out.read_text())
    rows = {row['what']: row for row in measured['scores']}
    for name, entry in SCORES.items():
        assert (f'{name}, score, s' in rows) == (entry.needs in ('logits', 'features'))
    assert all(row['ours'] > 0 and row['theirs'] is None for row in rows.values())
    assert measured['peak_bytes'] > 2**20
    assert 'knn, score, s' in capsys.readouterr().out


def test_ours_and_theirs_take_turns(monkeypatch):
    order = []
    bench.FLAGS(['bench', '--rounds=2'])
    a, b = bench._take_turns(lambda: order.append('a'), lambda: order.append('b'))
    assert order == ['a', 'b'] * 3  # the first time warms up
    assert a >= 0
    assert b >= 0


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--suite=scors'], "Did you mean 'scores'"),
        (['--suite=classifiers'], '--weights=CHECKPOINT'),
        (['--rouds=2'], "Did you mean 'rounds'"),
        (['scores'], "'scores' is not a flag"),
    ],
)
def test_flags_that_are_refused(more, message, capsys):
    assert bench.main(['bench', *more]) == 2
    assert message in capsys.readouterr().err
