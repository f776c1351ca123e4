"""What XLA and libtpu are told before the first device is used."""
import glob
import importlib.util
import os

ORDERED = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
UNPROMOTED = '--xla_disable_hlo_passes=all-reduce-promotion'


def set_flags() -> None:
  """What several CPU devices need, unless XLA_FLAGS says otherwise; and where there is libtpu and no accelerator, that JAX need not look
  for one, unless JAX_PLATFORMS says otherwise: libtpu would write six lines of errors on every command.

  ORDERED: a program's collectives run in one order on all devices. By its default each device runs what is ready, and two
  collectives that do not depend on each other can then wait for each other for ever: on a busy machine with 2 cores, half of the
  runs of a step on 2 × 2 × 2 devices did (XLA ends such a process after 40 seconds); none of 12 did with this.
  UNPROMOTED: sums of bfloat16 over devices are of bfloat16. The pass that would make them float32 ends the process ("Invalid binary
  instruction opcode copy") where it meets the gradients of experts in a pipeline's stages.
  """
  if os.environ.get('JAX_NUM_CPU_DEVICES', '') not in ('', '0', '1', '-1'):
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = ' '.join([flags, *(f for f in (ORDERED, UNPROMOTED) if f.split('=')[0] not in flags)]).strip()
  if 'JAX_PLATFORMS' not in os.environ and importlib.util.find_spec('libtpu') and not _accelerators():
    os.environ['JAX_PLATFORMS'] = 'cpu'


def _accelerators() -> bool:
  """Whether this machine may have one: a device of Google's, NVIDIA's or AMD's, or an environment that speaks of TPUs."""
  devices = [path for pattern in ('/dev/accel*', '/dev/vfio/*', '/dev/nvidia*', '/dev/kfd') for path in glob.glob(pattern)]
  speaks = [name for name in os.environ if name.startswith(('TPU_', 'CLOUD_TPU', 'PJRT_', 'MEGASCALE_'))]
  return bool(devices or speaks or any(map(_is_googles, glob.glob('/sys/bus/pci/devices/*/vendor'))))


def _is_googles(vendor: str) -> bool:
  with open(vendor, encoding='ascii') as file:
    return file.read().strip() == '0x1ae0'
