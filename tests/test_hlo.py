"""Programs of the compiler, cut short, and what is in them."""
from jaxlm.plan import hlo

LOOP = """HloModule step

%all-reduce-scatter.3 (input: f32[4096,512]) -> f32[128,512] {
  %input = f32[4096,512]{1,0} parameter(0)
  %all-reduce.8 = f32[4096,512]{1,0} all-reduce(%input), to_apply=%add
  ROOT %piece = f32[128,512]{1,0} dynamic-slice(%all-reduce.8, %start), dynamic_slice_sizes={128,512}
}

%body (state: (s32[], f32[4096,512])) -> (s32[], f32[4096,512]) {
  %all-gather.1 = bf16[4096,512]{1,0} all-gather(%cast), dimensions={0}
  %fusion.7 = f32[128,512]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3, metadata={op_name="up/dot"}
}

ENTRY %main (a: f32[]) -> f32[] {
  %while.1 = (s32[], f32[4096,512]) while(%init), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"32"}}
}
"""


def test_a_sum_whose_piece_is_kept_is_a_reduce_scatter_of_the_whole():
  gather, scatter = hlo.collectives(hlo.read(LOOP))
  assert (gather.kind, gather.times, gather.bytes) == ('all-gather', 32, 4096 * 512 * 2)
  assert (scatter.kind, scatter.times, scatter.bytes, scatter.where) == ('reduce-scatter', 32, 4096 * 512 * 4, 'up/dot')


ASYNC = LOOP.replace('  %fusion.7', """  %async-collective-start.2 = (bf16[8,512], bf16[64,512]{1,0}) fusion(%w), kind=kCustom, calls=%begin
  %fusion.9 = (f32[8], bf16[64,512]{1,0}) fusion(%w, %x), kind=kCustom, calls=%async_collective_fusion.4
  %async-collective-done.2 = bf16[64,512]{1,0} fusion(%fusion.9), kind=kCustom, calls=%finish
  %fusion.7""") + """
%begin (w: bf16[8,512]) -> (bf16[8,512], bf16[64,512]) {
  %all-gather.5 = bf16[64,512]{1,0} all-gather(%w), dimensions={0}
}

%async_collective_fusion.4 (w: bf16[8,512], x: f32[8]) -> (f32[8], bf16[64,512]) {
  %all-gather.6 = bf16[64,512]{1,0} all-gather(%w), dimensions={0}
}

%finish (w: bf16[64,512]) -> bf16[64,512] {
  %all-gather.7 = bf16[64,512]{1,0} all-gather(%w), dimensions={0}
}
"""


def test_a_gather_that_goes_on_beside_others_is_counted_once():
  """The TPU compiler writes it thrice: where it starts, in the matrix product that it goes on beside, and where it ends."""
  kinds = [(op.kind, op.is_async, op.bytes) for op in hlo.collectives(hlo.read(ASYNC))]
  assert kinds == [('all-gather', False, 4096 * 512 * 2), ('all-gather', True, 64 * 512 * 2), ('reduce-scatter', False, 4096 * 512 * 4)]
