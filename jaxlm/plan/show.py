"""What `jaxlm plan` shows a person."""
import dataclasses

from rich import box
from rich.table import Table

from jaxlm.metrics import console, say
from jaxlm.plan.search import Plan
from jaxlm.plan.topology import Topology
from jaxlm.schema import Config

REASONS = 8  # of refusals, that are shown


def _table(*columns: str) -> Table:
  table = Table(box=box.SIMPLE)
  for n, column in enumerate(columns):
    table.add_column(column, justify='right' if n else 'left')
  return table


def header(config: Config, pod: Topology, own: Plan | str) -> None:
  """The pod, and the config on it as it stands: memory by class, and where a step's time goes."""
  chip = pod.chip
  say(f'{pod.name}{f" × {pod.slices} slices" if pod.slices > 1 else ""}: {pod.chips:,} chips of {chip.hbm:g} GiB and '
      f'{chip.bf16 / 1e12:g} TFLOP/s; a step has {config.batch:,} × {config.length:,} = {config.batch * config.length:,} tokens')
  if isinstance(own, str):
    say(f'as the config stands it does not run here: {own}')
    return
  say(f'as the config stands ({_spoken(own)}): {own.step.seconds:.3f} s a step, MFU {own.mfu:.1%}, {_fits(own)}')
  table = _table('HBM of a device, GiB', '', 'of a step, s', '')
  memory = [(f.name, getattr(own.hbm, f.name)) for f in dataclasses.fields(own.hbm)] + [('peak', own.hbm.peak)]
  step = own.step
  times = [('matrix products', step.products), ('attention', step.attention), ('elementwise', step.elementwise),
           *((f'waits for {"the host" if axis == "host" else f"mesh.{axis}"}', s) for axis, s in step.exposed.items()),
           ('bubble of the pipeline', step.bubble), ('step', step.seconds)]
  times = [(name, s) for name, s in times if s]
  for n in range(max(len(memory), len(times))):
    left = (memory[n][0], f'{memory[n][1]:.2f}') if n < len(memory) else ('', '')
    right = (times[n][0], f'{times[n][1]:.3f}') if n < len(times) else ('', '')
    table.add_row(*left, *right)
  console.print(table)


def _spoken(p: Plan) -> str:
  return ' '.join(f'{key.removeprefix("mesh.").removeprefix("model.")}={value}' for key, value in p.stated.items())


def _fits(p: Plan) -> str:
  return p.why_not() or f'{p.hbm.peak:.1f} of {p.limit:g} GiB'


def candidates(found: list[Plan], entries: list[dict]) -> None:
  """The best plans; of compiled ones what the compiler says beside it, and how far the prediction was off."""
  verified = entries[0]['verified']
  say(f'{len(found)} meshes fit; the best {len(entries)}:')
  for n, e in enumerate(entries, 1):
    say(f'  {n}  ' + ' '.join(f"--config.{key}={_quoted(value)}" for key, value in e['config'].items()))
  table = _table('', 'step, s', 'MFU', 'peak, GiB', 'tokens a day', 'days', 'chip-hours', 'bound by')
  for n, e in enumerate(entries, 1):
    table.add_row(str(n), f'{e["predicted_step_seconds"]:.3f}', f'{e["predicted_mfu"]:.1%}', f'{e["predicted_hbm_gib"]["peak"]:.1f}',
                  f'{e["tokens_per_day"] / 1e9:,.1f}B', f'{e["days"]:.1f}', f'{e["chip_hours"]:,.0f}', e['bound_by'])
  console.print(table)
  if not entries[0]['verified']:
    return
  table = _table('compiled', 'peak, GiB', 'predicted is off by', 'costed step, s', 'predicted is off by', 'MFU', 'in')
  for n, e in enumerate(entries, 1):
    compiled, costed = e['compiled'], e['compiled']['step_seconds']
    times = (f'{costed:.3f}', f'{compiled["error_of_step"]:+.0%}', f'{compiled["mfu"]:.1%}') if costed else ('–', '–', '–')
    table.add_row(str(n), f'{e["hbm_gib"]["peak"]:.2f}', f'{compiled["error_of_peak"]:+.0%}', *times, f'{e["compile_seconds"]:.0f} s')
  console.print(table)
  table = _table('collectives of the first, GiB of a device', 'sent', 'hidden behind other work', 'waited for')
  for s in entries[0]['compiled']['collectives']:
    size = s['bytes'] / 2 ** 30
    table.add_row(s['kind'], f'{size:.2f}', f'{size * s["hidden"]:.2f}', f'{size * (1 - s["hidden"]):.2f}')
  console.print(table)


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
  table = _table('', 'published, s', 'predicted, s', 'ratio', 'published MFU', 'predicted MFU')
  for fitted in (True, False):
    rows = [r for r in results if r['fitted'] == fitted]
    worst = max(rows, key=lambda r: max(r['ratio'], 1 / r['ratio']))
    within = sum(.85 <= r['ratio'] <= 1.15 for r in rows)
    title = 'fitted on' if fitted else 'held out'
    table.add_row(f'[bold]{title}: {within} of {len(rows)} within 15%, worst {worst["ratio"]:.2f}[/bold]')
    for r in rows:
      table.add_row(r['name'], f'{r["published_seconds"]:.3f}', f'{r["predicted_seconds"]:.3f}', f'{r["ratio"]:.2f}',
                    f'{r["published_mfu"]:.1%}', f'{r["predicted_mfu"]:.1%}')
  console.print(table)
