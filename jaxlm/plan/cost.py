"""What a model and a step cost, counted from the config alone; nothing here imports jax."""
from jaxlm.schema import GATED, Config, ModelConfig, layer_kinds


def projections(m: ModelConfig) -> dict[str, int]:
  """Weights of a layer's projections, by that of tensors.TENSORS which they make."""
  if not m.mla.kv:
    return {'q': m.D * m.H * m.K, 'k': m.D * m.G * m.K, 'v': m.D * m.G * m.K, 'attention_out': m.H * m.K * m.D}
  a = m.mla
  return {'latent': m.D * (a.q + a.kv + a.rope), 'q': (a.q or m.D) * m.H * m.K, 'k': a.kv * m.H * (m.K - a.rope),
          'v': a.kv * m.H * a.v, 'attention_out': m.H * a.v * m.D}


def _layers(m: ModelConfig, experts: int) -> int:
  """Weights of all layers, with so many experts in each mixture."""
  per_ffn = (3 if m.mlp in GATED else 2) * m.D
  feeds = {'mlp': per_ffn * m.F, 'moe': m.D * m.moe.E + per_ffn * (experts * m.moe.F + m.moe.shared)}
  return m.N * sum(projections(m).values()) + sum(feeds[feed] for _, feed in layer_kinds(m))


def approximate_params(m: ModelConfig) -> int:
  """Parameters but norms and biases, with no model built: what memory to keep, before jax is there."""
  return _layers(m, m.moe.E) + (m.V * (1 if m.tied else 2) + m.P) * m.D


def weights_of_a_token(m: ModelConfig) -> int:
  """Parameters that each token of a decoder is multiplied with: of mixtures only those of its experts; no table that is only
  looked up, no norms and biases."""
  return _layers(m, m.moe.top_k) + m.V * m.D


def scores(m: ModelConfig, length: int) -> float:
  """Σ over layers of the keys that a token sees on average, in rows of one document: causal, so half of the length; fewer where
  the pattern is local."""
  def seen(where):
    w = m.window
    return length / 2 if where != 'local' or w >= length else w - w * w / (2 * length)
  return sum(seen(where) for where, _ in layer_kinds(m))


def model_flops(c: Config) -> float:
  """Of a step of a decoder: forward once and backward twice, each multiply-add as 2. Scores that a causal mask hides are not
  counted, nor is anything that is computed again (Chowdhery et al. 2022, PaLM, appendix B, but for the mask)."""
  m = c.model
  attention = 2 * m.H * (m.K + (m.mla.v or m.K)) * scores(m, c.length)
  return 3. * (2 * weights_of_a_token(m) + attention) * c.batch * c.length


def mfu(c: Config, seconds: float, chips: int, peak: float) -> float:
  """Model FLOPs utilisation: model_flops ÷ what so many chips could have done."""
  return model_flops(c) / (seconds * chips * peak)
