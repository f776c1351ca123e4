"""What an assistant says next, by a decoder: configs/finetune/dialogue.py[:TEMPLATE], where TEMPLATE is a key of TEMPLATES. Only
what the assistant says counts in the loss. Data: `jaxlm data fetch dialogue --out=runs/data`, 5,000 exchanges of Shakespeare's
plays; any JSON lines with messages (role, content) will do, and with a network a TFDS of that form.

From scratch, a small Llama: 4,096·D + 4·(2·D·64·(H + G) + 3·D·F) = 4.0M parameters with D=256, F=640. To start from a model that
has read: --config.start.checkpoint=WORKDIR --config.data.tokenizer=start, the sizes of its config.json, and the template that its
vocabulary has the words for. Ask it: `jaxlm generate --workdir=DIR --prompt='Who goes there?'`.
"""
from ml_collections import ConfigDict

TEMPLATES = {
    'plain': '{role}:\n{content}\n\n',
    'chatml': '<|im_start|>{role}\n{content}<|im_end|>\n',  # SmolLM2, Qwen
    'llama3': '<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>',
}


def get_config(template='plain'):
  return ConfigDict(dict(
      steps=600, batch=16, length=256, log_every=50, save_every=200, eval_every=200,
      model=dict(D=256, H=4, G=2, K=64, F=640, N=4, dropout=0.1),
      objective=dict(name='answer'), optimizer=dict(lr=1e-3, warmup=50, final=0.05),
      data=dict(source='jsonl:runs/data/dialogue.jsonl', form='chat', key='messages', template=TEMPLATES[template], heldout=0.05)))
