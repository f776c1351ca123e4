"""Chips, as their makers' pages give them: per chip, dense, without sparsity. `sources` says where each number is from."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can do. Links and what leaves a host are bytes/s one way; as much goes the other way at the same time."""
  bf16: float        # FLOP/s
  int8: float        # operations/s
  hbm: float         # GiB
  bandwidth: float   # of HBM, bytes/s
  link: float        # of one ICI link (TPU), or of NVLink in all (GPU)
  links: int         # of ICI, two to a dimension of the torus; 0: a GPU, whose host has a switch
  out: float         # a chip's share of what its host sends beyond its slice (TPU), or beyond itself (GPU)
  sources: str
  devices: int = 1   # that JAX makes of a chip
  hertz: float = 0.  # clock that the TPU compiler's cycles are counted in: that at which peak FLOP/s are reached


_TPU = 'cloud.google.com/tpu/docs'
_BOOK = 'jax-ml.github.io/scaling-book/tpus'
_NVIDIA = 'NVIDIA\'s datasheet of the SXM board: bf16, int8 (half of what is said "with sparsity"), HBM, NVLink (half of what both ways have)'
_NIC = 'out: one 400 Gb/s adapter a GPU, as the maker\'s own hosts have'
CHIPS = {
    'v4': Chip(275e12, 275e12, 32, 1.2e12, 45e9, 6, 3.1e9, f'{_TPU}/v4; link: {_BOOK}', hertz=1.05e9),
    'v5e': Chip(197e12, 394e12, 16, 819e9, 45e9, 4, 3.1e9, f'{_TPU}/v5e; link: {_BOOK}', hertz=1.5e9),
    'v5p': Chip(459e12, 918e12, 95, 2.765e12, 90e9, 6, 6.25e9, f'{_TPU}/v5p; link: {_BOOK}', hertz=1.75e9),
    'v6e': Chip(918e12, 1836e12, 32, 1.64e12, 90e9, 4, 12.5e9, f'{_TPU}/v6e; link: {_BOOK}', hertz=1.75e9),
    'tpu7x': Chip(2307e12, 4614e12, 192, 7.37e12, 100e9, 6, 12.5e9, f'{_TPU}/tpu7x', devices=2),
    'a100': Chip(312e12, 624e12, 80, 2.04e12, 300e9, 0, 25e9, f'{_NVIDIA}; out: one 200 Gb/s adapter a GPU'),
    'h100': Chip(989e12, 1979e12, 80, 3.35e12, 450e9, 0, 50e9, f'{_NVIDIA}; {_NIC}'),
    'h200': Chip(989e12, 1979e12, 141, 4.8e12, 450e9, 0, 50e9, f'{_NVIDIA}; {_NIC}'),
    'b200': Chip(2250e12, 4500e12, 180, 8e12, 900e9, 0, 50e9, f'{_NVIDIA}; {_NIC}'),
}
