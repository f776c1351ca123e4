"""The command line restarts itself once, as the same process, with its memory kept."""
import os
import subprocess
import sys

import pytest

from jaxlm import memory

CODE = 'import os, sys\nfrom jaxlm import memory\nmemory.restart_with_kept_memory(float(sys.argv[1]))\nprint(os.getpid(), os.environ["GLIBC_TUNABLES"], sys.argv[1])'


def run(params, **env):
  clean = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
  with subprocess.Popen([sys.executable, '-c', CODE, params], stdout=subprocess.PIPE, text=True,
                        env={**clean, **env}) as child:
    return child.pid, child.communicate()[0].split()


@pytest.mark.parametrize('params, expected', [('1e6', memory.TUNABLES), ('1e9', memory.ONE_ARENA)])
def test_restarts_in_place_with_its_arguments(params, expected):
  pid, out = run(params)
  assert out == [str(pid), expected, params]


def test_what_the_user_set_is_kept():
  pid, out = run('1e6', GLIBC_TUNABLES='glibc.malloc.check=0')
  assert out == [str(pid), 'glibc.malloc.check=0', '1e6']
