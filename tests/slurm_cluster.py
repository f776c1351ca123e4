"""A real Slurm of this one machine, for as long as a test wants it: munged, slurmctld and slurmd on loopback, in a folder of their own."""
import contextlib
import os
import pathlib
import secrets
import socket
import subprocess
import time

CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
JobRequeue=1
KillWait=15
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def _ports(count: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    found = [stack.enter_context(socket.socket()) for _ in range(count)]
    for s in found:
      s.bind(('127.0.0.1', 0))
    return [s.getsockname()[1] for s in found]


@contextlib.contextmanager
def cluster(folder: pathlib.Path):
  """Yields the environment in which sbatch, squeue and scancel speak to it. Whoever calls must be root."""
  folder.chmod(0o755)
  for name in ('state', 'spool'):
    (folder / name).mkdir()
  key = folder / 'munge.key'
  key.write_bytes(secrets.token_bytes(128))
  key.chmod(0o400)
  controller, daemon = _ports(2)
  conf = folder / 'slurm.conf'
  conf.write_text(CONF.format(folder=folder, controller=controller, daemon=daemon), encoding='utf-8')
  (folder / 'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n', encoding='utf-8')
  env = {**os.environ, 'SLURM_CONF': str(conf)}
  started = []

  def start(*words):
    log = open(folder / f'{pathlib.Path(words[0]).name}.out', 'ab')  # pylint: disable=consider-using-with
    started.append(subprocess.Popen(words, env=env, stdout=log, stderr=log))
  try:
    start('/usr/sbin/munged', '--foreground', '--force', f'--key-file={key}', f'--socket={folder}/munge.socket',
          f'--pid-file={folder}/munged.pid', f'--seed-file={folder}/munged.seed', f'--log-file={folder}/munged.log')
    _until(lambda: (folder / 'munge.socket').exists(), folder)
    start('/usr/sbin/slurmctld', '-D', '-f', str(conf))
    start('/usr/sbin/slurmd', '-D', '-f', str(conf), '-N', 'localhost')
    _until(lambda: 'idle' in subprocess.run(['sinfo', '--noheader', '--format=%T'], env=env, capture_output=True, text=True,
                                            check=False).stdout, folder)
    yield env
  finally:
    for process in reversed(started):
      process.terminate()
      try:
        process.wait(timeout=20)
      except subprocess.TimeoutExpired:
        process.kill()


def _until(condition, folder: pathlib.Path, seconds: float = 60) -> None:
  end = time.time() + seconds
  while not condition():
    if time.time() > end:
      raise TimeoutError('\n'.join(f'{p.name}: {p.read_text(errors="replace")[-1500:]}' for p in sorted(folder.glob('*.[lo][ou]*'))))
    time.sleep(0.2)
