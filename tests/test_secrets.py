"""What is secret in the environment and on the command line is in nothing that a run writes or says."""
import ast
import os
import pathlib
import subprocess
import sys

from tests import matrix

CANARIES = {name: f'canary-{n}-5f0c7b' for n, name in enumerate((
    'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'WANDB_API_KEY', 'AWS_SECRET_ACCESS_KEY', 'GOOGLE_APPLICATION_CREDENTIALS', 'MY_PASSWORD'))}
ON_THE_LINE = 'canary-argv-5f0c7b'
# A config file that takes a secret as its argument, as one might to open a store, and makes the run say all that it can say.
CONFIG = '''
import runpy
def get_config(secret):
  c = runpy.run_path('tests/configs/tiny.py')['get_config']({texts!r})
  c.update(dict(steps=12, save_every=4, eval_every=6, guard=dict(replicas_every=5, spike=9.)))
  return c
'''


@matrix.slow
def test_no_secret_is_in_a_file_or_in_the_output(texts, tmp_path):
  (tmp_path / 'c.py').write_text(CONFIG.format(texts=f'{texts}/*.txt'))
  workdir, said = tmp_path / 'run', ''
  env = {**os.environ, **CANARIES, 'XLA_FLAGS': '', 'JAX_NUM_CPU_DEVICES': '2'}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)  # so that it is in the workdir
  for words in (['train', f'--config={tmp_path}/c.py:{ON_THE_LINE}'],
                ['train', f'--config={tmp_path}/c.py:{ON_THE_LINE}', '--config.steps=16'],
                ['train', f'--config={tmp_path}/c.py:{ON_THE_LINE}', '--config.optimizer.lr=1'],  # refused
                ['eval']):
    out = subprocess.run([sys.executable, '-m', 'jaxlm', *words, f'--workdir={workdir}'], capture_output=True, text=True, env=env,
                         check=False)
    assert out.returncode == (2 if '--config.optimizer.lr=1' in words else 0), out.stderr
    said += out.stdout + out.stderr
  files = {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
  assert {'config.json', 'metrics.jsonl', 'goodput.jsonl'} <= {path.name for path in files} and len(files) > 20
  assert any(str(texts).encode() in content for content in files.values()) and str(workdir) in said  # what is no secret is found
  for secret in (*CANARIES.values(), ON_THE_LINE):
    assert secret not in said
    found = [path for path, content in files.items() if secret.encode() in content or secret in str(path)]
    assert not found
  matrix.record('F22', f'{len(CANARIES) + 1} secrets in environment and arguments', f'in none of {len(files)} files, nor in the output')


UNPICKLE = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'shelve', 'marshal', 'joblib'}
RUN = {'eval', 'exec', 'compile', '__import__'}  # as functions of no module
METHODS = {'extractall', 'unsafe_load', 'full_load', 'deserialize_and_load'}


def dangers(source: str) -> list[str]:
  """What of a Python source runs, or could run, what it reads."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      modules = [node.module or ''] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
      found += [m for m in modules if m.split('.')[0] in UNPICKLE]
    elif isinstance(node, ast.Call):
      found += [k.arg for k in node.keywords if k.arg in ('trust_remote_code', 'allow_pickle') or k.arg == 'shell']
      if isinstance(node.func, ast.Name) and node.func.id in RUN:
        found.append(node.func.id)
      elif isinstance(node.func, ast.Attribute):
        name, whole = ast.unparse(node.func), ast.unparse(node)
        if 'ZipFile(' in name or "filter='data'" in whole:  # these keep names within the folder, and make no devices
          continue
        found += [name] if node.func.attr in METHODS or name in ('torch.load', 'yaml.load', 'os.system', 'os.popen') else []
  return found


def test_nothing_unpickles_or_runs_what_it_reads():
  for path in pathlib.Path('jaxlm').rglob('*.py'):
    assert not dangers(path.read_text(encoding='utf-8')), path
  assert dangers('import pickle\nfrom dill import loads\neval(x)\ntorch.load(f)\na.extractall()\nf(trust_remote_code=True)') == [
      'pickle', 'dill', 'eval', 'torch.load', 'a.extractall', 'trust_remote_code']
