"""Chips, as their makers' pages give them: per chip, dense, without sparsity."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  bf16: float        # FLOP/s
  int8: float        # operations/s
  hbm: float         # GiB
  bandwidth: float   # of HBM, bytes/s
  hertz: float       # clock that the compiler's cycles are counted in; 0: it estimates none
  source: str


_TPU = 'cloud.google.com/tpu/docs'
# Clocks are those at which peak FLOP/s are reached: 2 · 128² or 256² multiply-adds · units · hertz.
CHIPS = {
    'v4': Chip(275e12, 275e12, 32, 1.2e12, 1.05e9, f'{_TPU}/v4'),
    'v5e': Chip(197e12, 393e12, 16, 819e9, 1.5e9, f'{_TPU}/v5e'),
    'v5p': Chip(459e12, 918e12, 95, 2.765e12, 1.75e9, f'{_TPU}/v5p'),
    'v6e': Chip(918e12, 1836e12, 32, 1.638e12, 1.75e9, f'{_TPU}/v6e'),
}
