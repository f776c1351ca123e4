"""Several CPU devices in one process."""
import os

ORDERED = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
UNPROMOTED = '--xla_disable_hlo_passes=all-reduce-promotion'


def set_flags() -> None:
  """Says to XLA what several CPU devices need, unless XLA_FLAGS says otherwise; to be called before the first device is used.

  ORDERED: a program's collectives run in one order on all devices. By its default each device runs what is ready, and two
  collectives that do not depend on each other can then wait for each other for ever: on a busy machine with 2 cores, half of the
  runs of a step on 2 × 2 × 2 devices did (XLA ends such a process after 40 seconds); none of 12 did with this.
  UNPROMOTED: sums of bfloat16 over devices are of bfloat16. The pass that would make them float32 ends the process ("Invalid binary
  instruction opcode copy") where it meets the gradients of experts in a pipeline's stages.
  """
  if os.environ.get('JAX_NUM_CPU_DEVICES', '') not in ('', '0', '1', '-1'):
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = ' '.join([flags, *(f for f in (ORDERED, UNPROMOTED) if f.split('=')[0] not in flags)]).strip()
