"""The profile of bench.py gpu: events to shares, HLO text to operations, and a real small step."""

import json
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT

LAYER = "jit(step)/jvp(Decoder.hidden)/model/while/body/closed_call/layers"
BACK = "jit(step)/transpose(jvp(Decoder.hidden))/model/while/body/closed_call/checkpoint/layers"
OP_NAMES = {
    "cublas-gemm.1": f"{LAYER}/mlp/up_proj/dot_general",
    "cublas-gemm.2": f"{BACK}/mlp/up_proj/lora/dot_general",
    "gemm_fusion_dot.3": "jit(step)/jvp(loss)/while/body/closed_call/jvp(Decoder.logits)/lm_head/dot_general",
    "custom-call.4": f"{BACK}/self_attn/self_attn._whole_rows/attention/dot_product_attention_bwd",
    "input_reduce_fusion": f"{LAYER}/input_layernorm/reduce_sum",
    "loop_multiply_fusion.5": "jit(step)/update/mul",
    "loop_convert_fusion.3": f"{LAYER}/self_attn/convert_element_type",
    "dynamic-slice_fusion.2": "jit(step)/jvp(Decoder.hidden)/model/while/body/dynamic_slice",
}
GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel"
SDPA = "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0"
A, B = "/device:GPU:0 0 Stream #13(Compute)", "/device:GPU:0 1 Stream #14(MemcpyD2D)"


@pytest.fixture(autouse=True)
def experiments(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")


def reduced(events, steps=1, op_names=OP_NAMES):
    from bench.gpu.trace import summarize_trace

    return summarize_trace(
        [(line, name, op, start * 1e6, length * 1e6) for line, name, op, start, length in events], op_names, steps
    )


def test_kernels_count_where_their_instruction_comes_from():
    """One name of a kernel serves the base, the pairs and the head."""
    events = [
        (A, GEMM, "cublas-gemm.1", 0, 15),
        (A, GEMM, "dynamic-slice_fusion.2", 15, 5),  # a product that writes to its place among the layers
        (A, GEMM, "while.7::cublas-gemm.2", 20, 8),
        (A, "gemm_fusion_dot_3", "gemm_fusion_dot.3", 28, 12),
        (A, SDPA, "custom-call.4", 40, 16),
        (A, "input_reduce_fusion", "input_reduce_fusion", 56, 6),
        (A, "loop_multiply_fusion_5", "loop_multiply_fusion.5", 62, 4),
        (A, "loop_convert_fusion_3", "loop_convert_fusion.3", 66, 10),
        (A, "MemcpyD2D", "copy.9", 76, 2),
        (A, "unheard_of", "", 78, 2),
        (A, GEMM, f"{LAYER}/mlp/down_proj/dot_general", 80, 20),  # the trace itself tells the operation
    ]
    found = reduced(events, steps=2)
    wanted = {"base products": 40, "attention": 16, "low-rank path": 8, "elementwise": 6, "head and loss": 12}
    wanted |= {"optimizer": 4, "copies": 12, "other": 2}
    assert found["shares"] == pytest.approx({part: time / 100 for part, time in wanted.items()})
    assert found["milliseconds"] == pytest.approx({part: time / 2 for part, time in wanted.items()})
    assert found["idle"] == 0 and found["guessed"] == pytest.approx(0.04) and found["traced_milliseconds"] == 50
    first, second = found["kernels"][:2]
    assert first["name"] == GEMM[:120] and first["part"] == "base products" and first["calls"] == 2
    assert first["milliseconds"] == pytest.approx(24) and first["share"] == pytest.approx(0.48)
    assert first["operation"] == f"{LAYER}/mlp/down_proj/dot_general" and second["part"] == "attention"


def test_time_on_two_streams_is_busy_once():
    events = [(A, GEMM, "cublas-gemm.1", 10, 40), (B, "MemcpyD2D", "", 30, 40), (A, GEMM, "cublas-gemm.1", 90, 20)]
    found = reduced(events)
    assert found["traced_milliseconds"] == 100 and found["idle_milliseconds"] == pytest.approx(20)
    assert found["idle"] == pytest.approx(0.2) and found["milliseconds"]["copies"] == pytest.approx(40)
    assert found["shares"]["base products"] == pytest.approx(0.6)


def test_what_lies_in_another_event_of_its_line_counts_once():
    """And what a loop holds runs on other threads, too: a loop itself is no work."""
    one, two = "/host:CPU 3 worker/1", "/host:CPU 4 worker/2"
    names = {"fusion.1": f"{LAYER}/mlp/mul", "dot.2": f"{LAYER}/mlp/up_proj/dot_general"}
    events = [
        (one, "while.4", "while.4", 0, 100),
        (one, "fusion.1", "fusion.1", 10, 40),
        (one, "dot.2", "dot.2", 20, 25),
        (one, "dot.2", "dot.2", 60, 10),
        (two, "dot.2", "dot.2", 70, 30),
        (two, "dot.2", "dot.2", 96, 8),  # begins in another, but does not lie in it
    ]
    found = reduced(events, op_names=names)
    assert found["milliseconds"]["elementwise"] == pytest.approx(15)
    assert found["milliseconds"]["base products"] == pytest.approx(73) and found["milliseconds"]["other"] == 0
    assert found["traced_milliseconds"] == 94 and found["idle_milliseconds"] == pytest.approx(10)


def test_names_decide_where_a_command_buffer_hides_instructions():
    """XLA's own kernels are called as their instructions; of a library's the name tells the kind."""
    names = {
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT": "base products",
        SDPA: "attention",
        "gemm_fusion_dot_3": "head and loss",
        "loop_multiply_fusion_5": "optimizer",
        "triton_softmax_8": "elementwise",
        "loop_transpose_fusion": "copies",
        "Memset": "copies",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "copies",
        "fusion_77": "other",
    }
    events = [(A, name, "command_buffer.1", 10 * i, 10) for i, name in enumerate(names)]
    found = reduced(events, op_names={**OP_NAMES})
    assert {one["name"]: one["part"] for one in found["kernels"]} == names
    assert found["guessed"] == pytest.approx(7 / 9)


def test_an_empty_trace_says_so():
    with pytest.raises(ValueError, match="the trace contains no kernel"):
        reduced([(A, "while.4", "while.4", 0, 1)])


HLO = """HloModule jit_step, is_scheduled=true

%fused.1 (param_0: bf16[8,64], param_1: bf16[64,4]) -> bf16[2,8,4] {
  %param_0 = bf16[8,64]{1,0} parameter(0), metadata={op_name="flat_args[3]"}
  %param_1 = bf16[64,4]{1,0} parameter(1)
  %dot.9 = bf16[8,4]{1,0} dot(%param_0, %param_1), metadata={op_name="a/lora/dot_general" stack_frame_id=1}
  ROOT %dus.1 = bf16[2,8,4]{2,1,0} bitcast(%dot.9), metadata={op_name="a/reshape"}
}

%fused.2 (param_0.1: f32[8,64]) -> bf16[8,64] {
  %param_0.1 = f32[8,64]{1,0} parameter(0)
  %lt.1 = s32[] add(%c, %c), metadata={op_name="index/add"}
  %lt.2 = s32[] add(%c, %c), metadata={op_name="index/add"}
  %mul.1 = f32[8,64]{1,0} multiply(%param_0.1, %param_0.1), metadata={op_name="norm/mul"}
  ROOT %convert.1 = bf16[8,64]{1,0} convert(%mul.1), metadata={op_name="norm/copy"}
}

%region_0.1 (arg: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  ROOT %loop_convert_fusion.2 = bf16[8,64] fusion(%a), calls=%fused.2, metadata={op_name="norm/copy"}
}

ENTRY %main.1 (flat_args_0: f32[8,64]) -> f32[8,64] {
  %gemm_fusion.1 = (bf16[2,8,4]{2,1,0}, s8[64]{0}) fusion(%x), calls=%fused.1, metadata={op_name="a/reshape"}
  %while.4 = (s32[], f32[8,64]{1,0}) while(%t), condition=%c, body=%region_0.1, metadata={op_name="a/while"}
  %copy.5 = f32[8,64]{0,1} copy(%z)
  ROOT %add.6 = f32[8,64]{1,0} add(%copy.5, %z), metadata={op_name="jit(step)/update/add;jit(step)/shard_map"}
}
"""


def test_operations_of_instructions_from_hlo_text():
    """A fusion is its product; else, where it ends in a conversion, what it computes, and not its indices."""
    from bench.gpu.parts import op_names_of

    found = op_names_of(HLO)
    assert found["gemm_fusion.1"] == "a/lora/dot_general" and found["loop_convert_fusion.2"] == "norm/mul"
    assert found["add.6"] == "jit(step)/update/add" and "while.4" not in found and "copy.5" not in found


def test_of_a_gpu_its_streams_are_read_and_of_a_cpu_its_instructions():
    from bench.gpu.trace import _of_plane

    def line(name, *events):
        made = [
            SimpleNamespace(name=n, start_ns=s, duration_ns=d, stats=list(stats.items())) for n, s, d, stats in events
        ]
        return SimpleNamespace(name=name, events=made)

    stats = {"correlation_id": 7, "hlo_op": "gemm.1", "hlo_module": "jit_step"}
    gemm, hidden = (GEMM, 5.0, 2.0, stats), ("nvjet", 7.0, 1.0, {"hlo_op": "command_buffer.2", "name": "a/dot_general"})
    stream = line("Stream #13(Compute)", gemm, ("empty", 6.0, 0.0, {}), hidden, ("nvjet", 8.0, 1.0, {}))
    lines = [stream, line("XLA Ops", gemm), line("CUPTI overhead", gemm), line("Launches", gemm)]
    found = list(_of_plane(SimpleNamespace(name="/device:GPU:0", lines=lines), True))
    label = "/device:GPU:0 0 Stream #13(Compute)"
    assert found == [(label, GEMM, "gemm.1", 5, 2), (label, "nvjet", "a/dot_general", 7, 1), (label, "nvjet", "", 8, 1)]
    unnamed = SimpleNamespace(name="/device:GPU:0", lines=[line("", gemm), *lines[1:3]])  # streams by another name
    assert [event[1] for event in _of_plane(unnamed, True)] == [GEMM]
    thread = line("worker/1", ("ThunkExecutor::Execute", 0.0, 9.0, {}), ("dot.1", 1.0, 2.0, {"hlo_op": "dot.1"}))
    assert [event[1] for event in _of_plane(SimpleNamespace(name="/host:CPU", lines=[thread]), False)] == ["dot.1"]


HOW = {"shape": "llama-15m", "batch": 2, "length": 64, "documents": 2, "rank": 4, "dtype": "float32", "toy": True}


@pytest.mark.long
def test_a_small_step_on_the_cpu():
    """Every part that a step has takes some time; the table holds all of them."""
    from bench.gpu.parts import PARTS
    from bench.gpu.profile import profile, table

    found = profile(**HOW, optimizer="stable_lora", steps=2)
    assert json.loads(json.dumps(found)) == found and found["platform"] == "cpu" and "with_command_buffers" not in found
    assert sum(found["shares"].values()) == pytest.approx(1) and set(found["shares"]) == set(PARTS)
    assert all(found["shares"][part] > 0 for part in PARTS[:7])  # how much, a busy machine may put anywhere
    assert 0 <= found["idle"] < 1 and found["step_milliseconds"] > 0 and found["guessed"] < 1
    assert sum(found["milliseconds"].values()) >= found["traced_milliseconds"] - found["idle_milliseconds"] - 1e-9
    assert len(found["kernels"]) == 10 and found["kernels"][0]["milliseconds"] >= found["kernels"][9]["milliseconds"]
    text = table({**found, "with_command_buffers": {"why": "a reason"}})
    assert all(f"| {part} | " in text for part in PARTS) and text.count("\n| `") == 10 and "a reason" in text
    assert "With command buffers: " in table({**found, "with_command_buffers": found})


@pytest.mark.long
def test_a_gpu_gives_both_programs(monkeypatch):
    """Rehearsed on the CPU, which takes the option, too; a compiler that does not know it gives the one program."""
    from bench.gpu import profile as module

    monkeypatch.setattr(module, "GPUS", ("cpu",))
    found = module.profile(**HOW, optimizer="adamw", steps=1)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert sum(found["with_command_buffers"]["shares"].values()) == pytest.approx(1)
    monkeypatch.setattr(module, "WITHOUT", {"xla_gpu_enable_command_buffer": "nothing that it knows"})
    found = module.profile(**HOW, optimizer="adamw", steps=1)
    assert found["with_command_buffers"] is None and found["shares"]["base products"] > 0
    assert module._profile_as_compiled(None, None, 1)["why"].startswith("AttributeError: ")
