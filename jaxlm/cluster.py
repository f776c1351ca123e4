"""Which job this process is one of: what flags say, else what Slurm, a JobSet, Open MPI or a TPU VM says, else it is alone.

    flags                           --coordinator=HOST:PORT --processes=N --process=I
    Slurm, in a step of srun        SLURM_STEP_NUM_TASKS
    a TPU slice or several of them  TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES, MEGASCALE_NUM_SLICES (GKE), else, where there
                                    are TPU chips, the machine's metadata (worker-network-endpoints)
    a JobSet that gke.py made       JOBSET_NAME, JOBSET_JOB, JOBSET_PROCESSES; JOB_COMPLETION_INDEX
    another Indexed Job             JOB_COMPLETION_INDEX
    Open MPI                        OMPI_COMM_WORLD_SIZE

Here it is decided whether there is a job of several processes, before jax is imported; who they are jax's own cluster detection says.
"""
import dataclasses
import os
import urllib.error
import urllib.request
from collections.abc import Mapping

from absl import flags

from jaxlm.errors import UsageError

PORT = 8476
METADATA = '/computeMetadata/v1/instance/attributes/worker-network-endpoints'


@dataclasses.dataclass(frozen=True)
class Job:
  """A job of several processes, and which of them this is. method: jax's name of the cluster that knows what is None here."""
  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  method: str | None = None
  devices: tuple[int, ...] | None = None  # of this machine's, those of this process; None: all that it sees


def define(f: flags.FlagValues) -> None:
  """Flags of a command that several processes may run together."""
  flags.DEFINE_string('coordinator', None, 'of a run of several processes: HOST:PORT where process 0 listens (default: as Slurm, a '
                      'JobSet, Open MPI or the TPU VM says)', flag_values=f)
  flags.DEFINE_integer('processes', None, 'how many there are', flag_values=f)
  flags.DEFINE_integer('process', None, 'which of them this is, from 0', flag_values=f)
  flags.DEFINE_integer('heartbeat_seconds', 60, 'a process that gives no sign for so long is dead, and the others end',
                       lower_bound=1, flag_values=f)
  flags.DEFINE_integer('join_seconds', 300, 'for all processes to join', lower_bound=1, flag_values=f)
  flags.DEFINE_integer('lead_seconds', 7200, 'for what process 0 does while the others wait: data, a slower compilation',
                       lower_bound=1, flag_values=f)
  flags.DEFINE_boolean('elastic', False, 'experimental: of a run of several processes that loses one (not process 0), the others go on '
                       'without it, on a smaller mesh, from the newest checkpoint', flag_values=f)


def find(coordinator: str | None, processes: int | None, process: int | None, env: Mapping[str, str] = os.environ) -> Job | None:
  """The job of flags, or of the environment; None: this process is alone. UsageError if they do not fit together."""
  given = {'coordinator': coordinator, 'processes': processes, 'process': process}
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if len(missing) == 3:
    return _surroundings(env)
  if processes == 1 and coordinator is None and not process:
    return None  # alone, whatever the environment says
  if missing:
    said = ' '.join(f'--{name}={value}' for name, value in given.items() if value is not None)
    raise UsageError(f'{said}: wants {" and ".join(missing)} too, or none of the three')
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise UsageError(f'--coordinator={coordinator}: wants HOST:PORT of process 0, as 10.0.0.2:{PORT}')
  if processes < 1:
    raise UsageError(f'--processes={processes}: wants 1 or more')
  if not 0 <= process < processes:
    raise UsageError(f'--process={process}: processes of --processes={processes} are 0 to {processes - 1}')
  return Job(coordinator, processes, process) if processes > 1 else None


def _surroundings(env: Mapping[str, str]) -> Job | None:
  for look in (_slurm, _tpu, _jobset, _indexed, _open_mpi):
    if job := look(env):
      return job
  return None


def _slurm(env) -> Job | None:
  if 'SLURM_STEP_NODELIST' not in env or 'SLURM_PROCID' not in env or _count(env, 'SLURM_STEP_NUM_TASKS') < 2:
    return None
  one_a_node = env['SLURM_STEP_NUM_TASKS'] == env['SLURM_STEP_NUM_NODES']
  return Job(method='slurm', devices=_devices(env, env['SLURM_LOCALID'], one_a_node))


def _open_mpi(env) -> Job | None:
  if _count(env, 'OMPI_COMM_WORLD_SIZE') < 2:
    return None
  if 'OMPI_MCA_orte_hnp_uri' not in env:
    raise UsageError('Open MPI 5 does not say where process 0 is; pass --coordinator=HOST:PORT --processes=$OMPI_COMM_WORLD_SIZE '
                     '--process=$OMPI_COMM_WORLD_RANK, expanded by a shell that mpirun starts')
  one_a_node = env.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1'
  return Job(method='ompi', devices=_devices(env, env['OMPI_COMM_WORLD_LOCAL_RANK'], one_a_node))


def _devices(env, local: str, one_a_node: bool) -> tuple[int, ...] | None:
  """Of several processes on a machine each has the GPU of its number, unless the launcher shows it no more than one."""
  return None if one_a_node or len(env.get('CUDA_VISIBLE_DEVICES', '0,1').split(',')) == 1 else (int(local),)


def _jobset(env) -> Job | None:
  if 'JOBSET_NAME' not in env or 'JOBSET_PROCESSES' not in env:
    return None
  count, name = _count(env, 'JOBSET_PROCESSES'), env['JOBSET_NAME']
  job, own = _count(env, 'JOBSET_JOB'), _count(env, 'JOB_COMPLETION_INDEX')
  each = _count(env, 'JOBSET_PROCESSES_A_JOB')
  if count < 2:
    return None
  return Job(f'{name}-workers-0-0.{name}:{PORT}', count, job * each + own)


def _indexed(env) -> Job | None:
  if 'KUBERNETES_SERVICE_HOST' not in env or 'JOB_COMPLETION_INDEX' not in env:
    return None
  try:
    import kubernetes  # pylint: disable=g-import-not-at-top,unused-import  # jax asks the cluster with it
  except ImportError as e:
    raise UsageError('this pod is one of an Indexed Job, whose others jax finds with a package that is missing; pip install '
                     'kubernetes, or pass --coordinator, --processes and --process (--processes=1: alone)') from e
  return Job(method='k8s')


def _tpu(env) -> Job | None:
  """Of TPUs, unless JAX_PLATFORMS excludes them."""
  if 'tpu' not in env.get('JAX_PLATFORMS', 'tpu'):
    return None
  slices = int(env.get('MEGASCALE_NUM_SLICES') or 1)
  names = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES')
  if names:
    return Job(method='gketpu') if slices > 1 or len(names.split(',')) > 1 else None
  if 'TPU_SKIP_MDS_QUERY' in env or not _chips():
    return None
  return Job(method='gcetpu') if slices > 1 or len(_metadata(env).split(',')) > 1 else None


def _chips() -> int:
  """TPU chips on this machine."""
  from jax._src import hardware_utils  # pylint: disable=g-import-not-at-top  # as jax itself counts them
  return hardware_utils.num_available_tpu_chips_and_device_id()[0]


def _metadata(env) -> str:
  """The workers of a TPU VM's slice; '' where none are said."""
  host = env.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(f'http://{host}{METADATA}', headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(request, timeout=10) as answer:
      return answer.read().decode()
  except urllib.error.HTTPError as e:
    if e.code == 404:
      return ''
    raise UsageError(f'this machine has TPU chips, and its metadata says {e}; pass --coordinator, --processes and --process '
                     '(--processes=1: alone)') from e
  except OSError as e:
    raise UsageError(f'this machine has TPU chips, and its metadata cannot be read ({e}); pass --coordinator, --processes and '
                     '--process (--processes=1: alone)') from e


def _count(env, name: str) -> int:
  """A number of the environment; 0 if it is not there. UsageError if it is none."""
  value = env.get(name, '0')
  if not value.isdigit():
    raise UsageError(f'{name}={value}: wants a number; mend the environment, or pass --coordinator, --processes and --process')
  return int(value)
