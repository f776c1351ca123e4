"""Chips, as their makers' pages give them: per chip, dense, without sparsity."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  bf16: float        # FLOP/s
  hbm: float         # GiB
  hertz: float       # clock that the compiler's cycles are counted in; 0: it estimates none
  source: str


_TPU = 'cloud.google.com/tpu/docs'
# Clocks are those at which peak FLOP/s are reached: 2 · 128² or 256² multiply-adds · units · hertz.
CHIPS = {
    'v4': Chip(275e12, 32, 1.05e9, f'{_TPU}/v4'),
    'v5e': Chip(197e12, 16, 1.5e9, f'{_TPU}/v5e'),
    'v5p': Chip(459e12, 95, 1.75e9, f'{_TPU}/v5p'),
    'v6e': Chip(918e12, 32, 1.75e9, f'{_TPU}/v6e'),
}
