"""The line of the textbook at about equal parameters, 1.7M, on the same tokens: configs/ladder.py:MODEL, where MODEL is a key
of MODELS. `make ladder` trains and scores them all (benchmarks/ladder.py).

Parameters: 4,096·D for the embedding, tied, and, with w = 4·D² of an attention,
    lstm         D=224: 917,504 + 2·(8·D² + 8·D) = 1.72M
    gru_seq2seq  D=224: 917,504 + 2·6·D² + attention 3·D² = 1.67M
    transformer  D=128, F=512: 524,288 + 2·(w + 2·D·F) + 3·(2·w + 2·D·F) = 1.71M
    t5           D=128, F=320: 524,288 + 2·(w + 3·D·F) + 3·(2·w + 3·D·F) = 1.66M
    bert         D=128, F=512: 524,288 + 6·(w + 2·D·F) + positions, transform = 1.76M
    gpt2         D=128, F=512: 524,288 + 6·(w + 2·D·F) + positions = 1.74M
    llama        D=128, F=384: 524,288 + 6·(3·D² + 3·D·F) = 1.71M
    moe          as llama, 4 experts of F=96 of which a token takes 2 = 1.71M, 1.26M of them for a token
Tokens: 350 steps × 4,096 = 1.4M for each.
"""
from ml_collections import ConfigDict

BASE = dict(
    steps=350, batch=16, length=256, log_every=50, save_every=350,
    loss=dict(chunks=4), data=dict(source='stdlib', tokenizer='bpe:4096', heldout=0.02),
    optimizer=dict(name='muon', lr=4e-3, schedule='wsd', warmup=25, decay=0.4, final=0.02))
BESIDE = dict(name='next', source=256)
POSTNORM = dict(norm='layer', norm_place='after', mlp='relu', bias='all')
MODELS = {
    'lstm': dict(model=dict(kind='rnn', D=224, N=2, init_std=0.06), data=dict(order='contiguous'),
                 optimizer=dict(name='adamw', lr=1e-2)),
    'gru_seq2seq': dict(
        model=dict(kind='rnn_seq2seq', D=224, N=1, init_std=0.06, rnn=dict(cell='gru', attention='luong')), objective=BESIDE,
        optimizer=dict(name='adamw', lr=1e-2)),
    'transformer': dict(model=dict(kind='seq2seq', D=128, H=4, G=4, K=32, F=512, N=3, encoder_N=2, position='sinusoidal',
                                   scale_embedding=True, **POSTNORM),
                        objective=BESIDE, loss=dict(smoothing=0.), optimizer=dict(schedule='inverse_sqrt', warmup=100)),
    't5': dict(model=dict(kind='seq2seq', D=128, H=4, G=4, K=32, F=320, N=3, encoder_N=2, position='relative', mlp='geglu'),
               objective=BESIDE),
    # Norms before the layers; after them, as BERT has it, 2.483 bits a byte of stdlib for 2.477, 2.915 of Shakespeare for 2.917.
    'bert': dict(model=dict(kind='encoder', D=128, H=4, G=4, K=32, F=512, N=6, V=4104, vocab=4097, P=256, norm='layer',
                            norm_place='pre', embed_norm=True, position='learned', mlp='gelu_exact', bias='all', head='mlm',
                            output_bias=True),
                 objective=dict(name='mask', share=0.25)),
    'gpt2': dict(model=dict(D=128, H=4, G=4, K=32, F=512, N=6, P=256, norm='layer', position='learned', mlp='gelu', bias='all')),
    'llama': dict(model=dict(D=128, H=2, G=1, K=64, F=384, N=6)),
    'moe': dict(model=dict(D=128, H=2, G=1, K=64, F=384, N=6, moe=dict(E=4, F=96, top_k=2, balance_loss=0.01))),
}


def get_config(model='llama'):
  config = ConfigDict(BASE)
  config.model = ConfigDict(dict(V=4096))
  for section, values in MODELS[model].items():
    config[section] = ConfigDict({**(config[section].to_dict() if section in config else {}), **values})
  return config
