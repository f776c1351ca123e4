"""MaxText's own train_compile, whose compiled step is kept: run by the Python of a venv that has MaxText (benchmarks/beside_maxtext.py).

    python benchmarks/maxtext_step.py OUT.json KEY=VALUE …      keys of MaxText's config
"""
import json
import pathlib
import resource
import sys
import time


def main() -> None:
  out, *keys = sys.argv[1:]
  import jax  # pylint: disable=g-import-not-at-top
  import maxtext
  from absl import app
  from maxtext.trainers.pre_train import train_compile
  compiling, start = train_compile.jit_and_compile, time.monotonic()

  def kept(*args, **kwargs):
    compiled = compiling(*args, **kwargs)
    memory = compiled.memory_analysis()
    pathlib.Path(out).write_text(json.dumps({
        'jax': jax.__version__, 'peak': memory.peak_memory_in_bytes / 2 ** 30, 'arguments': memory.argument_size_in_bytes / 2 ** 30,
        'text': compiled.as_text(), 'seconds': time.monotonic() - start,
        'host': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20}), encoding='utf-8')
    return compiled
  train_compile.jit_and_compile = kept
  base = pathlib.Path(maxtext.__file__).parent / 'configs/base.yml'
  app.run(train_compile.main, argv=['train_compile', str(base), *keys])


if __name__ == '__main__':
  main()
