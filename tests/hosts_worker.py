"""What test_hosts.py starts two of: WHAT --coordinator --processes --process. Prints JSON of what this process saw."""
import json
import os
import pathlib
import sys
import tempfile

from jaxlm import cluster


def main(what, coordinator, processes, process):
  job = cluster.find(coordinator, int(processes), int(process))
  from jaxlm import hosts  # pylint: disable=g-import-not-at-top
  hosts.GRACE = 3
  with hosts.joined(job, hosts.Waits(5, 60, 30)):
    SCENES[what](int(process))


def tell(**values) -> None:
  os.write(1, f'{json.dumps(values)}\n'.encode())  # in one piece: gloo writes there too


def together(process) -> None:
  """Rows that were read; a sharded array, whole; then an error of the lead that is everybody's."""
  import jax  # pylint: disable=g-import-not-at-top
  import numpy as np
  from jaxlm import hosts, layout, metrics
  from jaxlm.data import pipeline
  from jaxlm.errors import UsageError
  from jaxlm.schema import MeshConfig
  mesh_config, asked = MeshConfig(data=2, fsdp=2, tensor=2), []
  mesh = layout.make_mesh(mesh_config)

  def rows(start, stop):
    asked.append([start, stop])
    return {'tokens': np.arange(start * 3, stop * 3, dtype=np.int32).reshape(-1, 3)}
  with jax.set_mesh(mesh):
    batch = pipeline.place(rows, 16, mesh)
    doubled = jax.jit(lambda a: 2 * a)(batch['tokens'])
    whole, sharded, first = hosts.fetch(doubled).tolist(), not doubled.is_fully_addressable, asked[:]
  apart = layout.make_mesh(mesh_config, [jax.devices()[i] for i in (0, 1, 4, 5, 2, 3, 6, 7)])
  with jax.set_mesh(apart):
    asked.clear()
    same = hosts.fetch(pipeline.place(rows, 16, apart)['tokens']).tolist() == rows(0, 16)['tokens'].tolist()
  tell(asked=first, whole=whole, sharded=sharded, asked_apart=asked[:-1], same=same)
  hosts.same('thing', 'equal')
  metrics.say('the lead speaks')

  def fails():
    raise UsageError('data source: wrong')
  hosts.lead_first('data', fails)


def another(process) -> None:
  """Each was started with another config."""
  from jaxlm import hosts  # pylint: disable=g-import-not-at-top
  hosts.same('config', f'config {process}')
  hosts.meet('the first step')


def apart(process) -> None:
  """Each has a workdir of its own."""
  from jaxlm import train  # pylint: disable=g-import-not-at-top
  train._prepare_workdir(pathlib.Path(tempfile.mkdtemp(prefix=f'workdir-{process}-')))


SCENES = {'together': together, 'another': another, 'apart': apart}

if __name__ == '__main__':
  main(sys.argv[1], *(word.partition('=')[2] for word in sys.argv[2:]))
