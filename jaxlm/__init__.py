"""jaxlm: pretraining language models in JAX, from a laptop to TPU and GPU pods."""

from jaxlm.cpu import set_flags

__version__ = '0.1.0'

set_flags()


def load(workdir, step=None, mesh=None):
  """A trained model: see jaxlm.lm.load."""
  from jaxlm import lm  # pylint: disable=g-import-not-at-top  # `import jaxlm` itself is free of jax
  return lm.load(workdir, step, mesh)
