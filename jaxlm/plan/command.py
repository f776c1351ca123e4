"""`jaxlm plan`: its flags, and the run of it.

    jaxlm plan --config=FILE --topology=v5p:4x4x8|h100:16x8|v5p-256|a3-highgpu-8g:16 [--slices=N --best=3 --verify --hlo=FILE --json=FILE
                             --config.KEY=VALUE …]
    jaxlm plan --validate [--json=FILE]

Keys that are stated on the command line (--config.mesh.tensor=4, --config.model.remat=full, --config.microbatches=2) are kept; of
the others of mesh, remat and microbatches everything is tried. Keys of the JSON: KEYS.
"""
import dataclasses

from absl import flags

from jaxlm import config as configs
from jaxlm.errors import UsageError
from jaxlm.metrics import say
from jaxlm.validate import filled

# Of the best plan; its candidates have the same but for those of the pod and the model.
# topology is as it was asked for, pod what it was taken for. step_seconds and mfu are the best there are of times_are, 'compiled' or
# 'predicted'; what begins with predicted_ is predicted in any case, as are tokens_per_day, days and chip_hours, and ranges are error_bar
# below and above.
KEYS = ('topology', 'pod', 'chips', 'slices', 'mesh', 'params', 'flops_per_step', 'hbm_gib', 'fits', 'step_seconds', 'mfu', 'times_are',
        'error_bar', 'predicted_step_seconds', 'predicted_step_seconds_range', 'predicted_mfu', 'predicted_mfu_range', 'bound_by',
        'comm_gib_per_axis', 'compile_seconds', 'verified', 'candidates')


def define(f: flags.FlagValues) -> None:
  """The flags of `plan`, besides --config."""
  flags.DEFINE_string('topology', None, 'the pod: v5p:4x4x8, or hosts × GPUs, h100:16x8; or a cloud\'s name, v5p-256, a3-highgpu-8g:16',
                      flag_values=f)
  flags.DEFINE_integer('slices', 1, 'TPU slices of that shape, joined by the network of their hosts', flag_values=f)
  flags.DEFINE_integer('best', 3, 'candidates to show, and to compile with --verify', flag_values=f)
  flags.DEFINE_bool('verify', False, 'compile the best for the pod, by the pod\'s own compiler', flag_values=f)
  flags.DEFINE_string('hlo', None, 'with --verify: write the best one\'s scheduled program to this file', flag_values=f)
  flags.DEFINE_string('json', None, 'write the result to this file too', flag_values=f)
  flags.DEFINE_bool('validate', False, 'what the planner says of steps that others measured, beside what they measured', flag_values=f)


def run(f, overrides: list[tuple[str, str]]) -> dict:
  """Runs `jaxlm plan` → what --json writes. Raises UsageError."""
  if f.validate:
    from jaxlm.plan import published, show  # pylint: disable=g-import-not-at-top
    results = published.results()
    show.validation(results)
    return {'rows': results}
  for name in ('config', 'topology'):
    if not f[name].value:
      raise UsageError(f'plan: wants --{name}=…')
  if f.hlo and not f.verify:
    raise UsageError(f'--hlo={f.hlo}: is of the compiled program; add --verify')
  if f.best < 1:
    raise UsageError(f'--best={f.best}: wants at least 1')
  from jaxlm.plan.topology import parse  # pylint: disable=g-import-not-at-top
  pod = parse(f.topology, f.slices)
  config = configs.load(f.config, overrides)
  if config.model.kind in ('ngram', 'rnn', 'rnn_seq2seq'):
    raise UsageError(f'model.kind={config.model.kind}: the planner knows transformers')
  from jaxlm.plan import compile as compiling, cost, search, show  # pylint: disable=g-import-not-at-top
  if f.verify:
    compiling.check_installed(pod)
  own = _own(config, pod)
  found, refused = search.search(config, pod, frozenset(key for key, _ in overrides))
  result = {'topology': f.topology, 'pod': pod.name, 'chips': pod.chips, 'slices': pod.slices,
            'as_stated': own if isinstance(own, str) else entry(own)}
  show.header(config, pod, own)
  show.refusals(refused)
  if not found and isinstance(own, str):
    raise UsageError(f'--topology={f.topology}: no mesh of its {pod.devices} devices does for this config: {own}')
  if found:
    entries = _verified(found, f) if f.verify else [entry(p) for p in found[:f.best]]
    show.candidates(found, entries)
  else:
    say(f'nothing fits {f.topology}: take more chips, or a smaller batch')
    found, entries = [own], []
  params = sum(a.size for a in found[0].job.arrays if a.of == 'params')
  return {**result, 'params': params, 'flops_per_step': cost.model_flops(config), **(entries[0] if entries else entry(own)),
          'candidates': entries, 'rejected': refused}


def _own(config, pod):
  """The plan of the config as it stands, or why it has none."""
  from jaxlm.plan import search  # pylint: disable=g-import-not-at-top
  try:
    return search.plan(config, filled(config.mesh, pod.devices), pod)
  except UsageError as e:
    return str(e)


def entry(p, compiled=None) -> dict:
  """A plan, as --json has it. compiled: compile.Compiled, of which then HBM is said."""
  from jaxlm.plan import cost, costed, legend, roofline, traffic  # pylint: disable=g-import-not-at-top
  by_class = {f.name: getattr(p.hbm, f.name) for f in dataclasses.fields(p.hbm)}
  predicted = {'arguments': p.hbm.arguments, 'temporaries': p.hbm.temporaries, 'peak': p.hbm.peak}
  c, pod = p.config, p.job.pod
  out = {
      'config': p.stated, 'mesh': p.job.mesh, 'hbm_gib': {**predicted, 'limit': p.limit}, 'predicted_hbm_gib': {**predicted, **by_class},
      'fits': p.fits, 'step_seconds': p.step.seconds, 'mfu': p.mfu, 'times_are': 'predicted', 'error_bar': roofline.ERROR,
      'predicted_step_seconds': p.step.seconds, 'predicted_step_seconds_range': legend.seconds_range(p.step.seconds),
      'predicted_mfu': p.mfu, 'predicted_mfu_range': legend.mfu_range(p.mfu), 'bound_by': p.step.bound_by,
      'seconds': dataclasses.asdict(p.step), 'comm_gib_per_axis': {a: b / 2 ** 30 for a, b in traffic.received(p.job).items() if b},
      **_run(c, p.step.seconds, pod.chips), 'compile_seconds': None, 'verified': False, 'compiled': None}
  if compiled:
    parts = costed.seconds(p.job, compiled)
    total = sum(parts.values()) if parts else None
    hbm = {'arguments': compiled.arguments, 'temporaries': compiled.temporaries, 'peak': compiled.peak, 'limit': p.limit}
    out |= {'hbm_gib': hbm, 'fits': compiled.peak <= p.limit, 'compile_seconds': compiled.seconds, 'verified': True, 'compiled': {
        'seconds': parts, 'collectives': [dataclasses.asdict(s) for s in costed.sent(p.job, compiled)],
        'step_seconds': total, 'mfu': total and cost.mfu(c, total, pod.chips, pod.chip.bf16),
        'error_of_peak': p.hbm.peak / compiled.peak - 1, 'error_of_step': total and p.step.seconds / total - 1}}
    if total:
      out['compiled'] |= _run(c, total, pod.chips)
      out |= {key: out['compiled'][key] for key in ('step_seconds', 'mfu')} | {'times_are': 'compiled'}
  return out


def _run(c, seconds: float, chips: int) -> dict[str, float]:
  """What a whole run comes to if a step takes so long."""
  hours = c.steps * seconds / 3600
  return {'tokens_per_day': c.batch * c.length * 86400 / seconds, 'days': hours / 24, 'chip_hours': hours * chips}


def _verified(found, f) -> list[dict]:
  """Entries of the best that the compiler says fit, the fastest by its word first; those that it refuses are said and passed over."""
  from jaxlm.plan import compile as compiling  # pylint: disable=g-import-not-at-top
  out = []
  for p in found:
    if len(out) == f.best:
      break
    say(f'compiling {" ".join(f"{k}={v}" for k, v in p.stated.items())} …')
    try:
      compiled = compiling.step(p.config, f.topology, f.slices)
    except compiling.DoesNotFit as e:
      say(f'  the compiler refuses it: {e}')
      continue
    out.append((entry(p, compiled), compiled.text))
  if not out:
    raise UsageError(f'--topology={f.topology}: of what the planner takes to fit, the compiler lets nothing; see above')
  out.sort(key=lambda pair: pair[0]['step_seconds'])
  if f.hlo:
    with open(f.hlo, 'w', encoding='utf-8') as file:
      file.write(out[0][1])
    say(f'wrote {f.hlo}')
  return [e for e, _ in out]
