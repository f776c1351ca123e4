"""Storage that does not answer is asked again; only then is it an error. It is never taken for bad bytes."""
import random
import time

from jaxlm.errors import StorageError

TRIES = 6
FIRST_WAIT = .5  # seconds; each wait is twice the one before, and drawn from half of that on: 8 to 16 s in all


def patiently(what: str, f, say=print):
  """f(), asked again while it raises OSError. StorageError naming `what` if it goes on doing so."""
  for n in range(TRIES):
    try:
      return f()
    except OSError as e:
      if n == TRIES - 1:
        raise StorageError(f'{what}: the storage does not answer, after {TRIES} tries ({e})') from e
      wait = FIRST_WAIT * 2 ** n * random.uniform(.5, 1)
      say(f'{what}: {e}; asked again in {wait:.1f} s')
      time.sleep(wait)
