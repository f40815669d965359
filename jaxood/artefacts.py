"""What a run leaves behind, and what it finds there: folders named by what made them.

`artefacts/<stage>/<fingerprint>/` holds one stage's result. The fingerprint hashes everything the
result depends on, so two arms that agree up to a stage share its folder without being told to, and
a changed setting makes a new folder beside the old one. The result exists when its `done.json`
does, which is written last; until then the folder holds checkpoints or shards and is resumed.

Several hosts (`hosts`) call all of this together. The first of them writes, and all go on when what
it wrote is visible to each; what is there already, the first decides.
"""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from jaxood import hosts
from jaxood.errors import UserError

DONE = 'done.json'


class Artefact:
    """One stage's folder."""

    def __init__(self, stage: str, fingerprint: str, folder: epath.Path):
        self.stage = stage
        self.fingerprint = fingerprint
        self.folder = folder

    @property
    def done(self) -> dict[str, Any] | None:
        """The facts given to `finish`, or None while the result is unfinished."""
        path = self.folder / DONE
        return json.loads(path.read_text()) if exists(path) else None

    def finish(self, **facts: Any) -> None:
        """Declares the result complete. Nothing may be written after this."""
        write(self.folder / DONE, json.dumps(facts, indent=2, sort_keys=True) + '\n')

    def __truediv__(self, name: str) -> epath.Path:
        return self.folder / name


class Store:
    """All artefacts below one folder, of this workdir alone or shared by several."""

    def __init__(self, root: str | os.PathLike):
        self.root = epath.Path(root)

    def find(self, stage: str, fingerprint: str) -> Artefact:
        """The artefact's place, whether or not anything is there yet. Creates nothing."""
        return Artefact(stage, fingerprint, self.root / stage / fingerprint)

    def seconds(self, stage: str) -> float | None:
        """How long this stage took when it last ran here, for the estimate of a run."""
        return self.mean(stage, 'seconds')

    def mean(self, stage: str, fact: str) -> float | None:
        """The mean of one of the facts of a stage's results here; None where none has it."""
        found = []
        folder = self.root / stage
        for path in folder.iterdir() if folder.exists() else ():
            if (path / DONE).exists():
                found.append(json.loads((path / DONE).read_text()).get(fact))
        found = [value for value in found if value is not None]
        return sum(found) / len(found) if found else None


def place(path: str | os.PathLike) -> epath.Path:
    """A folder as the user names it: `~` expanded, and absolute, which Orbax asks for."""
    path = os.fspath(path)
    return epath.Path(path if '://' in path else os.path.abspath(os.path.expanduser(path)))


def exists(path: epath.Path) -> bool:
    """Whether a file or folder is there, as the first host sees it; others wait to see it too."""
    there = hosts.agree(path.exists())
    if there:
        hosts.wait_for(path)
    return there


def write(path: epath.Path, content: str | bytes) -> None:
    """Writes a small file so that it is there whole or not at all, also after a kill."""
    with _by_one(path) as mine:
        if mine:
            _write(path, content)


def write_parts(path: epath.Path, parts: Iterable[str]) -> None:
    """The same for a text that comes in parts, in constant memory; one of several hosts takes them:
    they are read, not computed on all devices."""
    with _by_one(path) as mine:
        if mine:
            with _whole(path) as f:
                for part in parts:
                    f.write(part.encode())


@contextlib.contextmanager
def _by_one(path: epath.Path) -> Iterator[bool]:
    """Whether this host is to write the file. Afterwards it is there for all."""
    yield hosts.first()
    hosts.barrier()
    hosts.wait_for(path)


def remove(folder: epath.Path, *patterns: str) -> None:
    """Removes folders inside of one, if there are any."""
    if hosts.first():
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.rmtree(missing_ok=True)
    hosts.barrier()


def _write(path, content):
    with _whole(path) as f:
        f.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def _whole(path):
    """A binary file that takes its name when all is written. (Object stores put whole objects.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _is_local(path):
        try:
            with path.open('wb') as f:
                yield f
        except BaseException:
            path.unlink(missing_ok=True)  # closing has put what there was of it
            raise
        return
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        with open(part, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        e.filename = os.fspath(path)  # a failed write does not say where
        raise
    finally:  # on a full disk half a file would only be in the way
        part.unlink(missing_ok=True)


def save(path: epath.Path, **arrays: np.ndarray) -> None:
    """Writes an .npz like `write` does: whole or not at all."""
    with _by_one(path) as mine:
        if mine:
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            _write(path, buffer.getvalue())


def load(path: epath.Path, *names: str) -> dict[str, np.ndarray]:
    """Reads what `save` wrote: all of it, or the arrays that are named."""
    with path.open('rb') as f, np.load(f, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names or arrays}


def save_rows(path: epath.Path, parts: Iterable[np.ndarray], count: int) -> None:
    """Writes an .npy of `count` rows that come in parts, as `write_parts` does."""
    with _by_one(path) as mine:
        if mine:
            parts = iter(parts)
            first = np.ascontiguousarray(next(parts))
            header = np.lib.format.header_data_from_array_1_0(first)
            header['shape'] = (count, *first.shape[1:])
            with _whole(path) as f:
                np.lib.format.write_array_header_1_0(f, header)
                for part in itertools.chain([first], parts):
                    f.write(np.ascontiguousarray(part).data)


def load_rows(path: epath.Path) -> np.ndarray:
    """Reads what `save_rows` wrote: a read-only memory map where the file is local."""
    if not _is_local(path):
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return np.load(os.fspath(path), mmap_mode='r', allow_pickle=False)


def load_table(folder: epath.Path) -> dict[str, np.ndarray]:
    """The columns that lie in a folder, one a file, as `load_rows` reads them."""
    names = hosts.agree(sorted(path.name for path in folder.glob('*.npy')))
    return {name.removesuffix('.npy'): load_rows(folder / name) for name in names}


@contextlib.contextmanager
def lock(folder: epath.Path) -> Iterator[None]:
    """Holds a folder for this process, or for all hosts that run together. The system lets go when
    the process ends, however it ends.

    Object stores (gs://, s3://) have no locks: their users see to it that one run at a time works
    in a workdir. Two that do make the same artefacts, and each file is put whole.

    Raises:
        UserError: another process holds it.
    """
    with contextlib.ExitStack() as held:
        with hosts.one_for_all():
            if hosts.first():
                held.enter_context(_hold(folder))
        yield


@contextlib.contextmanager
def _hold(folder):
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_local(folder):
        yield
        return
    import fcntl

    with open(folder / '.lock', 'a+') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise UserError(
                f'{folder} is in use by another jaxood process ({f.read().strip() or "unknown"}). '
                'Wait for it to end, stop it, or choose another --workdir.'
            ) from None
        f.truncate(0)
        f.write(f'process {os.getpid()}')
        f.flush()
        yield


def _is_local(path: epath.Path) -> bool:
    return '://' not in os.fspath(path)
