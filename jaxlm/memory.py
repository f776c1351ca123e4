"""Memory for CPU training: huge pages, and buffers that are kept from step to step."""
import os
import sys

TUNABLES = 'glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000'
# One arena also keeps the buffers of XLA's threads; but LLVM's and the tokenizer's threads then wait for each other.
ONE_ARENA = TUNABLES + ':glibc.malloc.arena_max=1'
LARGE = 50e6  # parameters from which a step's page faults cost more than a slower compile (2 s)


def tunables(params: float) -> str:
  """GLIBC_TUNABLES for a model of about so many parameters."""
  return ONE_ARENA if params >= LARGE else TUNABLES


def restart_with_kept_memory(params: float = 0) -> None:
  """Replaces this process, once, by itself with glibc's malloc told to keep memory and to ask for huge pages.

  XLA's CPU client allocates a step's buffers anew each step, and glibc hands them back to the kernel in between: 1.1
  million page faults a step for GPT-2 124M, none with this (12.2 s a step → 10.5 on 2 cores, 16.3 → 10.7 after a pause
  on a virtual machine; a small model 1.24 → 0.86). glibc reads the setting only when a process starts. Whoever sets
  GLIBC_TUNABLES keeps what they set; other systems are left alone.
  """
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = tunables(params)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
