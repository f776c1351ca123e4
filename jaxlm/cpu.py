"""Several CPU devices in one process."""
import os

ORDERED = '--xla_cpu_enable_concurrency_optimized_scheduler=false'


def order_collectives() -> None:
  """Has XLA run a program's collectives in one order on all CPU devices; to be called before the first device is used.

  By its default each device runs what is ready, and two collectives that do not depend on each other can then wait for each other
  for ever: on a busy machine with 2 cores, half of the runs of a step on 2 × 2 × 2 devices did (XLA ends such a process after 40
  seconds); none of 12 did with this.
  """
  if os.environ.get('JAX_NUM_CPU_DEVICES', '') not in ('', '0', '1', '-1') and ORDERED.split('=')[0] not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {ORDERED}'.strip()
