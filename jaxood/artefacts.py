"""What a run leaves behind, and what it finds there: folders named by what made them.

`artefacts/<stage>/<fingerprint>/` holds one stage's result. The fingerprint hashes everything the
result depends on, so two arms that agree up to a stage share its folder without being told to, and
a changed setting makes a new folder beside the old one. The result exists when its `done.json`
does, which is written last; until then the folder holds checkpoints or shards and is resumed.
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
        return json.loads(path.read_text()) if path.exists() else None

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
            facts = Artefact(stage, path.name, path).done
            if facts and fact in facts:
                found.append(facts[fact])
        return sum(found) / len(found) if found else None


def place(path: str | os.PathLike) -> epath.Path:
    """A folder as the user names it: `~` expanded, and absolute, which Orbax asks for."""
    path = os.fspath(path)
    return epath.Path(path if '://' in path else os.path.abspath(os.path.expanduser(path)))


def write(path: epath.Path, content: str | bytes) -> None:
    """Writes a small file so that it is there whole or not at all, also after a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    if not _is_local(path):  # object stores put whole objects
        path.write_bytes(content)
        return
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        with open(part, 'wb') as f:
            f.write(content)
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
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write(path, buffer.getvalue())


def load(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads what `save` wrote."""
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
        return dict(arrays)


def save_rows(path: epath.Path, parts: Iterable[np.ndarray], count: int) -> None:
    """Writes an .npy of rows that come in parts, in constant memory: whole or not at all."""
    parts = iter(parts)
    first = next(parts)
    if not _is_local(path):
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([first, *parts]))
        write(path, buffer.getvalue())
        return
    part_file = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        rows = np.lib.format.open_memmap(
            part_file, mode='w+', dtype=first.dtype, shape=(count, *first.shape[1:])
        )
        at = 0
        for part in itertools.chain([first], parts):
            rows[at : at + len(part)] = part
            at += len(part)
        rows.flush()
        os.replace(part_file, path)
    finally:
        part_file.unlink(missing_ok=True)


def load_rows(path: epath.Path) -> np.ndarray:
    """Reads what `save_rows` wrote: a read-only memory map where the file is local."""
    if not _is_local(path):
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return np.load(os.fspath(path), mmap_mode='r', allow_pickle=False)


@contextlib.contextmanager
def lock(folder: epath.Path) -> Iterator[None]:
    """Holds a folder for this process. The system lets go when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_local(folder):  # object stores have no locks; their users start one run a folder
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
