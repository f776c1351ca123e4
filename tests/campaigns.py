"""Tests that only a make target of their own runs: `make test` proves the same by fewer cases, in minutes."""
import os

import pytest


def only(variable: str, target: str):
  """A mark: skipped but where the target sets the variable."""
  return pytest.mark.skipif(variable not in os.environ, reason=target)


parity = only('JAXLM_PARITY', 'make parity')
pods = only('JAXLM_PODS', 'make pods')
