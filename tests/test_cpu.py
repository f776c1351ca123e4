"""What is said to XLA where there are several CPU devices."""
import os
import subprocess
import sys

import pytest

from jaxlm import cpu


@pytest.mark.parametrize('devices, flags, expected', [
    ('1', '--xla_dump_to=x', '--xla_dump_to=x'), ('', '', ''), ('8', '', f'{cpu.ORDERED} {cpu.UNPROMOTED}'),
    ('8', '--xla_dump_to=x', f'--xla_dump_to=x {cpu.ORDERED} {cpu.UNPROMOTED}'),
    ('8', cpu.ORDERED.replace('false', 'true'), f'{cpu.ORDERED.replace("false", "true")} {cpu.UNPROMOTED}'),
    ('8', '--xla_disable_hlo_passes=dce', f'--xla_disable_hlo_passes=dce {cpu.ORDERED}')])
def test_several_devices_get_their_flags_unless_the_user_says_otherwise(devices, flags, expected):
  env = {**os.environ, 'JAX_NUM_CPU_DEVICES': devices, 'XLA_FLAGS': flags}
  out = subprocess.run([sys.executable, '-c', 'import os, jaxlm; print(os.environ["XLA_FLAGS"])'], env=env, text=True,
                       capture_output=True, check=True)
  assert out.stdout.strip() == expected
