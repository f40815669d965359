"""Several hosts: one program, started on all of them, that acts as one.

`start` joins the hosts, by JAX's own distributed runtime, before anything looks at a device; from
then on `jax.devices()` are those of all hosts, and a step on arrays over all of them runs on all of
them. With one process nothing of this does anything, nor imports JAX.

How the work is divided:

* All hosts walk through the same lines in the same order. What is computed on the devices is split
  by rows over the devices of all hosts (`parallel`): training batches, candidates, feature passes.
  Each host reads and feeds its own rows; results come back to all.
* Host 0 writes what there is one of: artefacts, records, the report, the log and what a human
  reads. All hosts see the workdir and read from it; a file written is there for all before any goes
  on (`artefacts`). Training states are written by Orbax, each host its part.
* What decides where the program goes (is a shard there already?) host 0 looks up for all (`agree`):
  file systems on a network do not show everything to everyone at once.
* When a host fails or is killed, the others cannot go on. They notice by its closed connection, or
  by its missing heartbeat, say so, and end. Started again, all go on from what was finished.

A function here that speaks with other hosts must be called by all of them.
"""

import contextlib
import importlib.util
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from jaxood import console
from jaxood.errors import UserError

HEARTBEAT = 60  # seconds without a sign of life after which a host counts as lost
PATIENCE = 60.0  # seconds until a file that host 0 has written must be visible from all
ENVIRONMENT = {  # of each flag, as launchers of JAX programs set it
    'coordinator': 'JAX_COORDINATOR_ADDRESS',
    'num_processes': 'JAX_NUM_PROCESSES',
    'process_id': 'JAX_PROCESS_ID',
}
CLUSTERS = {'SLURM_PROCID': 'SLURM_NTASKS', 'OMPI_COMM_WORLD_RANK': 'OMPI_COMM_WORLD_SIZE'}
LOST = (  # in what JAX says when a host is gone
    *('gloo', 'nccl', 'connection reset', 'connection closed', 'socket closed', 'coordination'),
    *('heartbeat', 'barrier', 'unavailable:', 'deadline_exceeded'),
)

_index, _count = 0, 1  # of this process, and of all, once they have met


def define_flags(known: flags.FlagValues = flags.FLAGS) -> list[flags.FlagHolder]:
    """The flags of a command that several hosts can run together; `start` takes their values."""
    return [
        flags.DEFINE_string(
            'coordinator',
            None,
            'Host and free port of process 0, for several hosts: 10.0.0.1:1234. '
            'Slurm, Open MPI, TPU VMs and indexed Kubernetes jobs tell it themselves.',
            flag_values=known,
        ),
        flags.DEFINE_integer(
            'num_processes', None, 'How many processes run together.', flag_values=known
        ),
        flags.DEFINE_integer(
            'process_id', None, 'Which of them this is, from 0.', flag_values=known
        ),
    ]


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Meets the other processes, if there are any, before a device is touched.

    Args:
        coordinator: 'HOST:PORT' of process 0; unset, the environment or the cluster tells.
        num_processes: of all hosts together.
        process_id: of this one, 0..num_processes - 1.

    Raises:
        UserError: flags that do not belong together, a port in use, hosts that do not come.
    """
    global _index, _count
    given = _given(coordinator, num_processes, process_id)
    if not given and not _in_cluster():
        return
    import jax  # noqa: PLC0415 - heavy, and not needed by a process on its own

    if not jax.distributed.is_initialized():
        if given.get('process_id') == 0:
            _check_port(given['coordinator_address'])
        try:
            jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT)
        except ValueError as e:
            if given or 'coordinator_address' not in str(e):
                raise UserError(f'the hosts cannot be joined: {e}') from e
            return  # a machine of a kind that forms clusters, and in none
        except RuntimeError as e:  # jaxlib's own errors are RuntimeErrors too
            place = given.get('coordinator_address', 'the address that the cluster names')
            raise UserError(
                f'the hosts did not meet at {place}: {str(e).splitlines()[0]} Start all of them '
                'with the same --coordinator and --num_processes, each with its own '
                '--process_id, and let the port be free and open between them.'
            ) from e
    _index, _count = jax.process_index(), jax.process_count()
    if not first():
        console.mute()


def count() -> int:
    """How many processes run this program together."""
    return _count


def index() -> int:
    """Which of them this is, from 0."""
    return _index


def first() -> bool:
    """Whether this is the process that writes what there is one of."""
    return _index == 0


def agree(value: Any) -> Any:
    """The value that host 0 has, on all hosts. Anything that JSON can say."""
    return gather(value)[0]


def gather(value: Any) -> list[Any]:
    """The values that all hosts have, by their numbers. Anything that JSON can say."""
    if _count == 1:
        return [value]
    import numpy as np  # noqa: PLC0415
    from jax.experimental import multihost_utils  # noqa: PLC0415

    text = json.dumps(value).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    size = max(256, 1 << (int(lengths.max()) - 1).bit_length())  # few shapes, few programs
    texts = multihost_utils.process_allgather(
        np.frombuffer(text.ljust(size), np.uint8), tiled=False
    )
    return [json.loads(row.tobytes()) for row in texts]


def barrier() -> None:
    """Returns when all hosts have come here."""
    if _count > 1:
        gather(None)


def wait_for(path) -> None:
    """Returns when a file that host 0 sees is visible from this one too.

    Raises:
        UserError: it does not appear.
    """
    until = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            raise UserError(
                f'{path} was written by host 0 and is not visible from host {_index}. Hosts share '
                'one workdir: a network folder that all mount at the same place, or gs://.'
            )
        time.sleep(0.05)


@contextlib.contextmanager
def one_for_all():
    """What the user can mend on one host ends all of them, with the same message.

    Raises:
        UserError: of this host or another; of another with its number.
    """
    error = None
    try:
        yield
    except UserError as e:
        error = e
        if _count == 1:
            raise
    found = gather(None if error is None else str(error))
    for number, message in enumerate(found):
        if message is not None:
            raise UserError(f'host {number}: {message}') from error


def compare(facts: Mapping[str, Any]) -> None:
    """Raises UserError unless all hosts hold the same facts: which differ, in which, and how."""
    everyone = gather(facts)
    lines = []
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        values = [theirs.get(name) for theirs in everyone]
        for number, value in enumerate(values):
            if value != values[0]:
                lines.append(f'host {number} has {name}={value!r}, host 0 {values[0]!r}')
    if lines:
        more = f'; and {len(lines) - 8} more' if len(lines) > 8 else ''
        raise UserError(
            f'the hosts do not run the same: {"; ".join(lines[:8])}{more}. Start all of them with '
            'the same command, packages and data.'
        )


def check_folder(folder) -> None:
    """Raises UserError unless all hosts see what host 0 writes into a folder."""
    if _count == 1:
        return
    if os.fspath(folder).startswith('s3://'):
        raise UserError(
            f'{folder}: several hosts save together in gs:// or in a folder that all have mounted. '
            'Choose such a --workdir, or one host.'
        )
    probe = folder / f'.seen-by-all.{agree(f"{os.getpid()}-{time.time_ns()}")}'
    with one_for_all():
        if first():
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text('A host that can read this shares the workdir of host 0.\n')
    until, seen = time.monotonic() + 10.0, probe.exists()
    while not seen and time.monotonic() < until:
        time.sleep(0.05)
        seen = probe.exists()
    blind = [str(number) for number, there in enumerate(gather(seen)) if not there]
    if first():
        probe.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f'{folder} of host 0 is not visible from host {", ".join(blind)}. Give a --workdir '
            'that all hosts share: a network folder mounted at the same place, or gs://.'
        )


@contextlib.contextmanager
def noticing():
    """Makes an error that the end of another host has caused a `UserError` that says so."""
    try:
        yield
    except (RuntimeError, ValueError) as e:  # what JAX raises, as it happens
        text = str(e)
        if _count == 1 or not any(word in text.lower() for word in LOST):
            raise
        raise UserError(
            f'host {_index} of {_count} has lost another host, which was stopped or failed; its '
            f'own output says why ({text.splitlines()[0][:200]}). Start all hosts again with the '
            'same command: they go on where they were.'
        ) from e


def run(main: Callable[[], int]) -> None:
    """Runs a command and ends the process with its exit code.

    After a failure a process leaves at once: on its way out Python would wait for the other hosts,
    which wait for this one.
    """
    try:
        code = main()
    except Exception:
        if _count == 1:
            raise
        traceback.print_exc()
        code = 1
    if _count > 1 and code != 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _given(coordinator, num_processes, process_id) -> dict[str, Any]:
    """What flags and environment say, as `jax.distributed.initialize` names it; {} for nothing."""
    values = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
    for name, variable in ENVIRONMENT.items():
        if values[name] is None and (text := os.environ.get(variable)):
            if name != 'coordinator' and not text.isdecimal():
                raise UserError(f'{variable}={text!r} must be a whole number.')
            values[name] = text if name == 'coordinator' else int(text)
    if values['num_processes'] == 1 or all(v is None for v in values.values()):
        return {}
    if _in_cluster() and values['num_processes'] is None and values['process_id'] is None:
        return {'coordinator_address': values['coordinator']}  # the cluster tells the rest
    missing = [f'--{name}' for name, value in values.items() if value is None]
    if missing:
        raise UserError(
            f'{" and ".join(missing)} not set, for several hosts. All three belong together: '
            '--coordinator=HOST:PORT --num_processes=N --process_id=I.'
        )
    host, colon, port = values['coordinator'].rpartition(':')
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f'--coordinator={values["coordinator"]} must be HOST:PORT, as 10.0.0.1:1234.'
        )
    if not 0 <= values['process_id'] < values['num_processes']:
        raise UserError(
            f'--process_id={values["process_id"]} must lie in 0..{values["num_processes"] - 1} '
            f'for --num_processes={values["num_processes"]}.'
        )
    return {
        'coordinator_address': values['coordinator'],
        'num_processes': values['num_processes'],
        'process_id': values['process_id'],
        'cluster_detection_method': 'deactivate',  # each process keeps the devices that it sees
    }


def _in_cluster() -> bool:
    """Whether JAX should look for a cluster: a job of several processes, or a TPU machine.

    Asked for in vain, its detection would look for Kubernetes' interface, or leave one GPU of many
    to a job of one task.
    """
    for rank, size in CLUSTERS.items():
        if rank in os.environ and os.environ.get(size, '1') != '1':
            return True
    if 'KUBERNETES_SERVICE_HOST' in os.environ and 'JOB_COMPLETION_INDEX' in os.environ:
        return True
    chips = os.path.exists('/dev/accel0') or os.path.exists('/dev/vfio')
    wanted = 'tpu' in os.environ.get('JAX_PLATFORMS', 'tpu')
    return wanted and chips and importlib.util.find_spec('libtpu') is not None


def _check_port(address: str) -> None:
    """Raises UserError if something listens on the port that process 0 is to open."""
    port = int(address.rpartition(':')[2])
    with socket.socket() as probe:
        try:
            probe.bind(('', port))
        except OSError as e:
            raise UserError(
                f'--coordinator={address}: port {port} cannot be opened on this host '
                f'({e.strerror}). Choose another free one, the same on all hosts; any from 1024 to '
                '65535 will do.'
            ) from e
