"""What XLA's GPU compiler wants to know of a GPU that is not here, in the words of its own target configs
(github.com/openxla/xla: xla/backends/gpu/target_config/specs)."""

_COMMON = dict(threads_per_block_limit=1024, threads_per_warp=32, shared_memory_per_block=49152, block_dim_limit_x=2147483647,
               block_dim_limit_y=65535, block_dim_limit_z=65535, registers_per_core_limit=65536, registers_per_block_limit=65536)
_AMPERE = dict(_COMMON, shared_memory_per_core=167936, threads_per_core_limit=2048, core_count=108, fpus_per_core=64,
               l2_cache_size=41943040, clock_rate_ghz=1.41, shared_memory_per_block_optin=166912)
_HOPPER = dict(_COMMON, shared_memory_per_core=233472, threads_per_core_limit=2048, core_count=132, fpus_per_core=128,
               l2_cache_size=52428800, clock_rate_ghz=1.98, shared_memory_per_block_optin=232448)
# What of a chip a program can use: its driver keeps some of its memory.
GPUS = {  # name of the device, compute capability, properties
    'a100': ('NVIDIA A100-SXM4-80GB', (8, 0), dict(_AMPERE, memory_bandwidth=2039000000000, device_memory_size=85097971712)),
    'a100-40gb': ('NVIDIA A100-SXM4-40GB', (8, 0), dict(_AMPERE, memory_bandwidth=1555200000000, device_memory_size=42331013120)),
    'h100': ('NVIDIA H100 80GB HBM3', (9, 0), dict(_HOPPER, memory_bandwidth=3352320000000, device_memory_size=84978434048)),
    'h200': ('NVIDIA H200', (9, 0), dict(_HOPPER, memory_bandwidth=4800000000000, device_memory_size=150754820096)),
    'b200': ('NVIDIA B200', (10, 0), dict(
        _COMMON, shared_memory_per_core=233472, threads_per_core_limit=2048, core_count=148, fpus_per_core=128,
        l2_cache_size=132644864, clock_rate_ghz=1.965, shared_memory_per_block_optin=232448, memory_bandwidth=7672000000000,
        device_memory_size=191503138816)),
}


def target(kind: str) -> str:
  """The target config of a chip of plan/chips.py."""
  name, (major, minor), properties = GPUS[kind]
  fields = ' '.join(f'{key}: {value}' for key, value in properties.items())
  return (f'gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }}\nplatform_name: "CUDA"\n'
          f'dnn_version_info {{ major: 9 minor: 8 patch: 0 }}\nruntime_version {{ major: 12 minor: 8 patch: 0 }}\n'
          f'device_description_str: "{name}"\n')
