"""Several processes, one run: how they join, what one does for all, how they stop together, and how none waits for ever.

1. All join (`joined`) before a device is touched; process 0 hosts the coordination service, at the address that was named.
2. Process 0 is the lead: it alone prints, writes logs and builds the data, while the others wait (`lead_first`), with a deadline.
   An error that it meets there is an error of all.
3. All must mean the same run: `same` compares what each has.
4. SIGTERM to any one of them is seen by all, at the same step (`preempted`).
5. A process that dies ends the others: the coordination service aborts them (SIGABRT) within --heartbeat_seconds, or a collective
   fails, which is PeerLost. With --elastic they go on without it (elastic.py).
6. Who ends with an error waits for the others for a moment (they may have met the same one), not until they are done.

A process that is alone passes through all of this untouched.
"""
import contextlib
import dataclasses
import functools
import hashlib
import ipaddress
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback

import jax
from jax._src import clusters, distributed
from jax.sharding import NamedSharding

from jaxlm import elastic, metrics
from jaxlm.cluster import Job
from jaxlm.errors import BY_CODE, JaxlmError, PeerLost, UsageError

GRACE = 10  # seconds that a process with an error waits for the others
# By their defaults XLA's CPU collectives give up after 30 or 40 seconds, which a busy machine may well take to compile.
PATIENCE = {'--xla_cpu_collective_timeout_seconds': 600, '--xla_cpu_collective_call_terminate_timeout_seconds': 600}
LOST = ('gloo', 'nccl', 'connection', 'socket closed', 'coordination', 'heartbeat', 'unavailable', 'deadline_exceeded', 'peer')


@dataclasses.dataclass(frozen=True)
class Waits:
  """Seconds: until a peer that gives no sign is dead; for all to join; for what the lead prepares."""
  heartbeat: int = 60
  join: int = 300
  lead: int = 7200


_waits = Waits()
_watch: elastic.Watch | None = None
_turns: dict[str, int] = {}


@contextlib.contextmanager
def joined(job: Job | None, waits: Waits = Waits(), survive: bool = False):
  """Within, this process is one of the job's. It does not return from an error: the process ends with its exit code, or if it
  may survive the loss of another, begins anew (elastic.py)."""
  if job is None:
    yield
    return
  global _waits, _watch
  _waits = waits
  job = _asked(job, waits)
  _join(job, waits, survive)
  if survive:
    _watch = elastic.Watch(job, waits.heartbeat)
  if job.process:
    metrics.console.quiet = True
  try:
    yield
  except JaxlmError as e:
    _leave(e.code, f'jaxlm: {e}')
  except Exception as e:  # pylint: disable=broad-except
    if isinstance(e, jax.errors.JaxRuntimeError) and any(word in str(e).lower() for word in LOST):
      _leave(PeerLost.code, f'jaxlm: process {job.process} of {job.processes}: a peer is lost: {_line(e)}')
    _leave(1, f'jaxlm: process {job.process} of {job.processes}:\n{traceback.format_exc()}')
  if _watch:  # recoverable processes do not wait for each other as they leave
    _watch.end()
  jax.distributed.shutdown()


def _join(job: Job, waits: Waits, survive: bool) -> None:
  if survive:
    jax.config.update('jax_enable_recoverability', True)
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_nccl_terminate_on_error=false'.strip()
  if os.environ.get('JAX_PLATFORMS') == 'cpu' or 'JAX_NUM_CPU_DEVICES' in os.environ:
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = ' '.join([flags, *(f'{name}={n}' for name, n in PATIENCE.items() if name not in flags)]).strip()
  bind = None
  if job.process == 0:
    bind = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS') or own_address(job.coordinator)
  devices = None if job.devices is None else list(job.devices)
  late = threading.Timer(waits.join, _late, [job, waits])
  late.daemon = True
  late.start()
  jax.distributed.initialize(
      job.coordinator, job.processes, job.process, local_device_ids=devices, cluster_detection_method='deactivate',
      coordinator_bind_address=bind, initialization_timeout=waits.join + GRACE, heartbeat_timeout_seconds=waits.heartbeat,
      shutdown_timeout_seconds=waits.heartbeat)
  late.cancel()


def _late(job: Job, waits: Waits) -> None:
  """Ends a process whose peers did not come, where jaxlib would abort it with a stack trace."""
  print(f'jaxlm: process {job.process} of {job.processes}: not all have joined at {job.coordinator} after {waits.join} s '
        '(--join_seconds). Start all of them, with the same --coordinator, which all must reach', file=sys.stderr, flush=True)
  os._exit(PeerLost.code)


def _asked(job: Job, waits: Waits) -> Job:
  """The job with what jax's detection knows of it."""
  if job.method is None:
    return job
  try:
    coordinator, processes, process, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, job.devices, job.method, waits.join)
  except Exception as e:  # pylint: disable=broad-except  # whatever the cluster's interface raises
    raise UsageError(f'the {job.method} cluster does not say who is in this job ({_line(e)}); pass --coordinator, --processes and '
                     '--process') from e
  if None in (coordinator, processes, process):
    raise UsageError(f'the {job.method} cluster does not say who is in this job; pass --coordinator, --processes and --process')
  return dataclasses.replace(job, coordinator=coordinator, processes=processes, process=process)


def own_address(coordinator: str) -> str:
  """HOST:PORT → IP:PORT of the interface that has this name, for process 0 to listen on, and on no other. UsageError if none has."""
  host, _, port = coordinator.rpartition(':')
  try:
    found = socket.getaddrinfo(host.strip('[]'), int(port), type=socket.SOCK_STREAM)
  except OSError as e:
    raise UsageError(f'--coordinator={coordinator}: this machine does not know {host} ({e}); name an address of process 0') from e
  for family, _, _, _, address in found:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
      try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
      except OSError as e:
        reason = e.strerror
        continue
    if ipaddress.ip_address(address[0]).is_loopback and host not in ('localhost', address[0], f'[{address[0]}]'):
      metrics.say(f'{host} is {address[0]} on this machine, where only its own processes can join; for others name its address')
    return f'[{address[0]}]:{port}' if family == socket.AF_INET6 else f'{address[0]}:{port}'
  raise UsageError(f'--coordinator={coordinator}: process 0 cannot listen there ({reason}); name an address and a free port of its '
                   'machine, or set JAX_COORDINATOR_BIND_ADDRESS')


def _client():
  """Of the coordination service, which has no public face; None for a process that is alone."""
  return distributed.global_state.client


def process() -> int:
  """Which of the job's this is. jax.process_index says the same, but touches devices, and on the way waits for all processes."""
  return distributed.global_state.process_id


def count() -> int:
  """Processes of the job."""
  return distributed.global_state.num_processes or 1


def lead() -> bool:
  """True in the process that prints and writes for all."""
  return process() == 0


def alone() -> bool:
  return _client() is None


def lead_first(what: str, run):
  """run(), by the lead first; once it is done there, by the others. Its JaxlmError is everybody's."""
  if alone():
    return run()
  key = f'jaxlm/{_turn(what)}'
  if lead():
    try:
      result = run()
    except JaxlmError as e:
      _client().key_value_set(key, f'{e.code} {e}')
      raise
    except BaseException as e:
      _client().key_value_set(key, f'1 {what}: {_line(e)}')
      raise
    _client().key_value_set(key, '0 ')
    return result
  code, _, text = _value(key, f'{what}, which process 0 prepares').partition(' ')
  if code != '0':
    raise BY_CODE.get(int(code), JaxlmError)(text)
  return run()


def same(what: str, value: str) -> None:
  """UsageError in a process whose `value` is not the lead's."""
  if alone():
    return
  key, digest = f'jaxlm/same/{_turn(what)}', hashlib.sha256(value.encode()).hexdigest()
  if lead():
    _client().key_value_set(key, digest)
  elif _value(key, f'the {what} of process 0') != digest:
    raise UsageError(f'process {process()}: its {what} is not that of process 0; start all processes with the same command '
                     'and code, and a workdir that all share')


def everyone(what: str, value: str) -> list[str]:
  """What each process has for `value`, in their order. All must ask, as often as each other."""
  if alone():
    return [value]
  key = f'jaxlm/everyone/{_turn(what)}'
  _client().key_value_set(f'{key}/{process()}', value)
  return [_value(f'{key}/{n}', f'{what} of process {n}') for n in range(count())]


def meet(what: str) -> None:
  """Returns when all processes are here."""
  if not alone():
    try:
      _client().wait_at_barrier(f'jaxlm/meet/{_turn(what)}', _waits.lead * 1000)
    except jax.errors.JaxRuntimeError as e:
      raise PeerLost(f'process {process()}: not all processes came to {what} within {_waits.lead} s: {_line(e)}') from e


def _turn(what: str) -> str:
  """A key for the n-th time that processes, all alike, come to `what`."""
  _turns[what] = _turns.get(what, 0) + 1
  return f'{what}/{_turns[what]}'


def share(path: pathlib.Path) -> None:
  """UsageError in a process that does not see `path`, which the lead has written."""
  if alone():
    return
  meet('the workdir')
  end = time.monotonic() + GRACE  # a network's file system may need a moment
  while not path.exists() and time.monotonic() < end:
    time.sleep(0.5)
  seen = path.exists()
  meet('the workdir, which all have seen')
  if not seen:
    raise UsageError(f'--workdir={path.parent}: process {process()} does not see what process 0 wrote there; name a folder on storage that '
                     'all processes share')


def _value(key: str, words: str) -> str:
  try:
    return _client().blocking_key_value_get(key, _waits.lead * 1000)
  except jax.errors.JaxRuntimeError as e:
    raise PeerLost(f'process {process()}: waited {_waits.lead} s (--lead_seconds) for {words}: {_line(e)}') from e


def preempted(step: int) -> bool:
  """True in all processes at one same step, once one of them had SIGTERM. To be asked at each step."""
  if alone():
    return False
  from jax.experimental import multihost_utils  # pylint: disable=g-import-not-at-top
  return multihost_utils.reached_preemption_sync_point(step)


def signals() -> tuple[int, ...]:
  """Those that Python handles: SIGTERM of several processes is the coordination service's (see `preempted`)."""
  return (signal.SIGINT, signal.SIGTERM) if alone() else (signal.SIGINT,)


def fetch(tree):
  """Arrays → numpy, each of them whole in each process. All processes must ask."""
  return jax.device_get(jax.tree.map(_whole, tree))


def _whole(a):
  if a.is_fully_addressable or a.is_fully_replicated:
    return a
  return _gather(a.sharding.mesh)(a)


@functools.cache
def _gather(mesh):
  return jax.jit(lambda a: a, out_shardings=NamedSharding(mesh, jax.P()))


def _leave(code: int, text: str) -> None:
  """Ends this process with `code`; what all have to say, the lead says alone."""
  if _watch:
    if code == PeerLost.code:
      _watch.verdict()
    _watch.over()
  sys.stdout.flush()
  if lead():
    print(text, file=sys.stderr, flush=True)
  said = None
  try:
    if lead():
      _client().key_value_set('jaxlm/said', text)
    _client().wait_at_barrier('jaxlm/leave', GRACE * 1000)
    said = _client().blocking_key_value_get('jaxlm/said', GRACE * 1000)
  except Exception:  # pylint: disable=broad-except  # the others are not coming: they are in a collective, or gone
    pass
  if not lead() and said != text:
    print(text, file=sys.stderr, flush=True)
  if said is not None:
    if _watch and lead():
      _watch.last()
    jax.distributed.shutdown()
  os._exit(code)


def _line(e: BaseException) -> str:
  return (str(e).strip() or type(e).__name__).splitlines()[0][:300]
