"""An adapter at fractions of its scale, between the untouched base and itself; and trainings that patience ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peftsweep import cli
from peftsweep.analysis.text import retention
from peftsweep.config.compose import Trial
from peftsweep.errors import InputError
from peftsweep.evaluation import scaled
from peftsweep.observe.measure import Laps, Meter
from peftsweep.study.record import Result, Status
from peftsweep.training.run import Run, validations_without_gain
from tests.conftest import SMALL

Compose = Callable[..., Trial]
RunSmall = Callable[..., Result]


class Two(nn.Module):
    """Two linear layers, which is all that an adapter wants."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)
        self.config = {"model_type": "two"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return found


def adapted(**options: Any) -> Any:
    return get_peft_model(Two(), LoraConfig(target_modules=["first", "second"], init_lora_weights=False, **options))


@pytest.mark.parametrize("options", [{"r": 2}, {"r": 4, "use_rslora": True}, {"r": 2, "rank_pattern": {"first": 3}}])
def test_a_scaled_adapter_is_the_base_plus_that_much_of_its_product(options: dict[str, Any]) -> None:
    model, x = adapted(**options), torch.randn(3, 6)
    layers: list[Any] = [one for one in model.modules() if isinstance(one, BaseTunerLayer)]
    before = [dict(layer.scaling) for layer in layers]
    with model.disable_adapter():
        base = model(x)
    for factor in (0.0, 0.25, 0.75, 1.0):
        weights = [  # calculated apart: W + factor * scaling * B A
            layer.base_layer.weight
            + factor * layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            for layer in layers
        ]
        expected = torch.tanh(x @ weights[0].T + layers[0].base_layer.bias) @ weights[1].T + layers[1].base_layer.bias
        with scaled.scaled(model, factor):
            assert torch.allclose(model(x), expected, atol=1e-5)
    with scaled.scaled(model, 0.0):
        assert torch.allclose(model(x), base, atol=1e-6)
    assert [dict(layer.scaling) for layer in layers] == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "the magnitudes that DoRA trains have no scale"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["second"], "target_modules": ["first"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_has_more_than_a_scale_is_not_scaled(options: dict[str, Any], reason: str) -> None:
    config: dict[str, Any] = {"target_modules": ["first", "second"], "init_lora_weights": False} | options
    assert reason in str(scaled.unscalable(get_peft_model(Two(), LoraConfig(**config))))
    assert scaled.unscalable(adapted()) is None
    assert "no adapter" in str(scaled.unscalable(Two()))


def test_an_initialisation_that_changes_the_base_has_no_scale() -> None:
    model = adapted()
    model.peft_config["default"].init_lora_weights = "pissa"
    assert "init_lora_weights=pissa has changed the base" in str(scaled.unscalable(model))


# ---- what is kept at which scale -------------------------------------------------------------------


def row(scale: float, name: str, role: str, metric: str, value: float | None, stderr: float = 0.01) -> dict[str, Any]:
    return {"scale": scale, "eval": name, "role": role, "metric": metric, "value": value, "stderr": stderr, "n": 100}


def held(quality: list[float], loss: list[float]) -> Result:
    """A record with an accuracy and a perplexity at 0, 0.25, 0.5, 0.75 and 1 of its scale."""
    rows = [row(s, "math", "target", "accuracy", v) for s, v in zip((0.25, 0.5, 0.75), quality[1:4], strict=True)]
    rows += [row(s, "old", "retention", "perplexity", v) for s, v in zip((0.25, 0.5, 0.75), loss[1:4], strict=True)]

    def ends(metric: str, values: list[float]) -> dict[str, Any]:
        metrics = {f"base_{metric}": values[0], metric: values[4]}
        return {key: {"value": value, "stderr": 0.01, "n": 100} for key, value in metrics.items()}

    scores = {"math": ends("accuracy", quality), "old": ends("perplexity", loss)}
    return Result({}, {}, {}, train_info={"scales": rows}, eval_info=scores)


@pytest.mark.parametrize(
    ("quality", "loss", "scale"),
    [
        ([0.1, 0.5, 0.89, 0.91, 0.90], [5.0, 5.1, 5.3, 5.8, 7.0], 0.5),  # 0.89 is within 0.90 - 1.96 * 0.01
        ([0.1, 0.5, 0.87, 0.91, 0.90], [5.0, 5.1, 5.3, 5.8, 7.0], 0.75),  # 0.87 is not
        ([0.1, 0.5, 0.7, 0.8, 0.90], [5.0, 5.1, 5.3, 5.8, 7.0], 1.0),
        ([0.9, 0.9, 0.9, 0.9, 0.90], [5.0, 5.1, 5.3, 5.8, 7.0], 0.0),  # the adapter has taught nothing
        ([0.1, 0.9, 0.9, 0.9, 0.90], [9.0, 7.0, 6.0, 6.0, 6.5], 0.75),  # of equal ones the larger scale
    ],
)
def test_the_point_that_keeps_most_loses_no_more_than_the_interval(
    quality: list[float], loss: list[float], scale: float
) -> None:
    result = held(quality, loss)
    found = retention.curves(result.train_info, result.eval_info)
    assert [one.scale for one in found[1].points] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert retention.keeps_most(found, found[1]) == scale


def test_a_sentence_names_the_point_with_its_figures() -> None:
    result = held([0.1, 0.5, 0.89, 0.91, 0.90], [5.0, 5.1, 5.3, 5.8, 7.0])
    (line,) = retention.notes([("lora", retention.curves(result.train_info, result.eval_info))])
    assert line == (
        "lora: keeps most of old at 0.5 of its scale: old perplexity 5.300 (whole 7.000, base 5.000), "
        "with math accuracy 0.890 (whole 0.900), within the interval"
    )
    assert not [*retention.notes([("full", retention.curves({}, {}))])]


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("eval.perplexity.role=retain", "eval.perplexity.role=retain: must be"),
        ("adapter.scales=[0.5,1.5]", "adapter.scales.1=1.5: must be above 0 and below 1"),
        ("train.patience=0", "train.patience=0: must be at least 1"),
        ("train.patience=3", "train.patience=3: needs train.eval_every"),
    ],
)
def test_a_wrong_role_scale_or_patience_is_one_line(word: str, problem: str, compose: Compose) -> None:
    with pytest.raises(InputError) as raised:
        compose("eval=[perplexity]", word)
    assert problem in str(raised.value)


def test_a_role_scales_and_patience_leave_the_identity_as_it_was(compose: Compose) -> None:
    words = ["eval=[perplexity]", "train.eval_every=10"]
    plain = compose(*words)
    others = [
        compose(*words, more) for more in ("eval.perplexity.role=retention", "adapter.scales=[0.5]", "train.patience=2")
    ]
    assert {(one.identity, one.training) for one in others} == {(plain.identity, plain.training)}


@pytest.mark.slow
def test_a_trial_is_scored_at_fractions_of_its_scale(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("There is a text that nobody has trained on.\n\nAnd here is another one.\n")
    words = ["eval=[perplexity,forgetting]", f"eval.forgetting.path={text}", "train.learning_rate=3e-3"]
    words += [word for word in SMALL if "tiny_math" not in word]
    words += ["adapter.save=false"]
    result = cli.run_one(words)
    rows = result.train_info["scales"]
    assert [(one["scale"], one["eval"], one["role"], one["metric"]) for one in rows] == [
        (scale, name, role, "perplexity")
        for scale in (0.25, 0.5, 0.75)
        for name, role in (("perplexity", "target"), ("forgetting", "retention"))
    ]
    found = retention.curves(result.train_info, result.eval_info)
    for one in found:  # each on the way from the base to the adapter
        values = [math.log(point.value) for point in one.points]
        steps = [later - before for before, later in itertools.pairwise(values)]
        assert max(map(abs, steps)) < abs(values[-1] - values[0]) + 1e-6
    refused = cli.run_one([*words, "method=dora"])
    assert refused.train_info["scales_refused"] == "the magnitudes that DoRA trains have no scale"
    assert "scales" not in refused.train_info


# ---- patience --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "waited"),
    [([], 0), ([3.0], 0), ([3.0, 2.0], 0), ([2.0, 3.0, 2.0], 2), ([2.0, 1.0, 1.0, 1.5], 2), ([math.inf] * 3, 2)],
)
def test_validations_without_gain_are_those_since_the_first_best(losses: list[float], waited: int) -> None:
    assert validations_without_gain([(loss, loss, step) for step, loss in enumerate(losses)]) == waited


@pytest.mark.parametrize(("steps", "stopped"), [(5, True), (3, False)])
def test_patience_ends_a_training_before_its_last_step_only(steps: int, stopped: bool, compose: Compose) -> None:
    config = compose(f"train.steps={steps}", "train.eval_every=1", "train.patience=2").config.train
    weights = {"weight": nn.Parameter(torch.zeros(1))}
    meter = Meter(torch.device("cpu"))
    run = Run(config, 64, weights, torch.optim.SGD(weights.values()), Laps(meter.device), meter, print, dict)
    run.progress.step = 3
    for step, loss in enumerate((1.0, 1.5, 1.2), start=1):
        run.progress.validated({"loss": loss}, step, config)
    run.consider()
    assert run.stopped is stopped


HOPELESS = [*SMALL[1:], "train.steps=8", "train.eval_every=1", "dataset.validation_samples=8", "train.learning_rate=0"]


@pytest.mark.slow
def test_a_hopeless_trial_ends_as_stopped_and_goes_on_when_it_is_given_more_patience(run_small: RunSmall) -> None:
    stopped = run_small(*HOPELESS, "train.patience=2")
    assert (stopped.status, stopped.train_info["steps"]) == (Status.stopped, 3)
    stopped_info = stopped.run_info["stopped"]
    assert (stopped_info["why"], stopped_info["step"], stopped_info["best_step"], stopped_info["metric"]) == (
        "patience",
        3,
        1,
        "loss",
    )
    assert stopped_info["value"] == pytest.approx(stopped_info["best_value"])
    assert not any(
        "perplexity" in one for one in stopped.eval_info.get("perplexity", {}) if not one.startswith("base_")
    )
    assert run_small(*HOPELESS, "train.patience=2").run_info["created_at"] == stopped.run_info["created_at"]
    assert run_small(*HOPELESS, "train.patience=1").train_info["steps"] == 3  # it has waited longer
    longer = run_small(*HOPELESS, "train.patience=4")
    assert (longer.run_info["resumed"], longer.train_info["steps"], longer.status) == (3, 5, Status.stopped)
    whole = run_small(*HOPELESS)
    assert (whole.run_info["resumed"], whole.train_info["steps"], whole.status) == (5, 8, Status.success)
    assert run_small(*HOPELESS, "train.patience=1").status is Status.success  # there is more than was asked for


@pytest.mark.slow
def test_a_slot_of_a_pack_that_gains_nothing_ends_alone(command: Callable[..., tuple[int, str, str]]) -> None:
    words = [word for word in HOPELESS if "learning_rate" not in word]
    code, out, err = command(*words, "train.patience=2", "train.learning_rate=0,1e-3", "hydra.launcher.pack=2")
    assert code == 0, err
    ends = {
        one.config["train"]["learning_rate"]: one for one in map(Result.read, Path("multirun/default").glob("tiny*"))
    }
    assert (ends[0].status, ends[0].train_info["steps"]) == (Status.stopped, 3)
    assert (ends[1e-3].status, ends[1e-3].train_info["steps"]) == (Status.success, 8)
    assert all(one.run_info["packed_with"] for one in ends.values())
    assert "stopped at step 3, patience: loss" in out
