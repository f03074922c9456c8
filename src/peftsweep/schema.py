"""The schema of a configuration: every key with its type and default, as plain dataclasses.

The files in conf/ fill these in, config/ checks them, and all other modules receive them as plain values.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MISSING: Any = "???"  # OmegaConf's mark of a mandatory value


class Init(Enum):
    """Where the base's weights come from."""

    pretrained = "pretrained"
    random = "random"


class Task(Enum):
    """What the base is loaded for: its head, and what its loss is on."""

    causal_lm = "causal_lm"
    seq_cls = "seq_cls"


class Dtype(Enum):
    """Number formats of weights and of autocast, under torch's names; auto is that of the base alone."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Schedule(Enum):
    """Shape of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass
class ModelConfig:
    """The frozen base."""

    name_or_path: str = MISSING  # hub id, local folder, or "tiny" for the embedded model
    revision: str | None = None  # commit, tag or branch of a model on the hub; null: the newest commit
    task: Task = Task.causal_lm  # seq_cls: a head over dataset.classes in place of the language-model head
    init: Init = Init.pretrained  # random: the architecture below with random weights, without a download
    dtype: Dtype = Dtype.float32  # auto: bfloat16 on CUDA; on a CPU the faster one of float32 and bfloat16
    attn_implementation: str | None = None  # eager, sdpa, flash_attention_2; null: transformers chooses
    device_map: Any = None  # as in transformers: auto, or module name -> device; null: all modules on `device`
    architecture: dict[str, Any] = field(default_factory=dict)  # model_type and sizes, for init=random
    roles: dict[str, list[str]] = field(default_factory=dict)  # role -> names of its modules


@dataclass
class TargetsConfig:
    """The modules that an adapter is attached to; all null: the default modules of the method."""

    roles: list[str] | None = None  # q, k, v, o, mlp, experts, shared_experts, linear_attention or one in model.roles
    modules: list[str] | None = None  # module names, in place of roles
    all_linear: bool = False  # every linear layer except the output head, experts and routers
    otherwise: list[str] = field(default_factory=lambda: ["q", "v"])  # roles, if the method has no default modules


class OnMissing(Enum):
    """What to do with a row that lacks a value that a template or reader needs."""

    error = "error"
    drop = "drop"  # the row is left out
    empty = "empty"  # the value is an empty text


class Turns(Enum):
    """The turns of the assistant that are trained on, and that perplexity counts."""

    all = "all"
    last = "last"


class LossOn(Enum):
    """The tokens of a training row that the loss counts."""

    answer = "answer"
    text = "text"  # prompt and answer


class Capture(Enum):
    """Whether on CUDA steps of the training and of greedy generation run in static shapes, as CUDA graphs."""

    off = "off"
    auto = "auto"


@dataclass
class ValidationConfig:
    """Validation rows from another source; all null: they are held out of the training rows."""

    path: str | None = None  # a local file; it takes precedence over the hub
    encoding: str | None = None  # encoding of the file, see DatasetConfig
    hub: str | None = None  # id of a dataset on the hub
    hub_config: str | None = None  # name of the dataset's configuration on the hub
    hub_split: str = "train"  # the split of the validation rows
    revision: str | None = None  # commit, tag or branch; null: the newest commit
    columns: dict[str, str] = field(default_factory=dict)  # the dataset's column -> its name in these rows


@dataclass
class DatasetConfig:
    """The rows, and how a row becomes a prompt and its answer."""

    name: str = MISSING  # name of the dataset in tables
    path: str | None = None  # local training rows: .json .jsonl .csv .tsv .parquet .txt .md, or .gz; or a pattern (*)
    test_path: str | None = None  # local test rows, for the dataset's own evaluation
    encoding: str | None = None  # encoding of these files, such as cp1252; null: by the byte order mark, else UTF-8
    hub: str | None = None  # id of a dataset on the hub; a local path takes precedence over it
    hub_config: str | None = None  # name of the dataset's configuration on the hub
    revision: str | None = None  # commit, tag or branch; null: the newest commit
    hub_split: str = "train"  # the split of the training rows
    hub_test_split: str | None = None  # the split of the test rows, unless an evaluation names another
    generator: str | None = None  # dotted path of rows(split, count, seed), for data made from a seed
    train_fraction: float = 0.9  # share of `path` to train on, if no test rows are named
    split_seed: int = 0  # seed of that split, so that trials of different seeds share their test rows
    reader: str | None = None  # dotted path of a function that turns a row into a row, see tasks.py
    missing: OnMissing = OnMissing.error  # what to do if a column of a template has no value
    leave_out_tested: bool = True  # leave out training rows with the prompt and answer of a test or validation row
    max_characters: int | None = None  # leave out training rows with a longer prompt and answer
    deduplicate: bool = False  # leave out training rows that repeat an earlier one
    samples: int | None = None  # the largest number of training rows
    fraction: float = 1.0  # share of the remaining training rows; the validation rows stay the same
    validation_samples: int = 64  # held out of the training rows if train.eval_every is set, see also best_metric
    validation: ValidationConfig = field(default_factory=ValidationConfig)  # or rows from another source
    prompt: str = MISSING  # template over the columns of a row, such as {question}
    answer: str = MISSING  # template of the answer over the same columns
    classes: list[str] = field(default_factory=list)  # names of the classes; an answer is one, or its number from 0
    max_length: int = 768  # tokens of prompt and answer together
    loss_on: LossOn = LossOn.answer  # text: the loss counts the prompt too
    drop_long: bool = False  # leave out training rows that max_length or the model's positions would cut
    chat: bool = False  # render rows with the tokenizer's chat template; false: conversations as plain paragraphs
    turns: Turns = Turns.all  # the assistant's turns in a conversation that are trained on


@dataclass
class TrainConfig:
    """Length, optimizer and other settings of the training."""

    learning_rate: float = 2e-4  # learning rate after the warm-up; a method's yaml has its own
    learning_rate_scale: float = 1.0  # factor of the rate; the yaml of a model sets it
    steps: int = 500  # optimizer steps; 0 trains nothing
    epochs: float | None = None  # passes over the training rows; if given, steps is ignored
    batch_size: int = 16  # rows of a micro-batch
    accumulation: int = 1  # micro-batches of batch_size rows for one optimizer step
    schedule: Schedule = Schedule.cosine  # shape of the learning rate after the warm-up
    warmup: float = 0.05  # below 1 a fraction of the steps, from 1 on a number of steps; less than all steps
    weight_decay: float = 0.0  # weight decay of the optimizer
    clip: float = 1.0  # the largest norm of the gradient; 0: no clipping
    optimizer: str = "torch.optim.AdamW"  # a name in torch.optim (SGD), or a dotted path (bitsandbytes.optim.AdamW8bit)
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the optimizer
    autocast: Dtype | None = None  # dtype of torch.autocast for the forward and the loss; null: no autocast
    autocast_adapter_dtype: bool = True  # an adapter on a 16-bit base has 32-bit weights
    checkpointing: bool = False  # gradient checkpointing: less memory, more time
    compile: str = "none"  # a backend of torch.compile: inductor, aot_eager, cudagraphs, eager
    compile_dynamic: bool | None = None  # null: dynamic shapes from the second one on; false: one graph for each shape
    pad_to_multiple_of: int = 1  # pad batches to a multiple of so many tokens: fewer shapes, more padding
    capture: Capture = Capture.auto  # auto: on CUDA without compile, pad to few lengths and capture graphs
    eval_every: str | None = None  # validate every "100" steps or "0.5epochs"; null: never
    keep_best: bool = False  # use the weights of the best validation at the end
    best_metric: str = "loss"  # the best validation has the lowest loss, or the best <eval>.<metric>
    patience: int | None = None  # stop after so many validations without a gain in best_metric; null: never
    checkpoint_every: str | None = "10min"  # a time, steps or epochs; null: if interrupted and at the end
    params_file: str | None = None  # a training_params.json of PEFT's comparison, or its folder
    log_every: int = 10  # write a line of steps.jsonl every so many steps


class Role(Enum):
    """The purpose of an evaluation."""

    target = "target"  # the task that is trained for
    retention = "retention"  # an ability of the base that should be kept


@dataclass
class AdapterConfig:
    """The trained adapter: saved, checked, merged, or read from a folder."""

    path: str | None = None  # evaluate this saved adapter (of a trial or of PEFT), and train nothing
    save: bool = True  # keep the trained adapter in the trial's folder
    check: bool = True  # load the saved adapter onto a fresh base and compare the two
    scales: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])  # further scales to score it, for retention
    merge: bool = False  # write the dequantised model with the merged adapter to the trial's folder merged/


class Resource(Enum):
    """What a trial gets more of from rung to rung."""

    steps = "steps"
    rows = "rows"  # training rows: each rung is a new training on more of them


@dataclass
class HalvingConfig:
    """Successive halving: all trials run to a rung, and only the best of them to the next one."""

    metric: str | None = None  # the metric of the validation that ranks trials; null: train.best_metric
    factor: int = 3  # 3: one trial in three continues, for three times the steps
    min_steps: int | None = None  # optimizer steps up to the first rung; null: every trial runs to its end
    rung: int | None = None  # the rung at which this trial stops, from 1; set by the sweeper
    resource: Resource = Resource.steps  # rows: each rung is a new trial on more training rows
    min_fraction: float | None = None  # with resource=rows: share of the rows at the first rung; null: no halving
    test: bool = True  # false: the trial ends before its test rows; set by the sweeper


@dataclass
class SearchConfig:
    """The trial's place in a search by Optuna; set by the sweeper."""

    study: str | None = None  # name of the search
    trial: int | None = None  # its number in the search


@dataclass
class TuneConfig:
    """sweep=tune: the values to search, and when the comparison of finalists ends."""

    rates: list[float] | None = None  # learning rates; null: rates around the method's own, extended beyond the best
    ranks: list[int] | None = None  # ranks; null: 1, 2 and 4 times the method's rank or other size option
    targets: list[str] | None = None  # options of `targets`; null: the method's own, qv, all_linear
    metric: str | None = None  # the metric of the validation; null: train.best_metric
    finalists: int = 2  # the number of methods, the best by validation, that are evaluated on the test rows
    seeds: int = 8  # the most seeds of each finalist
    tie: float = 0.01  # the largest difference that does not matter: 0.01 of an accuracy, 1% of a perplexity
    replay: str | None = None  # a table of finished runs to search, in place of training


@dataclass
class LeagueConfig:
    """sweep=league: methods compared at equal effort."""

    trials: int = 8  # tuning trials of each method
    seeds: int = 5  # final trials of each method, evaluated on the test rows
    placebo: str = "lora"  # the method that takes part twice, under another name and with other seeds
    difference: float = 0.02  # a difference of scores; the league says how many seeds would show it


@dataclass
class PriceConfig:
    """The price of an hour of a device, in the user's currency: `price=2.49`, or a table of conf/price."""

    hour: Any = None  # a number, or words of device names -> numbers; the first that the name has counts
    currency: str = ""  # printed with the cost


@dataclass
class ForecastConfig:
    """Further records for predictions of time, beside the device's measured speed and the study's own records."""

    records: str | None = None  # a study, by name or folder, whose records of the same device correct the times


@dataclass
class Config:
    """One trial."""

    study: str = "default"  # the folder of the trials: multirun/<study>
    experiments: str | None = None  # the folder with the experiments of sweep=experiments
    label: str | None = None  # a free name for the trial; null: from its choices
    seed: int = 0  # seed of the adapter's initial weights, the order of rows and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    dry_run: bool = False  # list the trials with their sizes, write plan.json, train nothing
    memory_limit: str | None = None  # such as 24GB; null: the memory of the device, unknown on a CPU
    skip_oversized: bool = False  # refuse trials that are predicted to need more
    force: bool = False  # run finished trials again
    trust: bool = False  # run code outside of peftsweep that a record, adapter or experiment names
    repeat: str | None = None  # the folder of a trial: run it again from its record, and compare
    quiet: bool = False  # print the final line only
    stop_on_failure: bool = False  # end the sweep at the first trial that fails
    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)  # a PEFT config as _target_ and its fields; empty: full
    method_inputs: dict[str, int] = field(default_factory=dict)  # arguments of its forward, the same for each row
    method_setup: dict[str, Any] = field(default_factory=dict)  # a function of models.initialise, which needs data
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    quant: dict[str, Any] = field(default_factory=dict)  # a transformers quantization config; empty: none
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    eval: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> function of evaluate and its options
    train: TrainConfig = field(default_factory=TrainConfig)
    inference: dict[str, Any] = field(default_factory=dict)  # a function of inference and its options; empty: not timed
    profiler: dict[str, Any] = field(default_factory=dict)  # a function of profiler and its options; empty: no profiler
    tracker: dict[str, Any] = field(default_factory=dict)  # a function of tracker and its options; empty: no tracker
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    halving: HalvingConfig = field(default_factory=HalvingConfig)
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    price: PriceConfig = field(default_factory=PriceConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    budget: str | None = None  # the budget of sweep=tune: 40trials, 5000steps, 90m, 2h; null: no limit
    tune: TuneConfig = field(default_factory=TuneConfig)
    league: LeagueConfig = field(default_factory=LeagueConfig)
    objective: Any = None  # a column of the record, or a list of columns, that a search by Optuna optimises


@dataclass
class RowsConfig:
    """The part of an `eval` entry that names its rows; all null: the dataset's own test rows."""

    path: str | None = None  # local rows; null: the dataset's test rows, or the hub's
    encoding: str | None = None  # encoding of the file, see DatasetConfig
    hub: str | None = None  # id of a dataset on the hub
    hub_config: str | None = None  # name of the dataset's configuration on the hub
    hub_split: str = "test"  # the split of the test rows
    revision: str | None = None  # commit, tag or branch; null: the newest commit
    reader: str | None = None  # null: the dataset's reader
    prompt: str | None = None  # null: the dataset's template
    answer: str | None = None  # template of the right answer; null: the dataset's template
    samples: int | None = None  # the first rows only
    role: Role = Role.target  # retention: an ability of the base that should be kept


@functools.cache
def key_types(section: Any) -> dict[str, Any]:
    """The annotation of each key of a section, which is a dataclass of this file; cached, because reading is slow."""
    return typing.get_type_hints(section)


def type_of(key: str) -> Any:
    """The annotation of a dotted key of ``Config``; None for one that the schema does not list.

    For a section with free names, such as ``eval``, it is the annotation of its values; for a place in a list, such as
    ``adapter.scales.1``, the annotation of the items.
    """
    kind: Any = Config
    for part in key.split("."):
        if part.isdecimal():
            lists = [one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is list]
            return typing.get_args(lists[0])[0] if lists else None
        kinds = key_types(kind) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else {}
        if part not in kinds:
            return None
        kind = kinds[part]
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            return None if kind is Any else kind
    return kind


def value_at(tree: Any, key: str, default: Any = None) -> Any:
    """The value of a dotted key in nested mappings; ``default`` if a part of the key is missing."""
    for part in key.split("."):
        tree = tree.get(part, default) if isinstance(tree, Mapping) else default
    return tree
