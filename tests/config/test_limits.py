"""Every number that a configuration can hold is either meaningful, or refused in one line that names its key."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftsweep import InputError, cli, command_line, limits
from peftsweep.config import calls, checks, fill
from peftsweep.config import compose as configuration
from peftsweep.forecast import forecast

VALUES = ("nan", "inf", "1e300", "-1", "0", "abc", "18446744073709551616", "null", "[1]", "{a: 1}")
METHODS = sorted(file.stem for file in Path(fill.conf_dir(), "method").glob("*.yaml"))
OTHERS = ["quant=8bit", "inference=long", "profiler=torch", "profiler=memory", "eval=[gsm8k,boolq_170k]"]
OTHERS += ["train.optimizer=SGD", "train.optimizer=RMSprop", "eval=[lm_eval] eval.lm_eval.tasks=[x]"]
SIGNED = {  # options of which less than 0 is meaningful
    *("method.scaling", "method.scaling_pass_value", "method.global_scaling_weight", "method.shadow_alpha"),
    *("method.decompose_factor", "method.d_initial", "method.alpha", "method.label_mask_value"),
}


def composed(*words: str) -> Any:
    return cli.compose(["device=cpu", *words])


def tree_of(cfg: Any) -> dict[str, Any]:
    tree: Any = OmegaConf.to_container(cfg, resolve=False)
    return {key: value for key, value in tree.items() if key != "hydra"}


def options_of(*targets: str) -> dict[str, limits.Option]:
    """The numbers that PEFT's and our own classes and functions take, by their keys."""
    found: dict[str, limits.Option] = {}
    for section, target in (one.split("=") for one in targets):
        tree = {section: {"_target_": target}, "train": {"optimizer": "torch.optim.AdamW"}}
        found |= {f"{target}:{key}": option for key, option in calls.numeric_options(tree).items()}
    return found


def every_option() -> dict[str, limits.Option]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    targets = [f"method={config.__module__}.{config.__name__}" for config in CONFIGS.values()]
    evaluations = ("perplexity", "generation", "classification", "multiple_choice", "instruction", "text_perplexity")
    targets += [f"eval=peftsweep.evaluation.evaluate.{name}" for name in evaluations]
    targets += [f"profiler=peftsweep.observe.profiler.{name}" for name in ("operators", "memory")]
    targets += [f"method_setup=peftsweep.models.initialise.{name}" for name in ("eva", "corda", "lora_ga")]
    targets += ["inference=peftsweep.evaluation.inference.benchmark", "quant=transformers.BitsAndBytesConfig"]
    return options_of(*targets)


def refused(key: str, value: float, option: limits.Option | None = None) -> bool:
    """Whether the table refuses the number, in one line that names its key."""
    tree: Any = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    try:
        limits.check(tree, {key: option} if option else {})
    except InputError as error:
        return str(error).startswith(f"{key}={value}: must be ") and "\n" not in str(error)
    return False


def test_no_option_of_any_class_takes_a_number_that_is_none_or_beyond_all_use() -> None:
    """All numeric options of PEFT, of transformers' quantisation and of ours, by the table that the check reads."""
    options = every_option()
    assert len(options) > 300
    taken = []
    for name, option in options.items():
        key = name.partition(":")[2]
        taken += [(name, value) for value in (math.nan, math.inf, -math.inf, 1e300) if not refused(key, value, option)]
        whole = option.usual in (limits.COUNT, limits.WHOLE)
        if whole and not refused(key, 2**64, option):
            taken.append((name, 2**64))
        if key not in SIGNED and not key.startswith("train.") and not refused(key, -1, option):
            default = option.default
            if not (isinstance(default, int | float) and default < 0) and limits.allowed(key, option) != limits.FLOAT:
                taken.append((name, -1))
        if isinstance(default := option.default, int | float) and refused(key, default, option):
            taken.append((name, default))
    assert taken == []


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("train.optimizer_kwargs.betas.0", 1.0, 0.9),
        ("train.optimizer_kwargs.eps", -1e-8, 1e-8),
        ("train.optimizer_kwargs.momentum", 1.5, 0.9),
        ("quant.llm_int8_threshold", -6.0, 0.0),
        ("method.loftq_config.random_seed", -1, 0),
        ("method.rank_pattern.q_proj", 0, 4),
        ("method.cpt_token_ids.2", -1, 5),
        ("method.layers_to_transform.0", -1, 0),
        ("method.beta1", 0.0, 0.85),
        ("method.eva_config.tau", 1.5, 0.99),
        ("hydra.launcher.array_parallelism", 0, 64),
        ("hydra.launcher.mem_gb", 0.0, 0.5),
        ("hydra.launcher.timeout_min", -1, 240),
        ("hydra.launcher.ray.remote.num_gpus", -1, 0.5),
        ("hydra.launcher.n_jobs", 0, -1),
        ("hydra.sweeper.n_trials", 0, 20),
        ("hydra.sweeper.max_failure_rate", 2.0, 1.0),
        ("inference.batch_sizes.1", 0, 4),
    ],
)
def test_numbers_have_the_range_of_what_they_are(key: str, wrong: float, right: float) -> None:
    assert refused(key, wrong)
    assert not refused(key, right)


@pytest.mark.parametrize("name", ["local", "slurm", "basic", "joblib", "submitit_local", "submitit_slurm"])
def test_the_defaults_of_a_launcher_are_allowed(name: str) -> None:
    cfg = cli.compose([f"hydra/launcher={name}"])
    limits.check({"hydra": {"launcher": OmegaConf.to_container(cfg.hydra.launcher, resolve=False)}}, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("adapter.save=-1", "adapter.save=-1: must be true or false"),
        ("dry_run=18446744073709551616", "dry_run=18446744073709551616: must be true or false"),
        ("train.keep_best=2,0", "train.keep_best=2: must be true or false"),
        ("train.compile_dynamic=5", "train.compile_dynamic=5: must be true or false"),
        ("method.rank_pattern={q_proj:abc}", "method.rank_pattern.q_proj=abc: must be a number"),
        ("dataset.encoding=abc", "dataset.encoding=abc: no such encoding"),
        ("eval.tiny_math.encoding=base64", "eval.tiny_math.encoding=base64: no such encoding"),
        ("method=adaption_prompt method.adapter_len=null", "method.adapter_len=null: must be a number"),
        ("method.qalora_group_size=null", "method.qalora_group_size=null: must be int"),
        ("method.layers_to_transform={a: 1}", "method.layers_to_transform={'a': 1}: must be int or list[int] or null"),
        ("train.optimizer_kwargs.eps=[1]", "train.optimizer_kwargs.eps=[1]: must be float"),
    ],
)
def test_what_is_allowed_is_said_in_words_of_a_yaml(words: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        cli._trial("device=cpu", *words.replace(": ", ":").split())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_truth_is_0_or_1_or_a_word() -> None:
    conf = Path(fill.conf_dir())
    words = ["adapter.save=1", "adapter.merge=0", "dry_run=true", "train.keep_best=false,true", "seed=5"]
    assert command_line.checked(words, conf) == words


def test_what_peft_refuses_names_the_words_that_it_is_about() -> None:
    one = cli._trial("device=cpu", "method=c3a", "method.block_size=1000")
    with pytest.raises(InputError, match=r"^method.block_size=1000: The block size should be a factor of the input"):
        forecast.check(one)
    one = cli._trial("device=cpu", "method=adalora", "method.tinit=0", "method.tfinal=100000")
    with pytest.raises(InputError, match=r"method.tfinal=100000: "):
        forecast.check(one)


def test_a_time_and_a_pack_have_a_largest_value() -> None:
    with pytest.raises(InputError, match=r"hydra.launcher.timeout=18446744073709551616: must be a time such as"):
        checks.placement({"timeout": "18446744073709551616"})
    with pytest.raises(InputError, match=r"hydra.launcher.pack=18446744073709551616: must be auto, off or a number"):
        checks.placement({"pack": 2**64})
    assert checks.placement({"timeout": "2h", "retries": 0})["timeout"] == 7200


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"kasa_config": {"beta": 0.1, "gamma": "abc"}}, "method.kasa_config.gamma=abc: must be float"),
        ({"target_modules": ["q", 3]}, "method.target_modules.1=3: must be str"),
        ({"layer_replication": [[0, 1], [None, 2]]}, "method.layer_replication.1"),
        ({"layers_to_transform": [0, None]}, "method.layers_to_transform.1=null: must be int"),
        ({"layers_to_transform": "x"}, "method.layers_to_transform=x: must be int or list[int] or null"),
    ],
)
def test_of_a_list_or_a_nested_configuration_the_part_that_is_wrong_is_named(
    option: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as raised:
        calls.check_call({"_target_": "peft.LoraConfig"} | option, "method")
    assert str(raised.value).startswith(message)


def test_of_a_sequence_that_a_function_takes_the_place_that_is_wrong_is_named() -> None:
    node = {"_target_": "peftsweep.evaluation.inference.benchmark", "batch_sizes": [1, "abc"]}
    with pytest.raises(InputError, match=r"^inference.batch_sizes.1=abc: must be int$"):
        calls.check_call(node, "inference")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("adapter.scales=[0.5,abc]", "adapter.scales.1=abc: must be float"),
        ("adapter.scales=[null]", "adapter.scales.0=null: must be float"),
        ("tune.ranks=[4,x]", "tune.ranks.1=x: must be int"),
    ],
)
def test_of_a_list_of_the_schema_the_place_that_is_wrong_is_named(word: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        cli._trial("device=cpu", word)
    assert str(raised.value).startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize("option", [*(f"method={name}" for name in METHODS), *OTHERS])
def test_every_numeric_key_with_every_odd_value_is_meaningful_or_one_line(option: str) -> None:
    """Of the composed point, as the launcher changes it, with the method attached to the model's skeleton."""
    words = [*option.split(), *(["quant=4bit"] if option == "method=loftq" else [])]
    cfg = composed(*words)
    try:
        configuration.trial(cfg, cfg.hydra.runtime.choices, words)
    except InputError as error:
        pytest.skip(str(error))
    section = "method." if option.startswith("method=") else ""
    keys = set(calls.numeric_options(tree_of(cfg))) | {key for key, _ in limits.numbers(tree_of(cfg))}
    wrong = []
    for key in sorted(key for key in keys if key.startswith(section) and "method_inputs" not in key):
        for value in VALUES:
            point = copy.deepcopy(cfg)
            try:
                OmegaConf.update(point, key, OverridesParser.create().parse_overrides([f"{key}={value}"])[0].value())
                one = configuration.trial(point, cfg.hydra.runtime.choices, [f"{key}={value}"])
                if forecast.check(one).trainable_parameters is None:
                    wrong.append(f"{key}={value}: is not attached")
            except (InputError, OmegaConfBaseException) as error:
                message = str(error) if isinstance(error, InputError) else checks.one_line(error)
                if not message.startswith(key) or "\n" in message:
                    wrong.append(f"{key}={value}: {message}")
    assert wrong == []
