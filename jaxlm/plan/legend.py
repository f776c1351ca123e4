"""What the planner's words mean, a line each, for someone who has not trained on a pod before; and how its numbers are written.

`jaxlm plan` shows the lines under its tables, benchmarks/planner.py writes them into docs/planner.md.
"""
import math

from jaxlm.plan.roofline import ERROR, WITHIN

MEMORY = {
    'weights': 'the model\'s parameters: a device\'s own share of them',
    'optimizer': 'what the optimizer remembers of every parameter, such as the two moments of Adam',
    'gradients': 'how the loss changes with every parameter; twice that while microbatches are being summed',
    'activations': 'results of the forward pass, kept until the backward pass needs them (model.remat says which)',
    'logits': 'a score for every entry of the vocabulary, for the tokens whose loss is being computed',
    'buffers': 'room for the layer at work: its inputs and outputs, and its weights gathered from the other devices',
    'host': 'offloaded to the memory of the machine that the chips are in, so none of the HBM',
    'peak': 'the most HBM that is in use at once: all of these but host',
}
TIME = {
    'matrix products': 'activations multiplied by weights, with what is computed again because it was not kept',
    'attention': 'tokens compared with the other tokens of their row',
    'elementwise': 'all else that a chip computes (norms, activation functions, the optimizer): as fast as HBM can be read and written',
    'waits for mesh.data': 'the chip is idle until gradients are summed over the copies of the model',
    'waits for mesh.fsdp': 'the chip is idle until weights have come from the devices that share them, and gradients gone there',
    'waits for mesh.tensor': 'the chip is idle until activations have come from the devices that compute the same layer',
    'waits for mesh.context': 'the chip is idle until keys and values have come from the devices with the other parts of the row',
    'waits for mesh.expert': 'the chip is idle until tokens have come to their experts, or back',
    'waits for mesh.stage': 'the chip is idle until activations have come from the stage before',
    'waits for the host': 'the chip is idle until what is offloaded has come back from the host\'s memory',
    'bubble of the pipeline': 'the first microbatches have not come to a stage yet, or the last have left it',
    'step': 'all of these: one update of the weights',
}
NUMBERS = {
    'HBM': 'a chip\'s own memory; GiB are the most of it that a device uses at once',
    'MFU': 'model FLOPs utilisation: the share of the chips\' peak that the model\'s own arithmetic makes use of; what is computed '
           'again does not count',
    'predicted': f'counted from the config and the pod, with nothing compiled. Of {WITHIN[1]} steps that others measured, and that '
                 f'nothing was fitted on, {WITHIN[0]} took what is predicted ± {ERROR:.0%} (docs/planner.md)',
    'compiled': 'from the program that the pod\'s own compiler made of this step: its memory, and the time that it counts for it, as '
                'if nothing ever got in its way. Not held against measured steps, so that it has no error bar',
}


def seconds(value: float) -> str:
  """Three digits, for that is more than a prediction is good for: '2.00 s', '131 s'."""
  return f'{digits(value)} s'


def digits(value: float) -> str:
  return f'{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}' if value > 0 else '0'


def predicted_seconds(value: float) -> str:
  """'2.00 s ± 15%'."""
  return f'{seconds(value)} ± {ERROR:.0%}'


def predicted_mfu(value: float) -> str:
  """'53.2% (46–63%)': of steps that take 15% more, or less."""
  low, high = mfu_range(value)
  return f'{value:.1%} ({100 * low:.0f}–{high:.0%})'


def seconds_range(value: float) -> tuple[float, float]:
  return value * (1 - ERROR), value * (1 + ERROR)


def mfu_range(value: float) -> tuple[float, float]:
  return value / (1 + ERROR), value / (1 - ERROR)
