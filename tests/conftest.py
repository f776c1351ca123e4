"""One process, eight CPU devices, one compile cache; implicit broadcasting of ranks is an error."""
import importlib.metadata
import os
import pathlib

from jaxlm import cpu

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))  # child processes use it too
os.environ['JAX_PLATFORMS'] = 'cpu'
# Compiling is most of the time of small tests: without LLVM's optimizations it takes 0.6 of it, and with the older emitters of
# fusions, which newer versions no longer have, half of that. Child processes that run the command line as people do get none of
# this (XLA_FLAGS='').
FLAGS = ['--xla_backend_optimization_level=0', cpu.ORDERED]
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(FLAGS))
os.environ['HF_HUB_OFFLINE'] = '1'

import jax  # noqa: E402  pylint: disable=wrong-import-position
import pytest  # noqa: E402  pylint: disable=wrong-import-position

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
os.chdir(ROOT)


# The files that take longest, which begin first, so that at the end no process is left alone with one of them.
LONG = ('test_readme', 'test_meshes', 'test_benchmarks', 'test_families', 'test_answers', 'test_remat', 'test_end_to_end', 'test_kinds', 'test_pods',
        'test_mixture', 'test_classics', 'test_hosts')


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def one_device():
  """A 1×1×1 mesh, entered."""
  from tests.common import mesh_of
  with jax.set_mesh(mesh_of(1, 1, 1)):
    yield


@pytest.fixture(scope='session')
def texts(tmp_path_factory):
  """A folder of 60 small, different documents, 100 to 2,000 bytes each, some not ASCII."""
  folder = tmp_path_factory.mktemp('texts')
  words = 'der die das λόγος naïve return def class import self None True for in while range print(x) 0 1 2'.split()
  for i in range(60):
    body = ' '.join(words[(i * 7 + j * j + j * i) % len(words)] for j in range(20 + 7 * (i % 40)))
    (folder / f'{i:02}.txt').write_text(f'document {i}\n{body}\n', encoding='utf-8')
  return folder
