"""Tiny random models of every family, in transformers: the references that the tests compare with."""
import torch
import transformers

SIZES = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
             num_hidden_layers=3, vocab_size=272, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
WINDOW = 7  # less than the length that is compared
_MOE = dict(num_experts_per_tok=2, moe_intermediate_size=24)
_YARN = {'rope_type': 'yarn', 'rope_theta': 5e3, 'factor': 4., 'original_max_position_embeddings': 16, 'beta_fast': 2.,
         'beta_slow': .5}
_GEMMA = dict(SIZES, sliding_window=WINDOW, query_pre_attn_scalar=12, rms_norm_eps=1e-5)
_GPT = dict(vocab_size=272, bos_token_id=1, eos_token_id=2, pad_token_id=0)

# name → (config class, its arguments)
FAMILIES = {
    'gpt2': ('GPT2Config', dict(_GPT, n_embd=32, n_head=4, n_layer=3, n_positions=64)),
    'gpt3 (gpt_neo)': ('GPTNeoConfig', dict(_GPT, hidden_size=32, num_heads=4, num_layers=4, window_size=WINDOW,
                                            attention_types=[[['global', 'local'], 2]], max_position_embeddings=64)),
    'pythia (gpt_neox)': ('GPTNeoXConfig', dict({k: v for k, v in SIZES.items() if k not in ('head_dim', 'num_key_value_heads')},
                                                rope_parameters={'rope_type': 'default', 'rope_theta': 1e3,
                                                                 'partial_rotary_factor': 0.25})),
    'gpt_neox, sequential': ('GPTNeoXConfig', dict({k: v for k, v in SIZES.items() if k not in ('head_dim', 'num_key_value_heads')},
                                                   use_parallel_residual=False)),
    'llama 2': ('LlamaConfig', dict(SIZES, num_key_value_heads=4)),
    'llama 3': ('LlamaConfig', dict(SIZES, rope_parameters={
        'rope_type': 'llama3', 'rope_theta': 500., 'factor': 4., 'low_freq_factor': 1., 'high_freq_factor': 4.,
        'original_max_position_embeddings': 16})),
    'llama, linear rope': ('LlamaConfig', dict(SIZES, rope_parameters={'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 2.})),
    'llama, yarn': ('LlamaConfig', dict(SIZES, rope_parameters=_YARN)),
    'smollm2': ('LlamaConfig', dict(SIZES, tie_word_embeddings=True, rope_parameters={'rope_type': 'default', 'rope_theta': 1e5})),
    'mistral': ('MistralConfig', dict(SIZES, sliding_window=WINDOW)),
    'mixtral': ('MixtralConfig', dict(SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    'qwen2': ('Qwen2Config', dict(SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    'qwen3': ('Qwen3Config', dict(SIZES, tie_word_embeddings=True)),
    'qwen3_moe': ('Qwen3MoeConfig', dict(SIZES, **_MOE, num_experts=4, num_local_experts=4, norm_topk_prob=True, mlp_only_layers=[0])),
    'qwen3_moe, every second': ('Qwen3MoeConfig', dict(SIZES, **_MOE, num_experts=4, num_local_experts=4, decoder_sparse_step=2,
                                                       num_hidden_layers=5)),
    'gemma2': ('Gemma2Config', dict(_GEMMA, attn_logit_softcapping=3., final_logit_softcapping=2.)),
    'gemma3': ('Gemma3TextConfig', dict(_GEMMA, num_hidden_layers=8, sliding_window_pattern=3, rope_parameters={
        'full_attention': {'rope_type': 'linear', 'rope_theta': 1e3, 'factor': 2.},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e2}})),
    'olmo2': ('Olmo2Config', dict({k: v for k, v in SIZES.items() if k != 'head_dim'})),
    'phi3': ('Phi3Config', dict({k: v for k, v in SIZES.items() if k != 'head_dim'}, sliding_window=WINDOW,
                                rope_parameters={'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5})),
    'deepseek_v3': ('DeepseekV3Config', dict(
        {k: v for k, v in SIZES.items() if k != 'head_dim'}, **_MOE, n_routed_experts=8, n_shared_experts=2, n_group=4, topk_group=2,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8, first_k_dense_replace=1,
        num_key_value_heads=4, num_mtp_layers=0, rope_parameters={**_YARN, 'mscale': 1., 'mscale_all_dim': 1.})),
    'deepseek_v3, full queries': ('DeepseekV3Config', dict(
        {k: v for k, v in SIZES.items() if k != 'head_dim'}, **_MOE, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1,
        q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6, first_k_dense_replace=0,
        num_key_value_heads=4, num_mtp_layers=0)),
}


def make(name: str, seed: int = 0):
  """The family's tiny model with noise on every parameter and buffer of weight, so that norms of 1 and biases of 0 hide
  nothing; eager attention, in float32."""
  kind, arguments = FAMILIES[name]
  config = getattr(transformers, kind)(**arguments)
  torch.manual_seed(seed)  # of the initialisation: what other tests drew is no part of it
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').float().eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for key, p in [*model.named_parameters(), *model.named_buffers()]:
      if p.dtype.is_floating_point and ('bias' in key or 'weight' in key or 'proj' in key):
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
  return model
