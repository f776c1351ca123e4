"""`make planner`: the planner's error bar. Fits roofline.REACHED on half of the published steps and writes docs/planner.md, where the
other half judges it, with HBM predicted beside what compilers want (from `make pods`).

The numbers it prints are those that stand in roofline.REACHED, ERROR and WITHIN; tests hold them to it.

    python benchmarks/planner.py
"""
from running import parse, parser

from jaxlm.plan import legend, published, roofline

HEAD = """# How far the planner is off

Made by `make planner` (benchmarks/planner.py). Seconds of a step as others measured them on hardware, and as `jaxlm plan` predicts
them from the config, the mesh and the pod alone. What a row ran and where its number is from stands in jaxlm/plan/published.py.

**Error bar: ± {error:.0%}.** Of the {held} steps that nothing was fitted on, {within} were measured inside predicted ± {error:.0%}, which is
the least multiple of 5% that does for nine of ten. Every time and MFU that `jaxlm plan` predicts is shown with it.

    step = products / (peak · a) + attention / (peak · b) + elementwise bytes · c / HBM bandwidth
           + d · time of weights and gradients on their way + e · that of mesh.tensor
           + what keys over mesh.context and the host's memory take beyond attention and half of the step, + the pipeline's bubble
    MFU  = 3 · (2 · weights a token meets + 2 · H · (K + V's K) · keys it sees) · tokens / (step · chips · peak bf16)

Products and attention are the model's operations with all that is computed again for the backward pass; keys that a causal mask hides
are not counted, in neither line, so that MFU here is below that of sources that count them: theirs are put on this scale. Attention's
share b is of a chip whose matrix unit is as wide as a head; v6e's and TPU7x's are twice as wide. The numbers a to e are
`roofline.REACHED`; a to d were fitted on the first part of the rows, by least squares of the logarithm of the ratio, held near what
compiled programs say, and judged on the second. Aim: each row of the second within 15%. How far d may go from
where the search begins was narrowed after a fit came out above 1, which no share can be: with all rows in sight.

Where weights are gathered over all chips of a v4, v5p or TPU7x slice of whole cubes (mesh.fsdp alone), the TPU compiler adds up wholes
in place of gathering pieces (`traffic.summed`). That is twice the bytes, of which the second half counts as hidden where SparseCores
carry them, and zeros to write, which counts in full. Compiled, Llama-3-8B on v5p:4x4x8 takes 1.60 s by fsdp 128 and 1.50 s by
data 2 × fsdp 64.

Not in the second part, because its two published numbers contradict each other: MaxText's 405B on v6e-256 (38.55% and 123 tokens/s a
chip are 10% apart, by any count of FLOPs); its recipe on two slices, with a logged step, stands for it.

## What its words mean

{legend}
"""


def main() -> None:
  flags = parse(parser(__doc__, out='docs'))
  for platform in ['gpu'] if flags.short else roofline.REACHED:
    print(platform, published.fit(platform), 'in the code:', roofline.REACHED[platform])
  results = published.results()
  error, (within, held) = published.error(results)
  print('error bar', error, (within, held), 'in the code:', roofline.ERROR, roofline.WITHIN)
  words = [f'| {name} | {meaning} |' for part in (legend.NUMBERS, legend.MEMORY, legend.TIME) for name, meaning in part.items()]
  lines = [HEAD.format(error=error, within=within, held=held, legend='\n'.join(['| word | what it is |', '|---|---|', *words]))]
  for fitted, title in ((True, 'Fitted on'), (False, 'Held out')):
    rows = [r for r in results if r['fitted'] == fitted]
    close = sum(published.off(r) <= error for r in rows)
    lines += [f'## {title}: {close} of {len(rows)} inside predicted ± {error:.0%}\n',
              '| step | published, s | predicted | ratio | published MFU | predicted MFU | tokens/s a chip | source |',
              '|---|---|---|---|---|---|---|---|']
    lines += [f'| {r["name"]} | {r["published_seconds"]:.3f} | {legend.predicted_seconds(r["predicted_seconds"])} | {r["ratio"]:.2f} | '
              f'{r["published_mfu"]:.1%} | {legend.predicted_mfu(r["predicted_mfu"])} | {r["tokens_per_second_per_chip"]:,.0f} | '
              f'{r["source"]} |' for r in rows]
    lines.append('')
  (flags.out / 'planner.md').write_text('\n'.join(lines), encoding='utf-8')


if __name__ == '__main__':
  main()
