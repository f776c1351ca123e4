"""Programs of the compiler, cut short, and what is in them."""
import types

import pytest

from jaxlm.plan import costed, hlo

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


# Shapes have tilings, and the text has more of everything.
OF_0_0_52 = """HloModule step

%called.1 (p: bf16[8,512]) -> bf16[64,512] {
  ROOT %all-gather.9 = bf16[64,512]{1,0} all-gather(%p), dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[]) -> f32[] {
  %all-gather.9.cloned.1.call-start = ((), (), (s32[8192]{0:T(1024)}, s32[1]{0:S(2)})) custom-call-start(), async_execution_thread="sparsecore"
  %all-gather.9.cloned.1.call-update = ((bf16[8,512]{1,0:T(8,128)(2,1)}), bf16[64,512]{1,0:T(8,128)(2,1)}, (s32[8192]{0:T(1024)})) custom-call-update(%all-gather.9.cloned.1.call-start, %w)
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%plain, backend_config={"estimated_cycles":"1000"}
  %all-gather.9.cloned.1.call-done = bf16[64,512]{1,0} custom-call-done(%all-gather.9.cloned.1.call-update)
  %all-reduce.7.cloned.1.call-update = ((f32[4]{0}, f32[512]{0}), (f32[4]{0}, f32[512]{0}), (s32[9]{0})) custom-call-update(%s, %y, %z)
  %all-reduce.7.cloned.1.call-done = (f32[4]{0}, f32[512]{0}) custom-call-done(%all-reduce.7.cloned.1.call-update)
}
"""
OF_0_0_42 = OF_0_0_52[:OF_0_0_52.index('  %all-gather.9.cloned')] + """  %all-gather.9.cloned.1.call-start = ((bf16[8,512]{1,0}, token[]), bf16[64,512]{1,0}) call-start(%w, %prepared), async_execution_thread="sparsecore", to_apply=%called.1
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%plain, backend_config={"estimated_cycles":"1000"}
  %all-gather.9.cloned.1.call-done = bf16[64,512]{1,0} call-done(%all-gather.9.cloned.1.call-start)
}
"""


@pytest.mark.parametrize('text', [OF_0_0_52, OF_0_0_42], ids=['libtpu 0.0.52', 'libtpu 0.0.42'])
def test_collectives_of_sparse_cores_are_counted(text):
  ops = hlo.read(text)
  gather, *sums = hlo.collectives(ops)
  assert (gather.kind, gather.is_async, gather.bytes) == ('all-gather', True, 64 * 512 * 2)
  assert [(op.kind, op.bytes) for op in sums] == ([('all-reduce', 4 * 516)] if text is OF_0_0_52 else [])
  assert next(op for op in ops if op.kind == 'done').waits_for == gather.name and hlo.seconds(ops, 1e3) == 1.


def test_what_is_waited_for_is_what_the_schedule_leaves(monkeypatch):
  """On links that bring 64 KiB a second, a gather of 64 KiB takes one; beside 0.25 s of work 0.75 s are waited for, and then the sum,
  which nothing runs beside, goes there and back."""
  chip = types.SimpleNamespace(link=2 ** 14, links=4, devices=1, hertz=4e3)
  job = types.SimpleNamespace(pod=types.SimpleNamespace(chip=chip))
  monkeypatch.setattr(costed, '_kernels', lambda j, ops: {})
  compiled = types.SimpleNamespace(ops=hlo.read(OF_0_0_52))
  seconds = costed.seconds(job, compiled)
  assert seconds['fusions'] == 0.25 and seconds['waits'] == pytest.approx(0.75 + 2 * 4 * 516 / 2 ** 16)
  sent = {s.kind: (s.bytes, s.hidden) for s in costed.sent(job, compiled)}
  assert sent == {'all-gather': (2 ** 16, pytest.approx(0.25)), 'all-reduce': (4 * 516, 0.)}
  chip.hertz = 0.  # nothing is known of time: what is asynchronous counts as hidden
  assert costed.seconds(job, compiled) is None and {s.hidden for s in costed.sent(job, compiled)} == {1.}


CONTINUED = """HloModule m

%started.1 (p: bf16[8,512]) -> bf16[64,512] {
  %p = bf16[8,512]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[64,512]{1,0} all-gather(%p), dimensions={0}
}

%all-reduce-scatter.1 (q: f32[32,512]) -> f32[4,512] {
  %q = f32[32,512]{1,0} parameter(0)
  %all-reduce.3 = f32[32,512]{1,0} all-reduce(%q), to_apply=%add
  ROOT %dynamic-slice.3 = f32[4,512]{1,0} dynamic-slice(%all-reduce.3, %n), dynamic_slice_sizes={4,512}
}

ENTRY %main (a: f32[]) -> f32[] {
  %async-collective-start.1 = (bf16[8,512]{1,0}, bf16[64,512]{1,0}) fusion(%w), kind=kCustom, calls=%started.1
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%plain, backend_config={"estimated_cycles":"1000"}
  %async-collective-done.1 = bf16[64,512]{1,0} fusion(%async-collective-start.1), kind=kCustom, calls=%ended.1
  %all-reduce-scatter.1 = f32[4,512]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_collective_in_a_fusion_is_sent_once(monkeypatch):
  """The fusion has its name. Of the gather's second, a quarter is hidden; the reduce-scatter waits for its own."""
  chip = types.SimpleNamespace(link=2 ** 14, links=4, devices=1, hertz=4e3)
  job, compiled = types.SimpleNamespace(pod=types.SimpleNamespace(chip=chip)), types.SimpleNamespace(ops=hlo.read(CONTINUED))
  monkeypatch.setattr(costed, '_kernels', lambda j, ops: {})
  assert costed.seconds(job, compiled)['waits'] == pytest.approx(.75 + 1)
  assert {s.kind: (s.bytes, s.hidden) for s in costed.sent(job, compiled)} == {
      'all-gather': (2 ** 16, pytest.approx(.25)), 'reduce-scatter': (2 ** 16, 0.)}
