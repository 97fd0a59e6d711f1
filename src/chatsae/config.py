"""Every configuration record. Standard library only; the paper's values are the defaults.

A field's type says which values it takes (`chatsae.typed`); a record with another value cannot be made.
"""

from dataclasses import dataclass, field, fields
from itertools import product
from typing import Annotated, Literal

from chatsae.errors import UserError
from chatsae.typed import Count, Grid, Natural, Number, Positive, Seed, Share, Words, checked

Architecture = Literal["standard", "jumprelu"]
Form = Literal["paper", "v6"]
Method = Literal["fast", "bt-f", "bt-f-isolated", "bt-p"]
Way = Literal["padded", "packed", "single"]
Precision = Literal["float32", "tf32", "bf16"]
Role = Literal["system", "user", "assistant", "tool"]

_Coefficient = Annotated[float, Number(least=0, most=1e12)]
_Beta = Annotated[float, Number(least=0, below=1)]


class _Checked:
    """Converts and checks its fields when it is made, wherever that is: a recipe, the command line, Python.

    Raises:
        UserError: a value is of the wrong type or out of bounds; names the field, as a recipe does.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        checked(self, lambda name: name if section == "run" else f"{section}.{name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(_Checked):
    """The language model whose residual stream is read."""

    name: Words = "demo"
    """Hub name or local directory of a decoder-only chat model, or a GGUF file (file.gguf, owner/model:file.gguf);
    "demo" is the tiny chat model in this package, "smollm2" what `chatsae fetch smollm2` brings."""
    layers: tuple[Natural, ...] = (3,)
    """Blocks whose output (resid_post) is read; every one trains its own SAEs from the same pass."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the language model; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, cuda:1 ..."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """Spread the blocks over all GPUs, for a model larger than one (needs chatsae[large]); device stays auto."""
    quantization: Literal["checkpoint", "dequantize", "bnb-8bit", "bnb-4bit"] = "checkpoint"
    """checkpoint: weights as they are stored; dequantize: turned into dtype; bnb-...: quantised by bitsandbytes."""
    layer_path: str | None = None
    """Module path of the list of blocks, for an architecture in which it is not found (docs/models.md)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    chat_template: str | None = None
    """Name of the chat template, where the tokenizer has several; default: the one it calls default."""
    random_weights: Seed | None = None
    """Seed of random weights in place of the model's own, each tensor of its mean and variance: a control."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model. Leave it off unless you have read that code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(_Checked):
    """What reaches the language model, and how."""

    method: Method = "fast"
    """fast: each dialogue alone; bt-f: rendered dialogues in blocks; bt-p: pretraining text in blocks; bt-f-isolated:
    the blocks of bt-f, but attention stays within each dialogue."""
    sources: tuple[Words, ...] = ("pydocs",)
    """Chat corpora for fast and bt-f: presets, hub ids, or local .jsonl and .parquet files."""
    text_sources: tuple[Words, ...] = ("pydocs",)
    """Plain-text corpora for bt-p: presets, hub ids, or local .jsonl and .parquet files with a `text` field."""
    prepared: str = ""
    """Directory that `chatsae prepare` wrote; the run reads it in place of the sources."""
    order: Literal["mixed", "listed"] = "mixed"
    """mixed: rows of all sources drawn in proportion to their size; listed: one source after another."""
    max_tokens: Natural | None = None
    """Training tokens to prepare; 0: all there are; by default train.tokens."""
    held_out: tuple[Natural, Natural, Natural] = (5000, 10_000, 1010)
    """Dialogues to prepare for evaluation, interpretation and steering; training shares no n-gram with them."""
    ngram: Natural = 20
    """Words per window of the greedy deduplication; 0 turns it off."""
    ngram_roles: tuple[Role, ...] = ()
    """Roles whose turns are compared; empty: all. Without system, a long system prompt that repeats drops nothing."""
    memory_gb: Annotated[float, Number(least=0)] = 0
    """Memory for the n-grams; where more is needed the sources are read twice, with the same result. 0: no limit."""
    workers: Annotated[int, Number(least=0, most=4096)] = 0
    """Processes that tokenise; 0: one per core."""
    max_length: Count = 8192
    """Tokens after which a dialogue is cut (fast)."""
    block_size: Count = 2048
    """Tokens per block (bt-f, bt-p)."""
    epochs: Natural = 1
    """Passes over the data; 0: as many as train.tokens needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestConfig(_Checked):
    """How sequences are batched through the language model: speed, and the order in which activations come."""

    way: Literal["auto", "padded", "packed", "single"] = "auto"
    """How sequences share a forward: padded on the right, packed in one row, or single; auto: the first exact one."""
    token_budget: Natural = 0
    """Tokens per forward, padding counted; 0: chosen for the machine."""
    pool: Count = 4096
    """Sequences that are sorted by length together."""
    prefix: Literal["auto", "on", "off"] = "auto"
    """Compute the tokens that the template puts before every dialogue once; auto: on a CPU, where it is exact."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A dialogue with NaN or infinite activations stops the run, or is left out and counted."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Read ahead in a thread while the SAEs train, half of the threads for either, to the same results; auto: on a CPU
    where model and SAEs have about as much to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferConfig(_Checked):
    """The mixing buffer."""

    capacity: Count = 500_000
    """Activations held; a random half is served and replaced meanwhile, then the next half is drawn. At the default at
    most a quarter of train.tokens, at another value at most all of them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where they are held; auto: with the model, or on the CPU if they would take over half of a GPU's free memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEConfig(_Checked):
    """The grid of SAEs: the product of the tuples below, at every layer."""

    architectures: Annotated[tuple[Architecture, ...], Grid()] = ("standard", "jumprelu")
    """standard: ReLU + L1; jumprelu: learned thresholds + L0."""
    expansion_factors: Annotated[tuple[Count, ...], Grid()] = (8,)
    """d_sae / d_in."""
    form: Form = "paper"
    """paper: unit-norm decoder rows, unweighted L1, log thresholds; v6: sae_lens 6, which regularises."""
    l1_coefficients: Annotated[tuple[_Coefficient, ...], Grid()] = (5.0,)
    """Weight of the L1 penalty (standard)."""
    l0_coefficients: Annotated[tuple[_Coefficient, ...], Grid()] = (0.01,)
    """Weight of the L0 penalty (jumprelu)."""
    target_l0: Annotated[tuple[Positive, ...], Grid(empty=True)] = ()
    """Active features per token that an SAE should end with: the coefficient above is where it begins, and is steered
    until it gives this. Empty: the coefficient stays."""
    normalize: Literal["none", "scale"] = "none"
    """scale: activations times sqrt(d_in) over their mean norm (sinks apart), so that coefficients, bandwidth and
    thresholds mean the same for every model and layer; it is folded into the weights that are saved."""
    bandwidth: Positive = 0.001
    """Width of the straight-through estimator's kernel (jumprelu); sae_lens 6 uses 0.05."""
    init_threshold: Positive = 0.001
    """Initial threshold (jumprelu); sae_lens 6 uses 0.01."""
    lrs: Annotated[tuple[Positive, ...], Grid()] = (7e-5,)
    """Peak learning rates."""
    b_dec_init: Literal["geometric_median", "zeros"] = "geometric_median"
    """Initial decoder bias."""
    apply_b_dec_to_input: bool = False
    """Subtract b_dec from the input of the encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(_Checked):
    """One training run."""

    tokens: Count = 40_960_000
    """Activations each SAE is trained on."""
    batch_size: Count = 128
    """Tokens per step."""
    sinks: Literal["keep", "skip", "clip"] = "keep"
    """Tokens whose activation is over ten times longer than the median at a layer that is read: trained on as they
    are, left out, or shortened to that. Evaluation shows them apart."""
    adam_betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    lr_end_share: Share = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    lr_warmup_share: Share = 0.05
    """Share of the steps with a rising learning rate (the paper's 16,000 of 320,000)."""
    lr_decay_share: Share = 0.2
    """Share of the steps at the end in which the rate falls linearly to zero (64,000 of 320,000)."""
    sparsity_warmup_share: Share = 0.03125
    """Share of the steps in which the sparsity coefficient rises from zero (10,000 of 320,000)."""
    step: Literal["auto", "plain", "fast"] = "auto"
    """plain: autograd and fused Adam; fast: sparse kernels (a CPU with chatsae[fast]); auto: by measured density."""
    encoder_precision: Precision = "float32"
    """Of the encoder's product on a GPU (chatsae[gpu]); tf32 and bf16 are faster and round its inputs."""
    clip_grad_norm: Annotated[float, Number(above=0, finite=False)] = 1.0
    """Largest global norm of the gradient of an SAE."""
    dead_feature_window: Natural = 1000
    """Steps without firing after which a feature counts as dead."""
    seed: Seed = 42
    """Seeds initial weights, data order and the buffer."""
    log_every: Count = 100
    """Steps between lines of metrics.jsonl."""
    gsnr: bool = True
    """Measure the signal-to-noise ratio of each SAE's gradient for lines of metrics.jsonl, at most every 100 steps."""
    checkpoint_every: Count = 5000
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        _Checked.__post_init__(self)
        if self.lr_warmup_share + self.lr_decay_share > 1:
            raise UserError("train.lr_warmup_share and train.lr_decay_share add up to more than 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig(_Checked):
    """Evaluation on held-out dialogues, each fed whole."""

    dialogues: Count = 5000
    """Held-out dialogues."""
    sources: tuple[Words, ...] = ()
    """Chat corpora to evaluate on; empty: the held-out part of data.sources."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(_Checked):
    """One run: one language-model pass that trains a grid of SAEs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class SAESpec:
    """One SAE of a grid: everything that defines it before training."""

    name: str
    architecture: Architecture
    form: Form
    layer: int
    d_in: int
    d_sae: int
    coefficient: float
    lr: float
    target_l0: float | None = None
    bandwidth: float = 0.001
    init_threshold: float = 0.001
    b_dec_init: Literal["geometric_median", "zeros"] = "geometric_median"
    apply_b_dec_to_input: bool = False

    @property
    def expansion_factor(self) -> int:
        return self.d_sae // self.d_in


_ONLY_FOR: dict[str, Architecture] = {
    "l1_coefficients": "standard",
    "l0_coefficients": "jumprelu",
    "bandwidth": "jumprelu",
    "init_threshold": "jumprelu",
}


def check_sae(config: SAEConfig) -> None:
    """Refuse a grid that would silently ignore a field.

    Raises:
        UserError: a field of an absent architecture was changed, or targets are given with several coefficients.
    """
    defaults = {f.name: f.default for f in fields(SAEConfig)}
    for name, architecture in _ONLY_FOR.items():
        if architecture not in config.architectures and getattr(config, name) != defaults[name]:
            raise UserError(
                f"sae.{name} is set, but only {architecture} SAEs have it and sae.architectures is "
                f"{', '.join(config.architectures)}"
            )
    for name in ("l1_coefficients", "l0_coefficients"):
        if config.target_l0 and len(getattr(config, name)) > 1:
            raise UserError(f"sae.target_l0 is set, so that sae.{name} is where it begins: one value, not several")


def check_train(config: TrainConfig) -> None:
    """Refuse a training without a step.

    Raises:
        UserError: there are fewer tokens than in one batch.
    """
    if config.tokens < config.batch_size:
        raise UserError(f"train.tokens is {config.tokens}, less than one batch of {config.batch_size}")


def check_run(config: RunConfig) -> None:
    """Refuse what no run can have although every field is sound.

    Raises:
        UserError: names the fields, what they hold and what was expected.
    """
    if not config.model.layers:
        raise UserError("model.layers is empty; at least one layer is needed")
    if len(set(config.model.layers)) != len(config.model.layers):
        raise UserError(f"model.layers: a layer is asked for twice: {', '.join(map(str, config.model.layers))}")
    check_train(config.train)
    check_sae(config.sae)
    if config.buffer.capacity < 2 * config.train.batch_size:
        needed = f"at least two batches ({2 * config.train.batch_size}) needed"
        raise UserError(f"buffer.capacity: {config.buffer.capacity} given, {needed}")
    sources = "text_sources" if config.data.method == "bt-p" else "sources"
    if not config.data.prepared and not getattr(config.data, sources):
        raise UserError(f"data.{sources} is empty; name at least one source (pydocs is built in)")


def sae_specs(config: SAEConfig, *, layers: tuple[int, ...], d_in: int) -> list[SAESpec]:
    """The SAEs of a grid, in order: layers x expansion factors x architectures x coefficients x learning rates.

    Names follow the paper (`L18-8x-standard`); a coefficient or a rate joins the name when the grid varies it.

    Raises:
        UserError: see `check_sae`.
    """
    check_sae(config)
    specs = []
    for layer, factor, architecture in product(layers, config.expansion_factors, config.architectures):
        penalty = "l1" if architecture == "standard" else "l0"
        values = config.l1_coefficients if architecture == "standard" else config.l0_coefficients
        for coefficient, target, lr in product(values, config.target_l0 or (None,), config.lrs):
            name = f"L{layer}-{factor}x-{architecture}"
            name += f"-{penalty}_{coefficient:g}" if len(values) > 1 else ""
            name += f"-target_{target:g}" if len(config.target_l0) > 1 else ""
            name += f"-lr_{lr:g}" if len(config.lrs) > 1 else ""
            spec = SAESpec(
                name=name,
                architecture=architecture,
                form=config.form,
                layer=layer,
                d_in=d_in,
                d_sae=factor * d_in,
                coefficient=coefficient,
                lr=lr,
                target_l0=target,
                bandwidth=config.bandwidth,
                init_threshold=config.init_threshold,
                b_dec_init=config.b_dec_init,
                apply_b_dec_to_input=config.apply_b_dec_to_input,
            )
            specs.append(spec)
    return specs
