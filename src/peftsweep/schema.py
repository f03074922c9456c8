"""The schema of a configuration: every key with its type and default, as plain dataclasses.

The files in conf/ fill these in, config/ checks them, and all other modules receive them as plain values.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
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
    revision: str | None = None  # commit, tag or branch of a model of the hub; null: its newest
    task: Task = Task.causal_lm  # seq_cls: a head over dataset.classes in place of that over the vocabulary
    init: Init = Init.pretrained  # random: the architecture below with untrained weights, no download
    dtype: Dtype = Dtype.float32  # auto: bfloat16 on CUDA, on a CPU float32 or bfloat16 by what it multiplies faster
    attn_implementation: str | None = None  # eager, sdpa, flash_attention_2; null lets transformers choose
    device_map: Any = None  # as in transformers: module name -> device, or auto; null: all on `device`
    architecture: dict[str, Any] = field(default_factory=dict)  # model_type and sizes, for init=random
    roles: dict[str, list[str]] = field(default_factory=dict)  # role -> names of the modules that play it


@dataclass
class TargetsConfig:
    """Which modules an adapter is attached to; all null means what the method itself prefers."""

    roles: list[str] | None = None  # q, k, v, o, mlp, experts, shared_experts, linear_attention, or of model.roles
    modules: list[str] | None = None  # module names, for what the roles cannot say
    all_linear: bool = False  # every linear layer but the output head, experts and routers
    otherwise: list[str] = field(default_factory=lambda: ["q", "v"])  # roles, where the method prefers none


class OnMissing(Enum):
    """What becomes of a row without a value for a column that a template or reader needs."""

    error = "error"
    drop = "drop"  # the row is left out
    empty = "empty"  # the value is an empty text


class Turns(Enum):
    """Which turns of the assistant are trained on, and judged by perplexity."""

    all = "all"
    last = "last"


class LossOn(Enum):
    """Which tokens of a training row the loss is over."""

    answer = "answer"
    text = "text"  # prompt and answer


class Capture(Enum):
    """Whether on CUDA the step's forward and backward are taken in few static shapes and captured as CUDA graphs."""

    off = "off"
    auto = "auto"


@dataclass
class ValidationConfig:
    """Rows to validate on that are not held out of the training rows; all null means that those are."""

    path: str | None = None  # a local file, which wins over the hub
    encoding: str | None = None  # of the file, see DatasetConfig
    hub: str | None = None  # id of a dataset of the hub
    hub_config: str | None = None  # name of its configuration
    hub_split: str = "train"  # its part that is validated on
    revision: str | None = None  # commit, tag or branch; null: the newest
    columns: dict[str, str] = field(default_factory=dict)  # the dataset's column -> its name in these rows


@dataclass
class DatasetConfig:
    """Rows, and how a row becomes a prompt and its answer."""

    name: str = MISSING  # what the dataset is called in tables
    path: str | None = None  # local training rows: .json .jsonl .csv .tsv .parquet .txt .md, and .gz of them
    test_path: str | None = None  # local rows the dataset's own evaluation judges on
    encoding: str | None = None  # of these files, such as cp1252; null: by the byte order mark, else UTF-8
    hub: str | None = None  # id of a dataset of the hub; a local path wins over it
    hub_config: str | None = None  # name of its configuration
    revision: str | None = None  # commit, tag or branch; null: the newest
    hub_split: str = "train"  # its part that is trained on
    hub_test_split: str | None = None  # its part that is judged on, where no evaluation names another
    generator: str | None = None  # dotted path of rows(split, count, seed), for data made from a seed
    train_fraction: float = 0.9  # parts `path` where no test rows are named
    split_seed: int = 0  # of that parting, so that trials of different seeds share their test rows
    reader: str | None = None  # dotted path of a function row -> row, see tasks.py
    missing: OnMissing = OnMissing.error  # what a null, NaN or absent value of a column that a template names does
    leave_out_tested: bool = True  # leave out training rows whose prompt and answer are a test row's
    max_characters: int | None = None  # of prompt and answer; training rows that are longer are left out
    deduplicate: bool = False  # leave out training rows that repeat an earlier one
    samples: int | None = None  # limit of the training rows
    fraction: float = 1.0  # of the training rows that are then left, beside the same validation rows
    validation_samples: int = 64  # held out of the training rows when train.eval_every is set, see also best_metric
    validation: ValidationConfig = field(default_factory=ValidationConfig)  # or so many rows of another source
    prompt: str = MISSING  # template over the columns of a row, such as {question}
    answer: str = MISSING  # template of what is to be learned, over the same columns
    classes: list[str] = field(default_factory=list)  # of a classification; an answer is one of them or its number
    max_length: int = 768  # tokens of prompt and answer together
    loss_on: LossOn = LossOn.answer  # what is trained on; text: the prompt too
    drop_long: bool = False  # leave out training rows of more tokens, instead of cutting them
    chat: bool = False  # rows go through the tokenizer's chat template; false: conversations in a plain layout
    turns: Turns = Turns.all  # of the assistant in a conversation that are trained on


@dataclass
class TrainConfig:
    """How long and how."""

    learning_rate: float = 2e-4  # of the optimizer, after the warm-up; a method's yaml has its own
    learning_rate_scale: float = 1.0  # times the rate; a model's recipe sets it, not the user
    steps: int = 500  # optimizer steps; 0 trains nothing
    epochs: float | None = None  # when given, counts instead of steps
    batch_size: int = 16  # rows of a micro-batch
    accumulation: int = 1  # micro-batches of batch_size rows for one optimizer step, which takes the same rows as one
    schedule: Schedule = Schedule.cosine  # of the learning rate after the warm-up, to the last step
    warmup: float = 0.05  # below 1 a fraction of the steps, from 1 on a number of steps; fewer than all
    weight_decay: float = 0.0  # of the optimizer
    clip: float = 1.0  # of the gradient's norm; 0 does not clip
    optimizer: str = "torch.optim.AdamW"  # of torch.optim (SGD), or a dotted path (bitsandbytes.optim.AdamW8bit)
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the optimizer
    autocast: Dtype | None = None  # number format of the forward and the loss, by torch.autocast; null: none
    autocast_adapter_dtype: bool = True  # an adapter on a 16-bit base has 32-bit weights
    checkpointing: bool = False  # gradient checkpointing: less memory, more time
    compile: str = "none"  # a backend of torch.compile: inductor, aot_eager, cudagraphs, eager
    compile_dynamic: bool | None = None  # null: shapes become dynamic when a second one is seen; false: one graph each
    pad_to_multiple_of: int = 1  # of tokens: fewer shapes to compile for, more padding
    capture: Capture = Capture.auto  # on CUDA, not compiled: batches of few lengths, whose steps are captured as graphs
    eval_every: str | None = None  # "100" steps or "0.5epochs": validation rows in steps.jsonl
    keep_best: bool = False  # end with the weights of the best validation
    best_metric: str = "loss"  # which one that is: the lowest loss, or <eval>.<metric> on validation rows
    patience: int | None = None  # end as stopped after so many validations in a row without a gain in best_metric
    checkpoint_every: str | None = "10min"  # or steps or epochs as above; null: only if interrupted, and at the end
    params_file: str | None = None  # training_params.json of PEFT's comparison, or a folder that may hold one
    log_every: int = 10  # steps to a line of steps.jsonl


class Role(Enum):
    """What an evaluation is for."""

    target = "target"  # what is trained for
    retention = "retention"  # what the base could do, and is to keep


@dataclass
class AdapterConfig:
    """What becomes of the trained adapter."""

    path: str | None = None  # evaluate this saved adapter (a trial's folder, or any PEFT adapter) and train nothing
    save: bool = True  # keep the trained adapter in the trial's folder
    check: bool = True  # load the saved adapter onto a fresh base and compare the two
    scales: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])  # at which an evaluated adapter is scored
    # too, where an evaluation has role=retention
    merge: bool = False  # write the model with the adapter merged into it, dequantised, to the trial's folder merged/


class Resource(Enum):
    """What grows from rung to rung."""

    steps = "steps"
    rows = "rows"  # of training: each rung is a training of its own, on more of them


@dataclass
class HalvingConfig:
    """Successive halving: trials run to a rung, and only the best of them on to the next."""

    metric: str | None = None  # of the validation, as train.best_metric, which it is by default
    factor: int = 3  # 3: one trial in three goes on, for three times the steps
    min_steps: int | None = None  # steps until the first rung; null: every trial runs to its end
    rung: int | None = None  # at which this trial stops, from 1 on; the sweeper's to say
    resource: Resource = Resource.steps  # of what each rung gives more; rows: of the training rows, by a new trial
    min_fraction: float | None = None  # with resource=rows: share of the rows at the first rung; null as min_steps
    test: bool = True  # false: it stops at its end too, before its test rows are judged; the sweeper's to say


@dataclass
class SearchConfig:
    """Which trial of which search of Optuna's this is; the sweeper's to say."""

    study: str | None = None  # name of the search
    trial: int | None = None  # its number in the search


@dataclass
class TuneConfig:
    """sweep=tune: what is searched, and when a comparison of finalists is over."""

    rates: list[float] | None = None  # learning rates; null: rates around the method's own, extended beyond the best
    ranks: list[int] | None = None  # ranks; null: 1, 2 and 4 times the method's rank or other size option
    targets: list[str] | None = None  # options of `targets`; null: the method's own, qv, all_linear
    metric: str | None = None  # the metric of the validation; null: train.best_metric
    finalists: int = 2  # the number of methods that are judged on the test rows, the best by validation
    seeds: int = 8  # the most seeds of each finalist
    tie: float = 0.01  # a difference that does not matter: of an accuracy 0.01, of a perplexity 1%
    replay: str | None = None  # a table of finished runs to decide on, so that nothing is trained


@dataclass
class LeagueConfig:
    """sweep=league: methods compared at equal effort."""

    trials: int = 8  # of tuning, for every contestant
    seeds: int = 5  # final trials of each, judged on the test rows
    placebo: str = "lora"  # the method that takes part twice, under another name and with other seeds
    difference: float = 0.02  # a difference of scores; the league says how many seeds would show it


@dataclass
class PriceConfig:
    """What an hour of a device costs, in the user's currency: `price=2.49`, or a table of conf/price."""

    hour: Any = None  # a number, or device names -> numbers, of which the first that the device's name holds counts
    currency: str = ""  # only printed


@dataclass
class ForecastConfig:
    """Further records for predictions of time, beside the device's measured speed and the study's own records."""

    records: str | None = None  # a study (below multirun/, or a folder) whose records of the same device correct them


@dataclass
class Config:
    """One trial."""

    study: str = "default"  # the folder of the trials: multirun/<study>
    experiments: str | None = None  # the folder that sweep=experiments walks
    label: str | None = None  # a free name for the trial; null: from its choices
    seed: int = 0  # of the adapter's initial weights, the order of the data and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    dry_run: bool = False  # list the trials with their sizes, write plan.json, train nothing
    memory_limit: str | None = None  # such as 24GB; null: what the device has, unknown on a CPU
    skip_oversized: bool = False  # refuse a trial that is predicted to need more
    force: bool = False  # run trials again that are done
    trust: bool = False  # run what a record or an experiment names, though it is no part of peftsweep
    repeat: str | None = None  # the folder of a trial that is run again from its record, and compared
    quiet: bool = False  # print the final line only
    stop_on_failure: bool = False  # end the sweep at the first trial that fails
    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)  # a PEFT config as _target_ and its fields; empty: full
    method_inputs: dict[str, int] = field(default_factory=dict)  # what its forward wants, the same for each row
    method_setup: dict[str, Any] = field(default_factory=dict)  # a function of initialise, for what needs data
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    quant: dict[str, Any] = field(default_factory=dict)  # a transformers quantization config; empty: none
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    eval: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> function of evaluate and its options
    train: TrainConfig = field(default_factory=TrainConfig)
    inference: dict[str, Any] = field(default_factory=dict)  # a function of inference and its options; empty: not timed
    profiler: dict[str, Any] = field(default_factory=dict)  # of profiler; empty: none
    tracker: dict[str, Any] = field(default_factory=dict)  # of tracker; empty: none
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    halving: HalvingConfig = field(default_factory=HalvingConfig)
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    price: PriceConfig = field(default_factory=PriceConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    budget: str | None = None  # the budget of sweep=tune: 40trials, 5000steps, 90m, 2h; null: no limit
    tune: TuneConfig = field(default_factory=TuneConfig)
    league: LeagueConfig = field(default_factory=LeagueConfig)
    objective: Any = None  # a column of the record, or a list of them, that a sweeper such as Optuna's optimises


@dataclass
class RowsConfig:
    """The part of an `eval` entry that names its rows; all null means the dataset's own test rows."""

    path: str | None = None  # local rows; null: the dataset's test rows, or the hub's
    encoding: str | None = None  # of the file, see DatasetConfig
    hub: str | None = None  # id of a dataset of the hub
    hub_config: str | None = None  # name of its configuration
    hub_split: str = "test"  # its part that is judged on
    revision: str | None = None  # commit, tag or branch; null: the newest
    reader: str | None = None  # null: the dataset's
    prompt: str | None = None  # null: the dataset's template
    answer: str | None = None  # the same of what is right
    samples: int | None = None  # the first rows only
    role: Role = Role.target  # or retention: what the base could do and is to keep


@functools.cache
def key_types(section: Any) -> dict[str, Any]:
    """The annotation of each key of a section, which is a dataclass of this file; read once, as that takes long."""
    return typing.get_type_hints(section)


def type_of(key: str) -> Any:
    """The annotation of a dotted key of ``Config``; None for one that the schema does not list.

    Of a section that holds sections of its own by free names, as ``eval`` does, it is what all of these are; of a
    place in a list (``adapter.scales.1``) what its values are.
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
