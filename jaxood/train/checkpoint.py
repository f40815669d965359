"""Saving and restoring train states and weights, by Orbax, which has all hosts save together."""

import contextlib
import os
import re
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxood.train.state import TrainState


class Checkpoints:
    """The latest train state in a folder. Orbax finishes a checkpoint before it counts as one, so
    a kill leaves the one before. A state is copied at once and written while training goes on."""

    def __init__(self, folder: epath.Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=True)
        self.folder = folder
        self.manager = ocp.CheckpointManager(folder, options=options)

    def save(self, step: int, state: TrainState) -> None:
        with _writing(self.folder, state):
            self.manager.save(step, args=ocp.args.StandardSave(state._asdict()))

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


def save_weights(folder: epath.Path, weights: Any) -> None:
    """Writes a pytree of dicts of arrays, e.g. `{'params': ..., 'batch_stats': ...}`."""
    with _writing(folder.parent, weights), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, weights, force=True)
        checkpointer.wait_until_finished()


def load_weights(folder: epath.Path) -> Any:
    """Reads what `save_weights` wrote, as host arrays of one copy, on any number of devices."""
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(folder).item_metadata.tree
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
        )
        return checkpointer.restore(folder, target)


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
