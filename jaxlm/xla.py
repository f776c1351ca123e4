"""What XLA's compilers are asked for beyond their defaults, in a train step: the same for runs and for plans of pods."""

# Weights of the next layer are gathered while this one is computed. By its defaults the TPU compiler gathers synchronously; with
# these, of the 28 GiB that a device gathers in a step of Llama-3-8B on v5p:4x4x8 (data 4 × fsdp 32), 25.5 go on beside matrix products,
# for 0.3 GiB more of HBM.
OPTIONS = {
    'tpu': {
        'xla_enable_async_all_gather': 'true',
        'xla_tpu_enable_async_collective_fusion': 'true',
        'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'true',
        'xla_tpu_enable_async_collective_fusion_multiple_steps': 'true',
        'xla_tpu_overlap_compute_collective_tc': 'true',
    },
    'gpu': {},
    'cpu': {},
}
