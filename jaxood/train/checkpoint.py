"""Saving and restoring train states and weights, by Orbax, which has all hosts save together.

Orbax writes to local and mounted folders and to gs://. What is meant for another store of objects
it writes to a local folder, whose files are then copied there.
"""

import contextlib
import os
import re
import tempfile
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxood import hosts
from jaxood.errors import UserError
from jaxood.train.state import TrainState


class Checkpoints:
    """The latest train state in a folder. Orbax finishes a checkpoint before it counts as one, so
    a kill leaves the one before. A state is copied at once and written while training goes on."""

    def __init__(self, folder: epath.Path):
        self.staged = None if _by_orbax(folder) else Staged(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=True)
        self.folder = folder
        place = folder if self.staged is None else self.staged.place
        self.manager = ocp.CheckpointManager(place, options=options)

    def save(self, step: int, state: TrainState) -> None:
        with _writing(self.folder, state):
            self.manager.save(step, args=ocp.args.StandardSave(state._asdict()))
            if self.staged is not None:
                self.manager.wait_until_finished()
                self.staged.send(str(step))

    def restore(self, like: TrainState) -> TrainState | None:
        """The latest state, placed as `like` is (also on another number of devices), or None."""
        step = self.manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        return TrainState(**self.manager.restore(step, args=ocp.args.StandardRestore(target)))

    def close(self) -> None:
        """Waits until the last state is written."""
        with _mending(self.folder):
            self.manager.wait_until_finished()
        self.manager.close()
        if self.staged is not None:
            self.staged.close()


class Staged:
    """A local folder whose finished parts are copied to a store of objects, and come from there.

    A part counts when the file that is named after it is there, which is written last.

    Raises:
        UserError: several hosts, which do not see each other's local folders.
    """

    def __init__(self, folder: epath.Path):
        if hosts.count() > 1:
            raise UserError(
                f'{folder}: several hosts save together on gs:// or a mounted folder only. Choose '
                'such a --workdir, or one host.'
            )
        self.folder = folder
        self.local = tempfile.TemporaryDirectory(prefix='jaxood-')
        self.place = epath.Path(self.local.name)
        for mark in folder.glob('*.complete') if folder.exists() else ():
            part = mark.name.removesuffix('.complete')
            _copy(folder / part, self.place / part)

    def send(self, part: str) -> None:
        """Copies a part to the store, and removes the others from there."""
        before = [*self.folder.glob('*.complete')]
        _copy(self.place / part, self.folder / part)
        (self.folder / f'{part}.complete').write_text('')
        for mark in before:
            if mark.name != f'{part}.complete':
                mark.unlink()
                (self.folder / mark.name.removesuffix('.complete')).rmtree()

    def close(self) -> None:
        self.local.cleanup()


def save_weights(folder: epath.Path, weights: Any) -> None:
    """Writes a pytree of dicts of arrays, e.g. `{'params': ..., 'batch_stats': ...}`."""
    if not _by_orbax(folder):
        with tempfile.TemporaryDirectory(prefix='jaxood-') as local:
            save_weights(epath.Path(local) / folder.name, weights)
            _copy(epath.Path(local) / folder.name, folder)
        return
    with _writing(folder.parent, weights), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, weights, force=True)
        checkpointer.wait_until_finished()


def load_weights(folder: epath.Path) -> Any:
    """Reads what `save_weights` wrote, as host arrays of one copy, on any number of devices."""
    if not _by_orbax(folder):
        with tempfile.TemporaryDirectory(prefix='jaxood-') as local:
            _copy(folder, epath.Path(local) / folder.name)
            return load_weights(epath.Path(local) / folder.name)
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(folder).item_metadata.tree
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
        )
        return checkpointer.restore(folder, target)


def _by_orbax(folder):
    """Whether Orbax can write there itself."""
    scheme, store, _ = os.fspath(folder).partition('://')
    return not store or scheme == 'gs'


def _copy(source, target):
    """Copies a folder with all that is in it."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())


@contextlib.contextmanager
def _writing(folder, tree):
    """Makes a disk that is full or read-only an OSError, as everywhere else.

    Orbax raises a ValueError that quotes the system's error number, after pages of log. So the room
    is claimed first, for a moment; that error remains for a disk that fills up meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if '://' not in os.fspath(folder) and hasattr(os, 'posix_fallocate'):
        probe = folder / f'.room.{os.getpid()}'
        try:
            with open(probe, 'wb') as f:
                needed = sum(x.nbytes for x in jax.tree.leaves(tree))
                os.posix_fallocate(f.fileno(), 0, int(1.1 * needed) + 2**20)
        except OSError as e:
            raise OSError(e.errno, os.strerror(e.errno), os.fspath(folder)) from e
        finally:
            probe.unlink(missing_ok=True)
    with _mending(folder):
        yield


@contextlib.contextmanager
def _mending(folder):
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        yield
    except ValueError as e:
        number = re.search(r"os_error_code='(\d+)'", str(e))
        if number is None:
            raise
        number = int(number[1])
        raise OSError(number, os.strerror(number), os.fspath(folder)) from e
    finally:
        absl.logging.set_verbosity(verbosity)
