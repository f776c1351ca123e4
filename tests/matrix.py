"""The lines of the fault matrix: what each test of a fault saw. `make faults` collects them (benchmarks/faults.py)."""
import json
import os

from tests.campaigns import only

slow = only('JAXLM_FAULTS', 'make faults')


def record(fault: str, case: str, result: str, trials: int = 1, lost: int | None = None, detect: float | None = None,
           recover: float | None = None) -> None:
  """Writes a line to the file that JAXLM_FAULTS names, if it names one. lost: steps run again, at most; detect, recover: seconds, at
  most, until the fault was seen, and from there until the run trained again."""
  if 'JAXLM_FAULTS' in os.environ:
    line = {'fault': fault, 'case': case, 'trials': trials, 'lost': lost, 'detect': detect, 'recover': recover, 'result': result}
    with open(os.environ['JAXLM_FAULTS'], 'a', encoding='utf-8') as file:
      file.write(json.dumps(line) + '\n')
