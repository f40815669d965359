"""A result is there whole or not at all, and belongs to one process at a time."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from jaxood import artefacts, console
from jaxood.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def test_looking_for_an_artefact_creates_nothing(folder):
    artefact = artefacts.Store(folder).find('score', 'abc')
    assert artefact.folder == folder / 'score' / 'abc'
    assert artefact.done is None
    assert list(folder.iterdir()) == []


def test_finishing_is_the_last_thing_written(folder):
    store = artefacts.Store(folder)
    artefact = store.find('score', 'abc')
    artefacts.save(artefact / 'part/scores.npz', score=np.arange(3))
    assert store.find('score', 'abc').done is None
    artefact.finish(seconds=2.0, images_per_s=10)
    assert store.find('score', 'abc').done == {'seconds': 2.0, 'images_per_s': 10}


def test_the_estimate_is_the_mean_of_what_it_took(folder):
    store = artefacts.Store(folder)
    assert store.seconds('score') is None
    for name, seconds in (('a', 2.0), ('b', 4.0)):
        store.find('score', name).finish(seconds=seconds)
    (store.find('score', 'c') / 'shards').mkdir(parents=True)  # unfinished
    store.find('other', 'd').finish(seconds=100.0)
    assert store.seconds('score') == 3.0


def test_arrays_come_back(folder):
    arrays = {'x': np.arange(6, dtype=np.uint8).reshape(2, 3), 'y': np.float32([0.1, np.nan])}
    artefacts.save(folder / 'deep/er/a.npz', **arrays)
    back = artefacts.load(folder / 'deep/er/a.npz')
    assert set(back) == {'x', 'y'}
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_pickles_are_not_read(folder):
    np.savez(folder / 'a.npz', x=np.array([{}], object))
    with pytest.raises(ValueError, match='allow_pickle'):
        artefacts.load(folder / 'a.npz')


@pytest.mark.parametrize('fails', ['fsync', 'replace'])
def test_a_failed_write_leaves_the_old_file_and_no_other(folder, monkeypatch, fails):
    artefacts.write(folder / 'a.json', 'old')

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match=f'No space left on device: .*{folder.name}/a.json'):
        artefacts.write(folder / 'a.json', 'new')
    assert [p.name for p in folder.iterdir()] == ['a.json']
    assert (folder / 'a.json').read_text() == 'old'


def test_a_folder_has_one_owner(folder):
    with artefacts.lock(folder / 'run'):
        with (
            pytest.raises(UserError, match=rf'in use by another .*\(process {os.getpid()}\)'),
            artefacts.lock(folder / 'run'),
        ):
            raise AssertionError('two owners')
        with artefacts.lock(folder / 'other'):
            pass
    with artefacts.lock(folder / 'run'):  # given back
        pass


def test_the_owners_death_frees_the_folder(folder):
    code = (
        'import fcntl, sys, time; f = open(sys.argv[1], "a+"); fcntl.flock(f, fcntl.LOCK_EX); '
        'print("held", flush=True); time.sleep(60)'
    )
    command = [sys.executable, '-c', code, str(folder / '.lock')]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == 'held\n'
        with pytest.raises(UserError, match='unknown'), artefacts.lock(folder):
            raise AssertionError('two owners')
        owner.send_signal(signal.SIGKILL)
    with artefacts.lock(folder):
        assert (folder / '.lock').read_text() == f'process {os.getpid()}'


@pytest.fixture
def bucket():
    """An object store: `s3://` paths that end in this process's memory."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = ('s3',)
        store, pseudo_dirs = {}, ['']

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix('s3://'))

    fsspec.register_implementation('s3', Bucket, clobber=True)
    return artefacts.place('s3://bucket/run')


def test_an_object_store_holds_artefacts_as_a_disk_does(bucket):
    made = artefacts.Store(bucket / 'artefacts').find('score', 'abc')
    assert made.done is None
    with artefacts.lock(made.folder):  # there is none to hold
        artefacts.write(made / 'a.txt', 'x')
        artefacts.write_parts(made / 'lines.txt', iter(['a\n', 'b\n']))
        artefacts.save(made / 'b.npz', x=np.arange(3), y=np.ones(2))
        parts = iter([np.ones((2, 2), np.uint8), np.zeros((1, 2), np.uint8)])
        artefacts.save_rows(made / 'table/x.npy', parts, 3)
        made.finish(seconds=2.0)
    assert made.done == {'seconds': 2.0}
    assert (made / 'a.txt').read_text() + (made / 'lines.txt').read_text() == 'xa\nb\n'
    assert artefacts.load(made / 'b.npz', 'y')['y'].tolist() == [1, 1]
    assert artefacts.load_table(made / 'table')['x'].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert artefacts.Store(bucket / 'artefacts').seconds('score') == 2.0
    log = console.Log(made / 'log.jsonl')
    for step in range(2):
        log.write({'step': step})
    assert console.read_log(made / 'log.jsonl') == [{'step': 0}, {'step': 1}]
    artefacts.remove(made.folder, 'table')
    assert artefacts.load_table(made / 'table') == {}
