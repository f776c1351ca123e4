"""Chips, as their makers' pages give them: per chip, dense, without sparsity. `sources` says where each number is from."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can do. Links and what leaves a host are bytes/s one way; as much goes the other way at the same time."""
  bf16: float        # FLOP/s
  int8: float        # operations/s
  fp8: float         # FLOP/s; as bf16 where the chip has no units for it, which then widens
  hbm: float         # GiB that programs get
  bandwidth: float   # of HBM, bytes/s
  link: float        # of one ICI link (TPU), or of NVLink in all (GPU)
  links: int         # of ICI, two to a dimension of the torus; 0: a GPU, whose host has a switch
  out: float         # a chip's share of what its host sends beyond its slice (TPU), or beyond itself (GPU)
  host: float        # to and from its host's memory, over PCIe
  sources: str
  devices: int = 1   # that JAX makes of a chip
  unit: int = 128    # rows and columns of a matrix unit: narrower operands leave some of it idle
  hertz: float = 0.  # clock that the TPU compiler's cycles are counted in: that at which peak FLOP/s are reached


_TPU = 'cloud.google.com/tpu/docs'
_BOOK = 'what is reached of a link and of PCIe: jax-ml.github.io/scaling-book/tpus'
_SXM = 'int8, fp8, NVLink: jax-ml.github.io/scaling-book/gpus, half of what makers say with sparsity and of both ways; PCIe: its generation\'s'
_DGX = 'out: an adapter a GPU, of 400 Gb/s (jax-ml.github.io/scaling-book/gpus)'
CHIPS = {
    'v4': Chip(275e12, 275e12, 275e12, 32, 1.2e12, 45e9, 6, 6.25e9, 16e9, f'{_TPU}/v4; {_BOOK}', hertz=1.05e9),
    'v5e': Chip(197e12, 393e12, 197e12, 15.75, 819e9, 45e9, 4, 3.125e9, 16e9,
                f'{_TPU}/v5e, of whose 16 GB programs get 15.75 GiB; {_BOOK}', hertz=1.5e9),
    'v5p': Chip(459e12, 918e12, 459e12, 95, 2.765e12, 90e9, 6, 6.25e9, 16e9, f'{_TPU}/v5p; int8: scaling-book; {_BOOK}', hertz=1.75e9),
    'v6e': Chip(918e12, 1836e12, 918e12, 31.25, 1.638e12, 90e9, 4, 12.5e9, 32e9,
                f'{_TPU}/v6e, of whose 32 GB programs get 31.25 GiB; {_BOOK}', unit=256, hertz=1.75e9),
    'tpu7x': Chip(2307e12, 2307e12, 4614e12, 192, 7.38e12, 90e9, 6, 12.5e9, 32e9, f'{_TPU}/tpu7x, which says '
                  'nothing of int8: taken as bf16; link: as v5p, of the same nominal rate; PCIe: as v6e', devices=2, unit=256),
    'a100': Chip(312e12, 624e12, 312e12, 79.25, 2.039e12, 300e9, 0, 25e9, 32e9, f'glennklockwood.com/garden/processors/A100; {_SXM}; out: an '
                 'adapter a GPU, of 200 Gb/s (DGX A100)'),
    'a100-40gb': Chip(312e12, 624e12, 312e12, 39.42, 1.555e12, 300e9, 0, 25e9, 32e9, 'as a100, but for 40 GB at 1,555 GB/s: NVIDIA A100 '
                      'data sheet; XLA\'s a100_sxm_40.txtpb'),
    'h100': Chip(989e12, 1979e12, 1979e12, 79.1, 3.35e12, 450e9, 0, 50e9, 64e9, f'{_SXM}; {_DGX}'),
    'h200': Chip(989e12, 1979e12, 1979e12, 140.4, 4.8e12, 450e9, 0, 50e9, 64e9, f'as h100, but for 141 GB at 4.8 TB/s; {_SXM}; {_DGX}'),
    'b200': Chip(2250e12, 4500e12, 4500e12, 178, 8e12, 900e9, 0, 50e9, 64e9, f'glennklockwood.com/garden/processors/B200; {_SXM}; {_DGX}'),
}
