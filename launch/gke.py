#!/usr/bin/env python3
"""A run on GKE as a JobSet: a headless service, by whose names the pods find each other, and a pod a host.

    launch/gke.py --name=llama --image=IMAGE --claim=PVC --tpu=tpu-v5p-slice --topology=4x4x4 [--slices=2] -- train … --workdir=/runs/R
    launch/gke.py --name=llama --image=IMAGE --claim=PVC --gpu=nvidia-h100-80gb --gpus=8 --hosts=16 -- train … --workdir=/runs/R

--image: has this tree in /jaxlm, and jaxlm installed. --claim: a ReadWriteMany volume, mounted at /runs. --chips: of TPU a host (4).
--dry-run: prints the command with its manifest, and runs nothing. It wants kubectl, and a cluster that has JobSet.

When a pod ends, all start again (--restarts times at most): preempted (10), lost (11), hung (12), storage (13) or killed. The exit codes
1, 2, 3, 4 and 14 are final for all. Process 0 counts the starts without a newer checkpoint, waits longer before each, and
ends with 4 at the fourth (launch/restart.py).
"""
import argparse
import math
import shlex
import subprocess
import sys

try:
  import yaml
except ImportError:
  sys.exit('gke: wants PyYAML, which jaxlm brings; start it with the interpreter that has jaxlm: .venv/bin/python launch/gke.py …')

PORT = 8476  # of jaxlm/cluster.py
FINAL = [1, 2, 3, 4, 14]
GRACE = 180  # seconds that a pod has to save


def _label(name: str) -> dict:
  return {'fieldRef': {'fieldPath': f"metadata.labels['{name}']"}}


def _script(command: list[str], state: str) -> str:
  run = shlex.join(['python3', '-m', 'jaxlm', *command])
  count = shlex.join(['python3', 'launch/restart.py', '--once', f'--state={state}', '--'])
  return f'cd /jaxlm\nif [ "$JOBSET_JOB-$JOB_COMPLETION_INDEX" = 0-0 ]; then\n  exec {count} {run}\nfi\nexec {run}\n'


def manifests(args, command: list[str]) -> list[dict]:
  """The service and the JobSet."""
  workdir = next(w.partition('=')[2] for w in command if w.startswith('--workdir='))
  env = [{'name': 'JOBSET_NAME', 'value': args.name}, {'name': 'JOBSET_PROCESSES', 'value': str(args.hosts * args.slices)},
         {'name': 'JOBSET_PROCESSES_A_JOB', 'value': str(args.hosts)},
         {'name': 'JOBSET_JOB', 'valueFrom': _label('jobset.sigs.k8s.io/job-index')}, {'name': 'PYTHONUNBUFFERED', 'value': '1'}]
  if args.tpu:
    limits = {'google.com/tpu': str(args.chips)}
    select = {'cloud.google.com/gke-tpu-accelerator': args.tpu, 'cloud.google.com/gke-tpu-topology': args.topology}
  else:
    limits, select = {'nvidia.com/gpu': str(args.gpus)}, {'cloud.google.com/gke-accelerator': args.gpu}
  pod = {
      'restartPolicy': 'Never', 'subdomain': args.name, 'terminationGracePeriodSeconds': GRACE, 'nodeSelector': select,
      'containers': [{
          'name': 'train', 'image': args.image, 'command': ['bash', '-c', _script(command, f'{workdir}/restart-{args.name}.json')],
          'env': env, 'ports': [{'containerPort': PORT}], 'resources': {'limits': limits, 'requests': dict(limits)},
          'volumeMounts': [{'name': 'runs', 'mountPath': '/runs'}, {'name': 'memory', 'mountPath': '/dev/shm'}]}],
      'volumes': [{'name': 'runs', 'persistentVolumeClaim': {'claimName': args.claim}},
                  {'name': 'memory', 'emptyDir': {'medium': 'Memory'}}]}
  job = {'parallelism': args.hosts, 'completions': args.hosts, 'completionMode': 'Indexed', 'backoffLimit': 0,
         'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': {
             'containerName': 'train', 'operator': 'In', 'values': FINAL}}]},
         'template': {'metadata': {'labels': {'app': args.name}}, 'spec': pod}}
  about = {'name': args.name, 'namespace': args.namespace}
  service = {'apiVersion': 'v1', 'kind': 'Service', 'metadata': about,
             'spec': {'clusterIP': 'None', 'publishNotReadyAddresses': True, 'selector': {'app': args.name},
                      'ports': [{'name': 'coordinator', 'port': PORT}]}}
  exclusive = {'annotations': {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}} if args.tpu else {}
  jobset = {'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet', 'metadata': {**about, **exclusive},
            'spec': {'network': {'enableDNSHostnames': False},  # the service above has the names
                     'failurePolicy': {'maxRestarts': args.restarts, 'rules': [
                         {'name': 'final', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}]},
                     'replicatedJobs': [{'name': 'workers', 'replicas': args.slices, 'template': {'spec': job}}]}}
  return [service, jobset]


def _arguments(argv: list[str]):
  parser = argparse.ArgumentParser(prog='gke.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   allow_abbrev=False)
  for flag in ('name', 'image', 'claim'):
    parser.add_argument(f'--{flag}', required=True)
  for flag in ('tpu', 'topology', 'gpu'):
    parser.add_argument(f'--{flag}')
  for flag, value in (('chips', 4), ('gpus', 8), ('hosts', 0), ('slices', 1), ('restarts', 1000)):
    parser.add_argument(f'--{flag}', type=int, default=value)
  parser.add_argument('--namespace', default='default')
  parser.add_argument('--dry-run', action='store_true')
  own, command = (argv[:argv.index('--')], argv[argv.index('--') + 1:]) if '--' in argv else (argv, [])
  args = parser.parse_args(own)
  if not any(w.startswith('--workdir=/runs/') for w in command):
    parser.error('wants -- train --config=… --workdir=/runs/RUN, where the volume of --claim is')
  if bool(args.tpu) == bool(args.gpu):
    parser.error('wants one of --tpu=ACCELERATOR and --gpu=ACCELERATOR')
  if args.tpu:
    if not args.topology or not all(n.isdigit() for n in args.topology.split('x')):
      parser.error(f'--topology={args.topology}: wants that of the slice, as 4x4x4')
    chips = math.prod(map(int, args.topology.split('x')))
    if chips % args.chips or args.hosts not in (0, chips // args.chips):
      parser.error(f'--topology={args.topology}: is {chips} chips, {args.chips} a host (--chips); leave --hosts out')
    args.hosts = chips // args.chips
  if args.hosts < 1:
    parser.error('--gpu: wants --hosts=N')
  return args, command


def main(argv: list[str]) -> int:
  args, command = _arguments(argv)
  text = yaml.safe_dump_all(manifests(args, command), sort_keys=False, width=140)
  apply = ['kubectl', 'apply', '--filename=-']
  if args.dry_run:
    print(f"{shlex.join(apply)} <<'END'\n{text}END")
    return 0
  return subprocess.run(apply, input=text, text=True, check=False).returncode


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
