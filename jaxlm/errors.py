"""Errors that a person can mend, each with the exit code of the command line.

| code | meaning                                                        |
|------|----------------------------------------------------------------|
| 0    | done                                                           |
| 2    | usage or config                                                |
| 3    | checkpoints exist and none is good (never a silent step 0)     |
| 10   | preempted, saved                                               |
| 11   | a peer of a run of several processes is lost                   |
| 12   | hang: no step for watchdog.seconds                             |
| 13   | storage                                                        |
| 14   | replicas differ                                                |
"""
import pathlib
import shlex
import sys


class JaxlmError(Exception):
  """One clear line: the key or file, the value, and the mend."""
  code = 1


class UsageError(JaxlmError):
  """A flag, config key, source or file that cannot be used as given."""
  code = 2


class CheckpointError(JaxlmError):
  """Checkpoints exist and none can be read."""
  code = 3


class HangError(JaxlmError):
  """No step was done for too long. Never raised: the watchdog exits with its code."""
  code = 12


class StorageError(JaxlmError):
  """The workdir or cache cannot be written."""
  code = 13


class ReplicaError(JaxlmError):
  """Devices that should hold the same bits do not."""
  code = 14


class Preempted(JaxlmError):
  """SIGINT or SIGTERM: what there was to save is saved."""
  code = 10


class PeerLost(JaxlmError):
  """Another process of the run is gone, or never came."""
  code = 11


BY_CODE = {error.code: error for error in (UsageError, CheckpointError, HangError, StorageError, ReplicaError, Preempted, PeerLost)}


def extra(name: str) -> str:
  """The command that installs an extra of this package, which no index of packages has: from the checkout that this code is of."""
  root = pathlib.Path(__file__).absolute().parent.parent
  if not (root / 'pyproject.toml').is_file():
    return f'install jaxlm again with its extra {name}: pip install \'WHERE IT CAME FROM[{name}]\''
  return shlex.join([sys.executable, '-m', 'pip', 'install', '--editable', f'{root}[{name}]'])
