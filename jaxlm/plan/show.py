"""What `jaxlm plan` shows a person."""
import dataclasses

from rich import box
from rich.table import Table

from jaxlm.metrics import console, say
from jaxlm.plan import legend
from jaxlm.plan.roofline import ERROR, Step
from jaxlm.plan.search import Plan
from jaxlm.plan.topology import Topology
from jaxlm.schema import Config

REASONS = 8  # of refusals, that are shown


def _table(*columns: str) -> Table:
  table = Table(box=box.SIMPLE, pad_edge=False)  # for 80 columns
  for n, column in enumerate(columns):
    table.add_column(column, justify='right' if n else 'left', overflow='fold',
                     no_wrap=column in ('step', 'MFU', 'predicted', 'compiled'))
  return table


def header(config: Config, pod: Topology, own: Plan | str) -> None:
  """The pod, and the config on it as it stands: memory by class, where a step's time goes, and what both are."""
  chip = pod.chip
  if pod.understood:
    say(pod.understood)
  say(f'{pod.name}{f" × {pod.slices} slices" if pod.slices > 1 else ""}: {pod.chips:,} chips of {chip.hbm:g} GiB and '
      f'{chip.bf16 / 1e12:g} TFLOP/s; a step has {config.batch:,} × {config.length:,} = {config.batch * config.length:,} tokens')
  if isinstance(own, str):
    say(f'as the config stands it does not run here: {own}')
    return
  say(f'as the config stands ({_spoken(own)}): predicted {legend.predicted_seconds(own.step.seconds)} a step, MFU '
      f'{legend.predicted_mfu(own.mfu)}, {_fits(own)}')
  table = _table('HBM of a device, GiB', '', f'of a step, s ± {ERROR:.0%}', '')
  memory = [(f.name, getattr(own.hbm, f.name)) for f in dataclasses.fields(own.hbm)] + [('peak', own.hbm.peak)]
  times = _times(own.step)
  for n in range(max(len(memory), len(times))):
    left = (memory[n][0], f'{memory[n][1]:.2f}') if n < len(memory) else ('', '')
    right = (times[n][0], f'{times[n][1]:.3f}') if n < len(times) else ('', '')
    table.add_row(*left, *right)
  console.print(table)
  _lines(legend.MEMORY | {name: legend.TIME[name] for name, _ in times})


def _times(step: Step) -> list[tuple[str, float]]:
  """Where a step's time goes, in the words of legend.TIME, and in all; no lines of nothing."""
  times = [('matrix products', step.products), ('attention', step.attention), ('elementwise', step.elementwise),
           *((f'waits for {"the host" if axis == "host" else f"mesh.{axis}"}', s) for axis, s in step.exposed.items()),
           ('bubble of the pipeline', step.bubble), ('step', step.seconds)]
  return [(name, s) for name, s in times if s]


def _lines(words: dict[str, str]) -> None:
  width = max(map(len, words))
  for name, meaning in words.items():
    say(f'  {name:<{width}}  {meaning}')


def _spoken(p: Plan) -> str:
  return ' '.join(f'{key.removeprefix("mesh.").removeprefix("model.")}={value}' for key, value in p.stated.items())


def _fits(p: Plan) -> str:
  return p.why_not() or f'{p.hbm.peak:.1f} of {p.limit:g} GiB'


def candidates(found: list[Plan], entries: list[dict]) -> None:
  """The best plans, and above them the best one's numbers; of compiled ones what the compiler says, and beside it what was predicted."""
  verified = entries[0]['verified']
  say(f'{len(found)} meshes fit; the best {len(entries)}:')
  for n, e in enumerate(entries, 1):
    say(f'  {n}  ' + ' '.join(f"--config.{key}={_quoted(value)}" for key, value in e['config'].items()))
  say(f'the best: {headline(entries[0])}')
  (_compiled if verified else _predicted)(entries)
  words = ('HBM', 'MFU', 'predicted') + (('compiled',) if verified else ())
  _lines({word: legend.NUMBERS[word] for word in words})


def headline(e: dict) -> str:
  """An entry's step and MFU in a line: the compiler's where it gives a time, and then the predicted ones beside."""
  predicted = f'predicted {legend.predicted_seconds(e["predicted_step_seconds"])} a step, MFU {legend.predicted_mfu(e["predicted_mfu"])}'
  if e['times_are'] == 'predicted':
    return predicted + ('; this compiler says nothing of time' if e['verified'] else '; --verify has the pod\'s own compiler count it')
  return f'compiled {legend.seconds(e["step_seconds"])} a step, MFU {e["mfu"]:.1%} ({predicted})'


def _predicted(entries: list[dict]) -> None:
  table = _table('', 'step', 'MFU', 'GiB', 'tokens a day', 'days', 'chip hours', 'bound by')
  for n, e in enumerate(entries, 1):
    table.add_row(str(n), legend.predicted_seconds(e['predicted_step_seconds']), legend.predicted_mfu(e['predicted_mfu']),
                  f'{e["predicted_hbm_gib"]["peak"]:.1f}', *_run(e), e['bound_by'])
  console.print(table)
  say(f'  tokens a day, days and chip hours follow from the step, so that they are ± {ERROR:.0%} too')


def _compiled(entries: list[dict]) -> None:
  table = _table('compiled', 'step', 'MFU', 'GiB', 'tokens a day', 'days', 'chip hours', 'compiled in')
  beside = _table('predicted', 'step', 'MFU', 'GiB', 'off by: step', 'GiB', 'bound by')
  for n, e in enumerate(entries, 1):
    c = e['compiled']
    times = (legend.seconds(c['step_seconds']), f'{c["mfu"]:.1%}') if c['step_seconds'] else ('–', '–')
    run = _run(c) if c['step_seconds'] else ('–',) * 3
    table.add_row(str(n), *times, f'{e["hbm_gib"]["peak"]:.2f}', *run, f'{e["compile_seconds"]:.0f} s')
    beside.add_row(str(n), legend.predicted_seconds(e['predicted_step_seconds']), legend.predicted_mfu(e['predicted_mfu']),
                   f'{e["predicted_hbm_gib"]["peak"]:.2f}', f'{c["error_of_step"]:+.0%}' if c['step_seconds'] else '–',
                   f'{c["error_of_peak"]:+.0%}', e['bound_by'])
  console.print(table)
  console.print(beside)
  table = _table('collectives of the first, GiB of a device', 'sent', 'hidden behind other work', 'waited for')
  for s in entries[0]['compiled']['collectives']:
    size = s['bytes'] / 2 ** 30
    table.add_row(s['kind'], f'{size:.2f}', f'{size * s["hidden"]:.2f}', f'{size * (1 - s["hidden"]):.2f}')
  console.print(table)


def _run(e: dict) -> tuple[str, str, str]:
  return f'{e["tokens_per_day"] / 1e9:,.1f}B', f'{e["days"]:.1f}', f'{e["chip_hours"]:,.0f}'


def _quoted(value) -> str:
  return f"'{value}'" if ' ' in str(value) else str(value)


def refusals(refused: dict[str, list[str]]) -> None:
  """Why meshes were ruled out, the commonest reasons first."""
  if not refused:
    return
  say(f'{sum(map(len, refused.values())):,} meshes are ruled out:')
  for reason, those in sorted(refused.items(), key=lambda item: -len(item[1]))[:REASONS]:
    say(f'  {reason} ({those[0]}{f" and {len(those) - 1} more" if len(those) > 1 else ""})')
  if len(refused) > REASONS:
    say(f'  … and for {len(refused) - REASONS} other reasons; --json has all')


def validation(results: list[dict]) -> None:
  """Predicted beside published, rows that constants were fitted on apart from those that judge them."""
  from jaxlm.plan.published import off  # pylint: disable=g-import-not-at-top  # with SciPy, which no other plan wants
  for fitted in (True, False):
    rows = [r for r in results if r['fitted'] == fitted]
    worst = max(rows, key=lambda r: max(r['ratio'], 1 / r['ratio']))
    within = sum(off(r) <= ERROR for r in rows)
    say(f'{"fitted on" if fitted else "held out"}: {within} of {len(rows)} measured inside predicted ± {ERROR:.0%}, the worst {worst["ratio"]:.2f} times')
    table = _table('', 'measured, s', 'predicted', 'ratio', 'its MFU', 'predicted MFU')
    for r in rows:
      table.add_row(r['name'], f'{r["published_seconds"]:.3f}', legend.predicted_seconds(r['predicted_seconds']), f'{r["ratio"]:.2f}',
                    f'{r["published_mfu"]:.1%}', legend.predicted_mfu(r['predicted_mfu']))
    console.print(table)
