"""What XLA and libtpu are told before the first device is used."""
import os
import subprocess
import sys

import pytest

from jaxlm import cpu


@pytest.mark.parametrize('env, found, expected', [
    ({}, {}, 'cpu'), ({'JAX_PLATFORMS': 'tpu'}, {}, 'tpu'), ({'TPU_WORKER_ID': '0'}, {}, None), ({}, {'/dev/accel*': ['/dev/accel0']}, None),
    ({}, {'/dev/nvidia*': ['/dev/nvidia0']}, None), ({}, {'/sys/bus/pci/devices/*/vendor': ['google']}, None),
    ({}, {'/sys/bus/pci/devices/*/vendor': ['other']}, 'cpu'), ({'none': 'libtpu'}, {}, None)])
def test_jax_looks_for_no_accelerator_where_there_is_none(env, found, expected, monkeypatch, tmp_path):
  """libtpu would write its errors on every command."""
  (tmp_path / 'google').write_text('0x1ae0\n')
  (tmp_path / 'other').write_text('0x10de\n')
  monkeypatch.setattr(os, 'environ', dict(env))
  monkeypatch.setattr(cpu.glob, 'glob', lambda pattern: [str(tmp_path / name) for name in found.get(pattern, [])])
  monkeypatch.setattr(cpu.importlib.util, 'find_spec', lambda name: None if 'none' in env else name)
  cpu.set_flags()
  assert os.environ.get('JAX_PLATFORMS') == expected


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
