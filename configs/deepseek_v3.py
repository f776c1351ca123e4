"""DeepSeek-V3 (Liu et al. 2024), without its extra predictor: latent attention; after three dense layers, 256 experts a
layer and a shared one; eight of them a token, from the best four of eight groups, chosen with biases that even out loads.

Parameters: 2·129,280·7,168 + 61·187.1M (attention) + 3·396.4M (dense) + 58·11.318B (experts) = 671.0B; 37B a token.
Tokens: 15,360 × 4,096 = 62.9M a step × 235,000 steps = 14.8T. FLOPs: ≈ 6 · 37B · 14.8T = 3.3e24.
The scaled rope is that of the published weights, which reach 163,840 tokens; from scratch, leave it (rope.scaling=none).
"""
from ml_collections import ConfigDict


def get_config():
  K = 192
  return ConfigDict(dict(
      steps=235_000, batch=15_360, length=4096, log_every=5, save_every=200,
      model=dict(D=7168, H=128, G=128, K=K, F=18_432, N=61, V=129_280, tied=False, norm_eps=1e-6,
                 attention_scale=K ** -0.5 * 1.3688879454113937 ** 2,  # 0.1·ln 40 + 1, squared (YaRN)
                 mla=dict(kv=512, q=1536, rope=64, v=128),
                 moe=dict(E=256, F=2048, top_k=8, first=3, shared=2048, score='sigmoid', scale=2.5, groups=8, top_groups=4,
                          bias=True, bias_rate=1e-3, balance_loss=1e-4),
                 rope=dict(scaling='yarn', factor=40., original=4096, low=1., high=32.), dtype='bfloat16', remat='full'),
      loss=dict(chunks=16),
      optimizer=dict(lr=2.2e-4, schedule='wsd', warmup=2000, decay=0.3, final=0.03),
      data=dict(tokenizer='bpe:128000'),
  ))
