"""Profiles of training steps: time, work, memory."""

from __future__ import annotations

import inspect
import json
import pickle
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import record_function
from transformers import BitsAndBytesConfig

from peftsweep import InputError
from peftsweep.config.fill import conf_dir
from peftsweep.data import batches, tokens
from peftsweep.models import attach, losses, model
from peftsweep.observe import flops as observe_flops
from peftsweep.observe import profiler
from peftsweep.observe import timeline as observe_timeline
from peftsweep.schema import ModelConfig, TargetsConfig
from tests import architectures

CPU = torch.device("cpu")
ROWS, WIDTH, HIDDEN = 64, 256, 512
STEP_FLOPS = 2 * 2 * ROWS * (2 * WIDTH * HIDDEN + 3 * HIDDEN * WIDTH)  # the input needs no gradient; two micro-batches
FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
QUANTS = {"none": None, "8bit": BitsAndBytesConfig(load_in_8bit=True), "4bit": FOUR_BIT}


def two_layers(device: torch.device = CPU) -> observe_flops.Run:
    """Steps of two micro-batches each through two linear layers."""
    layers = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)).to(device)
    optimizer = torch.optim.AdamW(layers.parameters(), fused=True)
    rows = torch.randn(ROWS, WIDTH, device=device)

    def run(steps: int, after_step: Callable[[], None]) -> None:
        for _ in range(steps):
            for _ in range(2):
                with record_function("forward"):
                    loss = layers(rows).square().mean()
                with record_function("backward"):
                    loss.backward()
            with record_function("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
            loss.item()
            after_step()

    return run


def profiled(folder: Path, **options: Any) -> dict[str, Any]:
    small: dict[str, Any] = {"wait": 1, "warmup": 1, "active": 3, "sizes": [64]}
    return profiler.operators(two_layers(), folder, CPU, **small | options)


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def complete(name: str, start: float, seconds: float, cat: str, **args: Any) -> observe_timeline.Event:
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": seconds, "args": args}


# A step of 100 us on the host; the device begins late and works on after its end.
CUDA_TRACE = [
    complete("ProfilerStep#3", 0, 100, "user_annotation"),
    complete("forward", 0, 20, "user_annotation"),
    complete("backward", 20, 40, "user_annotation"),
    complete("optimizer", 70, 20, "user_annotation"),
    complete("backward", 40, 70, "gpu_user_annotation"),
    complete("cudaLaunchKernel", 5, 1, "cuda_runtime", correlation=1),
    complete("cudaLaunchKernel", 30, 1, "cuda_runtime", correlation=2),
    complete("cuLaunchKernel", 80, 1, "cuda_driver", correlation=3),
    complete("cudaMemcpyAsync", 95, 1, "cuda_runtime", correlation=4),
    complete("cudaStreamSynchronize", 96, 3, "cuda_runtime", correlation=5),
    complete("cudaDeviceSynchronize", 130, 3, "cuda_runtime", correlation=6),  # the profiler's own, after the step
    complete("mm", 25, 20, "kernel", correlation=1),
    complete("mm", 45, 50, "kernel", correlation=2),
    complete("adam", 90, 10, "kernel", correlation=3),  # beside the last one for 5 us
    complete("copy", 105, 5, "gpu_memcpy", correlation=4),
]


# ---- the yamls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "memory"])
def test_a_yaml_holds_every_option_of_its_function_with_its_default(name: str) -> None:
    node = yaml.safe_load(Path(conf_dir(), "profiler", f"{name}.yaml").read_text(encoding="utf-8"))
    module, _, function = node.pop("_target_").rpartition(".")
    assert module == "peftsweep.observe.profiler"
    options = list(inspect.signature(getattr(profiler, function)).parameters.values())[3:]  # run, folder, device
    assert node == {option.name: option.default for option in options}


# ---- operators -------------------------------------------------------------------------------------


def test_the_trace_holds_the_active_steps_and_the_named_ranges_and_no_others(tmp_path: Path) -> None:
    facts = profiled(tmp_path, gzip_trace=False)
    events = read(tmp_path / facts["trace"])["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert {name for name in names if name.startswith("ProfilerStep#")} == {f"ProfilerStep#{n}" for n in (2, 3, 4)}
    assert (names["forward"], names["backward"], names["optimizer"]) == (6, 6, 3)


def test_the_ranges_of_a_step_and_the_rest_make_up_its_time(tmp_path: Path) -> None:
    facts = profiled(tmp_path, flops=False)
    parts = [facts[f"{name}_seconds"] for name in (*observe_timeline.RANGES, "other")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(facts["profiled_step_seconds"])
    assert sum(facts[f"{name}_share"] for name in (*observe_timeline.RANGES, "other")) == pytest.approx(1)
    assert facts["item_calls"] >= 1
    assert not [name for name in facts if "device" in name]


def test_the_top_operators_hold_the_matrix_products_with_their_time(tmp_path: Path) -> None:
    facts = profiled(tmp_path, flops=False)
    tables = read(tmp_path / "operators.json")
    assert facts["top_operators_by_cpu_time"] == tables["operators_by_cpu_time"][0]["name"]
    rows = {row["name"]: row for row in tables["operators_by_cpu_time"]}
    assert rows["aten::addmm"]["calls"] == 3 * 2 * 2
    assert rows["aten::mm"]["calls"] == 3 * 2 * 3
    assert all(0 < row["self_cpu_microseconds"] <= row["cpu_microseconds"] for row in rows.values())
    assert not {"forward", "ProfilerStep*"} & set(rows)
    assert sum(row["share"] for row in rows.values()) <= 1 + 1e-9
    assert tables["operators_by_device_time"] == tables["kernels_by_device_time"] == []


def test_shapes_part_the_operators_when_asked_for(tmp_path: Path) -> None:
    profiled(tmp_path, flops=False, record_shapes=True)
    shapes = [
        row["shapes"] for row in read(tmp_path / "operators.json")["operators_by_cpu_time"] if row["name"] == "aten::mm"
    ]
    assert [[WIDTH, ROWS], [ROWS, HIDDEN]] in [shape[:2] for shape in shapes]
    assert len(shapes) > 1


def test_a_second_profile_takes_the_first_one_s_place(tmp_path: Path) -> None:
    names = [profiled(tmp_path, flops=False, gzip_trace=compressed)["trace"] for compressed in (False, True)]
    assert [file.name for file in tmp_path.glob("*.pt.trace.json*")] == names[1:]
    assert observe_timeline.read_trace(tmp_path / names[1])


def test_kernels_belong_to_the_range_that_launched_them_and_not_to_that_in_which_they_run() -> None:
    facts = observe_timeline.Timeline.of(CUDA_TRACE, 1).facts()
    device = {name: facts[f"{name}_device_seconds"] * 1e6 for name in (*observe_timeline.RANGES, "other")}
    assert device == pytest.approx({"forward": 20, "backward": 50, "optimizer": 10, "other": 5})
    assert facts["backward_device_share"] == pytest.approx(50 / 85)
    assert facts["backward_seconds"] == pytest.approx(40e-6)  # the host's, and not that of the device's annotation
    assert facts["other_seconds"] == pytest.approx(20e-6)
    assert facts["device_busy_share"] == pytest.approx(80 / 85)
    assert facts["host_waits"] == 1


def test_a_trace_of_too_few_steps_is_no_profile() -> None:
    with pytest.raises(RuntimeError, match="1 steps and not 2"):
        observe_timeline.Timeline.of(CUDA_TRACE, 2)


def test_operators_and_kernels_are_ranked_apart_and_annotations_by_neither() -> None:
    def row(key: str, kind: Any, own: int, annotation: bool = False) -> Any:
        times = {"self_device_time_total": own, "device_time_total": own, "self_cpu_time_total": 1, "cpu_time_total": 1}
        return SimpleNamespace(
            key=key, device_type=kind, is_user_annotation=annotation, count=1, input_shapes=[], **times
        )

    rows = [
        row("aten::add", DeviceType.CPU, 10),
        row("aten::mm", DeviceType.CPU, 30),
        row("gemm_kernel", DeviceType.CUDA, 30),
        row("forward", DeviceType.CUDA, 40, annotation=True),
    ]
    tables = observe_timeline.operator_tables(rows, top=1)
    assert [(r["name"], r["share"]) for r in tables["operators_by_device_time"]] == [("aten::mm", 0.75)]
    assert [(r["name"], r["share"]) for r in tables["kernels_by_device_time"]] == [("gemm_kernel", 1.0)]


def test_an_attribute_that_torch_no_longer_has_is_an_error_and_not_zero() -> None:
    renamed = SimpleNamespace(key="aten::mm", device_type=DeviceType.CPU, is_user_annotation=False, cpu_time_total=5)
    with pytest.raises(AttributeError, match="self_device_time_total"):
        observe_timeline.operator_tables([renamed], top=1)


@pytest.mark.parametrize("plan", [{"active": 0}, {"wait": 0, "warmup": 0}, {"wait": -1}])
def test_an_impossible_schedule_is_refused_by_name(tmp_path: Path, plan: dict[str, int]) -> None:
    with pytest.raises(InputError, match=rf"profiler\.{next(iter(plan))}={next(iter(plan.values()))}"):
        profiled(tmp_path, **plan)


def test_steps_that_are_not_reported_are_noticed(tmp_path: Path) -> None:
    def run(steps: int, after_step: Callable[[], None]) -> None:
        two_layers()(steps, lambda: None)

    with pytest.raises(RuntimeError, match="after_step was not called"):
        profiler.operators(run, tmp_path, CPU, active=1, flops=False)


def test_the_profiler_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profiled(tmp_path, flops=False)
    assert list(tmp_path.glob("operators.*"))
    assert tuple(capfd.readouterr()) == ("", "")


# ---- work and speed --------------------------------------------------------------------------------


def test_the_work_of_linear_layers_equals_the_formula_and_is_that_of_the_active_steps_alone(tmp_path: Path) -> None:
    facts = profiled(tmp_path)
    assert facts["flops_per_step"] == STEP_FLOPS
    assert (facts["flops_share_float32"], facts["matmul_dtype"], facts["flops_uncounted"]) == (1.0, "float32", "")
    assert facts["utilisation"] == facts["achieved_flops_per_second"] / facts["matmul_flops_per_second"] > 0
    assert facts["step_seconds"] > 0


def test_work_is_told_apart_by_dtype() -> None:
    narrow, wide = torch.ones(8, 16, dtype=torch.bfloat16), torch.ones(4, 4)

    def run(steps: int, after_step: Callable[[], None]) -> None:
        for _ in range(steps):
            narrow @ narrow.T
            wide @ wide
            after_step()

    expected = {torch.bfloat16: 3 * 2 * 8 * 16 * 8, torch.float32: 3 * 2 * 4 * 4 * 4}
    assert observe_flops.count_flops(run, settle=2, active=3) == expected


def test_a_compiled_model_does_the_work_of_the_uncompiled_one() -> None:
    def fused(graph: Any, inputs: Any) -> Callable[..., list[torch.Tensor]]:
        return lambda *_: [torch.zeros(8, 16, requires_grad=True)]  # by a kernel that no counter sees

    layer = nn.Linear(32, 16)
    rows = torch.ones(8, 32)
    compiled = torch.compile(lambda: layer(rows), backend=fused)
    assert not compiled().any()  # compiled before it is counted

    def run(steps: int, after_step: Callable[[], None]) -> None:
        for _ in range(steps):
            compiled().sum().backward()
            after_step()

    assert observe_flops.count_flops(run, settle=1, active=2) == {torch.float32: 2 * (2 * 2 * 8 * 32 * 16)}
    assert not compiled().any()


@pytest.fixture(scope="module")
def lora_flops() -> Callable[[str, str], int]:
    """Operations of one step of LoRA on the embedded model, quantised so, with attention computed so."""

    def count(quant: str, attention: str) -> int:
        base = model.load(ModelConfig(name_or_path="tiny", attn_implementation=attention), QUANTS[quant], CPU)
        adapted = attach.attach(base, LoraConfig(r=4), TargetsConfig(all_linear=True), {})
        batch = batches.collate([tokens.Tokens(list(range(5, 29)), 8)] * 4, pad_id=0)

        def run(steps: int, after_step: Callable[[], None]) -> None:
            for _ in range(steps):
                losses.answer_losses(adapted.train(), batch).sum().backward()
                after_step()

        return sum(observe_flops.count_flops(run, settle=1, active=1).values())

    return count


@pytest.mark.slow  # products of 4 and 8 bits take long on a CPU, and are counted as those below
def test_a_quantised_model_does_the_work_of_the_unquantised_one(lora_flops: Callable[[str, str], int]) -> None:
    plain = lora_flops("none", "sdpa")
    assert plain > 0
    assert {quant: lora_flops(quant, "sdpa") for quant in QUANTS} == dict.fromkeys(QUANTS, plain)


def test_fused_attention_does_the_work_of_plain_attention_and_one_product_again(
    lora_flops: Callable[[str, str], int],
) -> None:
    config = model.architecture(ModelConfig(name_or_path="tiny"))
    product = 2 * 4 * 24 * 24 * config.hidden_size * config.num_hidden_layers  # rows, tokens, tokens, all heads
    assert lora_flops("none", "sdpa") - lora_flops("none", "eager") == product


@pytest.mark.parametrize("target", [pytest.param("frozen experts", marks=pytest.mark.slow), "adapted experts"])
def test_the_experts_of_each_token_are_counted_and_no_others(target: str) -> None:
    def count(per_token: int, experts: int) -> int:
        sizes = {"num_experts_per_tok": per_token, "num_experts": experts, "num_local_experts": experts}
        base = architectures.make("qwen3_moe", **sizes)
        roles = ["experts"] if target == "adapted experts" else ["q"]
        adapted = attach.attach(base, LoraConfig(r=4), TargetsConfig(roles=roles), {}).train()
        batch = batches.collate([tokens.Tokens(list(range(5, 29)), 8)] * 4, pad_id=0)

        def run(steps: int, after_step: Callable[[], None]) -> None:
            for _ in range(steps):
                losses.answer_losses(adapted, batch).sum().backward()
                after_step()

        return sum(observe_flops.count_flops(run, settle=1, active=1).values())

    hidden, inner, layers, rows = 32, 16, 2, 4 * 24
    forward = 2 * rows * (3 * hidden * inner)  # gate, up and down of one expert
    if target == "frozen experts":
        assert count(2, 4) - count(1, 4) == layers * forward * 2  # and the gradient of its input
        router = 2 * rows * hidden * 4  # of four experts more
        assert count(2, 8) - count(2, 4) == layers * router * 2
    else:  # the gradient of the weights too, and the first layer's input needs none
        without = 2 * rows * (2 * hidden * inner)  # of gate and up
        assert count(2, 4) - count(1, 4) == layers * forward * 3 - without


@pytest.mark.parametrize(
    ("left", "right"),
    [((6, 8), (2, 8, 4)), ((6, 8), (8, 4)), ((2, 6, 8), (8, 4)), ((2, 3, 8), (2, 8, 4))],
    ids=["rows", "inner", "columns", "batch"],
)
def test_a_product_in_groups_does_the_work_of_its_parts(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    one, other = torch.ones(left, dtype=torch.bfloat16), torch.ones(right, dtype=torch.bfloat16)
    formula = observe_flops.flop_formulas()[torch.ops.aten._grouped_mm]
    assert formula(one, other) == 2 * 6 * 8 * 4


@pytest.mark.parametrize("name", ["int8_linear_matmul", "int8_scaled_mm", "int8_mixed_scaled_mm"])
def test_the_8_bit_products_of_bitsandbytes_are_counted(name: str) -> None:
    import bitsandbytes  # noqa: F401  # registers them

    left = torch.ones(2, 8, 32)
    narrow, weight = left.to(torch.int8), torch.ones(16, 32, dtype=torch.int8)
    scales, columns = torch.ones(16), torch.ones(16)
    product = getattr(torch.ops.bitsandbytes, name)
    flat = narrow.reshape(16, 32)
    arguments: dict[str, tuple[Any, ...]] = {
        "int8_linear_matmul": (narrow, weight),
        "int8_scaled_mm": (flat, weight, scales, columns),
        "int8_mixed_scaled_mm": (left.reshape(16, 32), flat, weight, scales, columns),
    }

    def run(steps: int, after_step: Callable[[], None]) -> None:
        for _ in range(steps):
            product(*arguments[name])
            after_step()

    assert sum(observe_flops.count_flops(run, settle=1, active=1).values()) == 2 * 16 * 32 * 16


def test_products_without_a_formula_are_named() -> None:
    names = ["aten::mm", "bitsandbytes::gemm_4bit", "bitsandbytes::int8_mm_dequant", "bitsandbytes::dequantize_4bit"]
    names += ["flash_attn::_flash_attn_forward", "mine::gemm", "autograd::engine::evaluate_function: MmBackward0"]
    assert observe_flops.uncounted([SimpleNamespace(key=key) for key in names]) == (
        "flash_attn::_flash_attn_forward mine::gemm"
    )


def test_the_ceiling_is_the_best_of_the_sizes_by_the_median_lap() -> None:
    # Two readings a lap: one lap a layout, then at size 2 laps of 1, 1, 9 seconds, at size 4 of 4, 16, 4.
    laps = iter([2.0, 3.0, 3.0, 1.0, 1.0, 9.0, 4.0, 16.0, 4.0])
    now, running = 0.0, False

    def clock() -> float:
        nonlocal now, running
        now += next(laps) if running else 100.0
        running = not running
        return now

    ceiling = observe_flops.matmul_ceiling(CPU, torch.float32, [4, 2], repeats=3, clock=clock)
    assert ceiling == max(2 * 2**3 / 1.0, 2 * 4**3 / 4.0)


def test_the_ceiling_is_that_of_the_fastest_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    now, multiply = 0.0, torch.mm

    def mm(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal now
        now += {(True, True): 30.0, (True, False): 4.0, (False, True): 2.0}[left.is_contiguous(), right.is_contiguous()]
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    ceiling = observe_flops.matmul_ceiling(CPU, torch.float32, [4], repeats=3, clock=lambda: now, longest=3.0)
    assert ceiling == 2 * 4**3 / 2.0


def test_layouts_that_are_alike_at_the_smallest_size_are_compared_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host launches a small product in more time than it takes."""
    now, multiply = 0.0, torch.mm

    def mm(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal now
        large = {(True, True): 5.0, (True, False): 9.0, (False, True): 3.0}
        small = {(True, True): 1.0, (True, False): 1.1, (False, True): 1.2}
        now += (large if len(left) == 8 else small)[left.is_contiguous(), right.is_contiguous()]
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    ceiling = observe_flops.matmul_ceiling(CPU, torch.float32, [4, 8], repeats=3, clock=lambda: now)
    assert ceiling == pytest.approx(2 * 8**3 / 3.0)


def test_sizes_above_one_that_takes_too_long_are_left_out() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 2.0
        return now

    options: dict[str, Any] = {"repeats": 3, "clock": clock}
    assert observe_flops.matmul_ceiling(CPU, torch.float32, [4, 2], longest=3.0, **options) == 2 * 4**3 / 2.0
    assert observe_flops.matmul_ceiling(CPU, torch.float32, [4, 2], longest=1.0, **options) == 2 * 2**3 / 2.0


def test_the_steps_before_the_active_ones_are_not_timed() -> None:
    now = 0.0

    def run(steps: int, after_step: Callable[[], None]) -> None:
        nonlocal now
        for step in range(steps):
            now += 50.0 if step < 2 else 3.0
            after_step()

    assert profiler._timed(run, CPU, settle=2, active=3, clock=lambda: now) == [3.0, 3.0, 3.0]


# ---- memory ----------------------------------------------------------------------------------------


def test_the_memory_profile_names_the_operators_that_allocate(tmp_path: Path) -> None:
    facts = profiler.memory(two_layers(), tmp_path, CPU, steps=2)
    rows = {row["name"]: row for row in read(tmp_path / "memory.json")["operators"]}
    activations = 2 * ROWS * (HIDDEN + WIDTH) * 4  # of two micro-batches, in bytes
    assert rows["aten::addmm"]["self_bytes"] == activations
    assert (rows["aten::addmm"]["calls"], facts["largest_operator"]) == (4, "aten::mm")
    assert not {"forward", "[memory]"} & set(rows)


def test_the_peak_of_a_step_is_in_the_backward_pass_and_holds_gradients_and_activations(tmp_path: Path) -> None:
    facts = profiler.memory(two_layers(), tmp_path, CPU, steps=2)
    gradients = 2 * WIDTH * HIDDEN * 4
    assert gradients < facts["peak_bytes_above_start"] < 4 * gradients
    assert facts["peak_range"] == "backward"


def test_the_peak_begins_anew_with_each_step_and_is_of_its_own_device() -> None:
    def change(moment: float, size: int, kind: int = 0) -> observe_timeline.Event:
        return {"ph": "i", "name": "[memory]", "ts": moment, "args": {"Bytes": size, "Device Type": kind}}

    steps = [complete(f"ProfilerStep#{n}", 100 * n, 100, "user_annotation") for n in (1, 2)]
    ranges = [complete("forward", 100, 50, "user_annotation"), complete("backward", 250, 40, "user_annotation")]
    changes = [change(110, 70), change(205, 20), change(260, 60), change(270, -80), change(280, 75), change(250, 99, 1)]
    events = [*steps, *ranges, *changes]
    timeline = observe_timeline.Timeline.of(events, 2)
    assert observe_timeline.peak_above_start(events, timeline, CPU) == (80, "backward")
    assert observe_timeline.peak_above_start(events, timeline, torch.device("cuda")) == (99, "backward")


def test_a_memory_profile_of_no_steps_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"profiler\.steps=0"):
        profiler.memory(two_layers(), tmp_path, CPU, steps=0)


# ---- where more is at hand -------------------------------------------------------------------------


def test_tensorboard_lists_the_profile_and_reads_its_operators(tmp_path: Path) -> None:
    profiler_plugin = pytest.importorskip("torch_tb_profiler.plugin", reason="torch-tb-profiler is not installed")
    base_plugin = pytest.importorskip("tensorboard.plugins.base_plugin")
    web = pytest.importorskip("werkzeug.test")
    profiled(tmp_path / "trial" / "profile", flops=False)
    plugin = profiler_plugin.TorchProfilerPlugin(base_plugin.TBContext(logdir=str(tmp_path)))
    run = str(Path("trial", "profile"))

    def ask(route: Any, query: str = "") -> Any:
        return json.loads(web.Client(route).get(f"/?{query}").get_data())

    for _ in range(60):
        if run in ask(plugin.runs_route)["runs"]:
            break
        time.sleep(1)
    assert ask(plugin.workers_route, f"run={run}&view=Overview") == ["operators"]
    span = ask(plugin.spans_route, f"run={run}&worker=operators")[0]
    table = ask(plugin.operation_table_route, f"run={run}&worker=operators&span={span}&group_by=Operation")
    times = {row["name"]: row["host_self_duration"] for row in table["data"]}
    assert times["aten::mm"] > 0


@pytest.mark.gpu
def test_the_top_device_operators_hold_the_matrix_products_with_their_time(tmp_path: Path) -> None:
    device = torch.device("cuda")
    facts = profiler.operators(two_layers(device), tmp_path, device, sizes=[256, 1024])
    tables = read(tmp_path / "operators.json")
    rows = {row["name"]: row for row in tables["operators_by_device_time"]}
    assert rows["aten::mm"]["self_device_microseconds"] > 0
    assert rows["aten::addmm"]["self_device_microseconds"] > 0
    assert tables["kernels_by_device_time"]
    assert not set(observe_timeline.RANGES) & {row["name"] for row in tables["kernels_by_device_time"]}
    assert all(facts[f"{name}_device_seconds"] > 0 for name in observe_timeline.RANGES)
    assert facts["backward_device_seconds"] > facts["other_device_seconds"]  # though autograd's thread launches it
    assert 0 < facts["device_busy_share"] <= 1
    assert facts["host_waits"] >= 1  # loss.item()
    assert facts["flops_per_step"] == STEP_FLOPS
    assert facts["matmul_flops_per_second"] > facts["achieved_flops_per_second"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_a_quantised_model_does_the_work_of_the_unquantised_one_on_cuda(quant: str) -> None:
    device = torch.device("cuda")
    flops = {}
    for kind in ("none", quant):
        base = model.load(ModelConfig(name_or_path="tiny", attn_implementation="eager"), QUANTS[kind], device)
        adapted = attach.attach(base, LoraConfig(r=4), TargetsConfig(all_linear=True), {}).train()
        batch = batches.collate([tokens.Tokens(list(range(5, 29)), 8)] * 4, pad_id=0).to(device)

        def run(
            steps: int, after_step: Callable[[], None], adapted: nn.Module = adapted, batch: batches.Batch = batch
        ) -> None:
            for _ in range(steps):
                losses.answer_losses(adapted, batch).sum().backward()
                after_step()

        flops[kind] = sum(observe_flops.count_flops(run, settle=1, active=1).values())
    assert flops[quant] == flops["none"] > 0


@pytest.mark.gpu
def test_the_allocator_s_snapshot_holds_actions_with_stacks_and_recording_ends(tmp_path: Path) -> None:
    device = torch.device("cuda")
    facts = profiler.memory(two_layers(device), tmp_path, device)
    snapshot = pickle.loads((tmp_path / facts["snapshot"]).read_bytes())
    actions = [action for trace in snapshot["device_traces"] for action in trace]
    assert {"alloc", "free_completed"} <= {action["action"] for action in actions}
    assert any("test_profiler" in frame["filename"] for action in actions for frame in action.get("frames", []))
    assert facts["allocated_peak_bytes"] > facts["peak_bytes_above_start"] > 0
    assert facts["largest_operator_bytes"] > 0
    two_layers(device)(1, lambda: None)
    later = torch.cuda.memory._snapshot()["device_traces"]
    assert sum(map(len, later)) <= len(actions)
