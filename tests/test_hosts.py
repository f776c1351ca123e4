"""Several processes are one run: the same losses, one log; they stop together, and none outlives another for long."""
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxlm import cluster, hosts
from jaxlm.checkpoint import steps
from jaxlm.errors import UsageError
from tests import matrix

ENV = {**os.environ, 'PYTHON': sys.executable}
STEPS = 24
HEARTBEAT = 8


def command(texts, workdir):
  return ['train', f'--config=tests/configs/tiny.py:{texts}/*.txt', f'--workdir={workdir}', f'--config.steps={STEPS}',
          '--config.save_every=10', '--config.eval_every=12', '--config.mesh.fsdp=4', '--config.mesh.tensor=2', '--config.model.G=2']


def env(devices):
  return {**ENV, 'JAX_NUM_CPU_DEVICES': str(devices)}


def local(count, *words):
  return ['launch/local.sh', '-n', str(count), '--backoff=0.1', '--grace=30', *words, '--']


def lines(workdir):
  path = workdir / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []


def losses(workdir):
  """Of each step that was logged, in order."""
  return [(l['step'], l['loss' if 'loss' in l else 'heldout_loss']) for l in lines(workdir)]


def assert_same_run(workdir, other):
  found, wanted = losses(workdir), losses(other)
  assert [step for step, _ in found] == [step for step, _ in wanted] == sorted([*range(1, STEPS + 1), 12, 24])
  assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=1e-5)


def until(condition, *children, seconds=120):
  end = time.time() + seconds
  while not condition():
    assert all(child.poll() is None for child in children) and time.time() < end
    time.sleep(0.02)


def pid_of(parent: int, process: int) -> int:
  """Of the process that restart.py, which local.sh becomes, started as this one."""
  children = open(f'/proc/{parent}/task/{parent}/children', encoding='ascii').read().split()
  words = {int(pid): open(f'/proc/{pid}/cmdline', encoding='utf-8').read().split('\0') for pid in children}
  return next(pid for pid, each in words.items() if f'--process={process}' in each)


@pytest.fixture(scope='module')
def alone(texts, tmp_path_factory):
  """The run of one process with eight devices."""
  workdir = tmp_path_factory.mktemp('alone')
  out = subprocess.run([sys.executable, '-m', 'jaxlm', *command(texts, workdir)], env=env(8), capture_output=True, text=True, check=False)
  assert out.returncode == 0, out.stderr
  return workdir


@pytest.mark.parametrize('count', [2, pytest.param(4, marks=matrix.slow)])
def test_several_processes_are_one_run(texts, alone, tmp_path, count):
  out = subprocess.run([*local(count), *command(texts, tmp_path)], env=env(8 // count), capture_output=True, text=True, check=False)
  assert out.returncode == 0, out.stderr[-3000:]
  assert_same_run(tmp_path, alone)
  assert out.stdout.count('trained to step 24') == out.stdout.count('starts at step 0') == 1
  assert json.loads((tmp_path / 'config.json').read_text()) == json.loads((alone / 'config.json').read_text())


@matrix.slow
def test_a_signal_to_one_stops_both_a_kill_ends_the_other_and_the_run_goes_on(texts, alone, tmp_path):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  both = [subprocess.Popen(
      [sys.executable, '-m', 'jaxlm', *command(texts, tmp_path), f'--coordinator=127.0.0.1:{port}', '--processes=2', f'--process={i}'],
      env=env(4), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]
  until(lambda: len(lines(tmp_path)) >= 4, *both)
  both[1].send_signal(signal.SIGTERM)
  said = [child.communicate(timeout=60) for child in both]
  assert [child.returncode for child in both] == [10, 10], said
  saved = max(steps(tmp_path))
  assert 4 <= saved < 10 and f'saved step {saved} of {STEPS}' in said[0][1] and 'saved step' not in said[1][1]
  assert 'step ' not in said[1][0]

  with subprocess.Popen([*local(2, '--once'), *command(texts, tmp_path), f'--heartbeat_seconds={HEARTBEAT}'], env=env(4),
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
    until(lambda: lines(tmp_path)[-1]['step'] >= 12, child)
    os.kill(pid_of(child.pid, 1), signal.SIGKILL)
    killed = time.time()
    _, err = child.communicate(timeout=60)
  assert child.returncode == 137 and 'killed by SIGKILL' in err
  assert time.time() - killed < HEARTBEAT + 8

  out = subprocess.run([*local(2), *command(texts, tmp_path)], env=env(4), capture_output=True, text=True, check=False)
  assert out.returncode == 0 and 'goes on from step 10' in out.stdout, out.stderr[-3000:]
  assert_same_run(tmp_path, alone)


def worker(what):
  out = subprocess.Popen([sys.executable, 'launch/restart.py', '--once', '--workdir=none', '--processes=2', '--grace=30', '--',
                          sys.executable, '-m', 'tests.hosts_worker', what], env=env(4), stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
  said, err = out.communicate(timeout=120)
  return out.returncode, [json.loads(line) for line in said.splitlines() if line.startswith('{')], said, err


def test_each_reads_its_own_rows_and_an_error_of_the_lead_is_everybodys():
  code, seen, said, err = worker('together')
  assert code == 2 and err.count('data source: wrong') == 1 and 'Traceback' not in err, err
  assert said.count('the lead speaks') == 1
  assert sorted(s['asked'] for s in seen) == [[[0, 8]], [[8, 16]]]
  assert sorted(s['asked_apart'] for s in seen) == [[[0, 4], [8, 12]], [[4, 8], [12, 16]]], 'where its devices are not neighbours'
  whole = [[2 * (3 * row + k) for k in range(3)] for row in range(16)]
  assert all(s['sharded'] and s['same'] and s['whole'] == whole for s in seen)


@matrix.slow
def test_processes_of_different_configs_do_not_train():
  code, _, _, err = worker('another')
  assert code == 2 and 'process 1: its config is not that of process 0' in err


def test_a_workdir_that_is_not_shared_is_refused():
  code, _, _, err = worker('apart')
  assert code == 2 and 'process 1 does not see what process 0 wrote there' in err


def test_who_waits_in_vain_for_the_others_says_so(texts, tmp_path):
  out = subprocess.run([sys.executable, '-m', 'jaxlm', *command(texts, tmp_path), '--coordinator=127.0.0.1:1', '--processes=2',
                        '--process=1', '--join_seconds=2'], env=env(4), capture_output=True, text=True, check=False)
  assert out.returncode == 11 and 'process 1 of 2: not all have joined at 127.0.0.1:1 after 2 s' in out.stderr
  assert not (tmp_path / 'metrics.jsonl').exists()


BAD = {'--processes=2: wants --coordinator and --process too': (None, 2, None),
       '--coordinator=there:1: wants --processes and --process': ('there:1', None, None),
       '--coordinator=there: wants HOST:PORT': ('there', 2, 0),
       '--process=2: processes of --processes=2 are 0 to 1': ('there:1', 2, 2),
       '--processes=0: wants 1 or more': ('there:1', 0, 0)}


@pytest.mark.parametrize('message', BAD)
def test_flags_that_do_not_fit_together(message):
  with pytest.raises(UsageError, match=message):
    cluster.find(*BAD[message], {})


def test_an_address_that_is_not_this_machines_is_refused_before_a_device_is_touched():
  with pytest.raises(UsageError, match='--coordinator=192.0.2.1:80: process 0 cannot listen there'):
    hosts.own_address('192.0.2.1:80')
  assert hosts.own_address('127.0.0.1:8476') == hosts.own_address('localhost:8476') == '127.0.0.1:8476'


SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'tpu[03-04]', 'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_PROCID': '1',
         'SLURM_LOCALID': '0', 'SLURM_STEP_NUM_NODES': '2'}
MPI = {'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '3', 'OMPI_COMM_WORLD_LOCAL_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
       'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'}
JOBSET = {'JOBSET_NAME': 'llama', 'JOBSET_JOB': '1', 'JOBSET_PROCESSES': '8', 'JOBSET_PROCESSES_A_JOB': '4', 'JOB_COMPLETION_INDEX': '2'}
GKE = {'TPU_WORKER_HOSTNAMES': 'a-0.a,a-1.a', 'TPU_WORKER_ID': '1'}


def test_environments_that_say_who_is_in_the_job(monkeypatch):
  find = lambda env: cluster.find(None, None, None, env)
  assert find({}) is None and find({'SLURM_JOB_ID': '7', **{**SLURM, 'SLURM_STEP_NUM_TASKS': '1'}}) is None
  assert find(JOBSET) == cluster.Job('llama-workers-0-0.llama:8476', 8, 6)
  assert cluster.find(None, 1, None, SLURM) is None, 'told to be alone'
  for env, devices, job in ((SLURM, None, ('tpu03:61447', 2, 1)), (MPI, (1,), ('10.96.0.1:62624', 4, 3))):
    for name, value in env.items():
      monkeypatch.setenv(name, value)
    found = find(env)
    assert found.devices == devices
    asked = hosts._asked(found, hosts.Waits())  # of jax
    assert (asked.coordinator, asked.processes, asked.process) == job
    for name in env:
      monkeypatch.delenv(name)
  assert find({**SLURM, 'SLURM_STEP_NUM_NODES': '1', 'SLURM_LOCALID': '1'}).devices == (1,)
  assert find({**SLURM, 'SLURM_STEP_NUM_NODES': '1', 'CUDA_VISIBLE_DEVICES': '3'}).devices is None
  assert find(GKE).method == 'gketpu' and find({**GKE, 'TPU_WORKER_HOSTNAMES': 'a-0.a'}) is None
  assert find({**GKE, 'TPU_WORKER_HOSTNAMES': 'a-0.a', 'MEGASCALE_NUM_SLICES': '2'}).method == 'gketpu'
  assert find({**GKE, 'JAX_PLATFORMS': 'cpu'}) is None
  with pytest.raises(UsageError, match='Open MPI 5 does not say'):
    find({k: v for k, v in MPI.items() if 'orte' not in k})


def test_a_tpu_vm_asks_its_metadata(monkeypatch):
  attributes = {'worker-network-endpoints': 'x:y:127.0.0.1,x:y:10.0.0.3', 'agent-worker-number': '1', 'tpu-env': "ZONE: 'z'"}

  class Metadata(http.server.BaseHTTPRequestHandler):

    def do_GET(self):  # pylint: disable=invalid-name
      value = attributes.get(self.path.rpartition('/')[2])
      self.send_response(200 if value else 404)
      self.end_headers()
      self.wfile.write((value or '').encode())

    def log_message(self, *args):  # pylint: disable=arguments-differ
      pass
  with http.server.HTTPServer(('127.0.0.1', 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('GCE_METADATA_IP', f'127.0.0.1:{server.server_port}')
    env = {'GCE_METADATA_IP': f'127.0.0.1:{server.server_port}'}
    assert cluster.find(None, None, None, env) is None, 'no chips'
    monkeypatch.setattr(cluster, '_chips', lambda: 4)
    job = cluster.find(None, None, None, env)
    assert job == cluster.Job(method='gcetpu')
    from jax._src.clusters import cloud_tpu_cluster
    monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
    monkeypatch.delenv('TPU_SKIP_MDS_QUERY', raising=False)
    asked = hosts._asked(job, hosts.Waits(join=5))
    assert (asked.coordinator, asked.processes, asked.process) == ('127.0.0.1:8482', 2, 1)
    attributes['worker-network-endpoints'] = 'x:y:10.0.0.2'
    assert cluster.find(None, None, None, env) is None
    server.shutdown()
  with pytest.raises(UsageError, match='this machine has TPU chips, and its metadata cannot be read'):
    cluster.find(None, None, None, env)
