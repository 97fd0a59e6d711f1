"""Every configuration record. Standard library only; the paper's values are the defaults."""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from chatsae.errors import UserError

Architecture = Literal["standard", "jumprelu"]
Form = Literal["paper", "v6"]
Method = Literal["fast", "bt-f", "bt-f-isolated", "bt-p"]
Way = Literal["padded", "packed", "single"]
Precision = Literal["float32", "tf32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The language model whose residual stream is read."""

    name: str = "demo"
    """Hub name or local directory of a decoder-only chat model; "demo" is the tiny chat model in this package."""
    layers: tuple[int, ...] = (3,)
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
    random_weights: int | None = None
    """Seed of random weights in place of the model's own, each tensor of its mean and variance: a control."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model. Leave it off unless you have read that code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What reaches the language model, and how."""

    method: Method = "fast"
    """fast: each dialogue alone; bt-f: rendered dialogues in blocks; bt-p: pretraining text in blocks; bt-f-isolated:
    the blocks of bt-f, but attention stays within each dialogue."""
    sources: tuple[str, ...] = ("pydocs",)
    """Chat corpora for fast and bt-f: presets, hub ids, or local .jsonl and .parquet files."""
    text_sources: tuple[str, ...] = ("pydocs",)
    """Plain-text corpora for bt-p: presets, hub ids, or local .jsonl and .parquet files with a `text` field."""
    prepared: str = ""
    """Directory that `chatsae prepare` wrote; the run reads it in place of the sources."""
    order: Literal["mixed", "listed"] = "mixed"
    """mixed: rows of all sources drawn in proportion to their size; listed: one source after another."""
    max_tokens: int | None = None
    """Training tokens to prepare; 0: all there are; by default train.tokens."""
    held_out: tuple[int, int, int] = (5000, 10_000, 1010)
    """Dialogues to prepare for evaluation, interpretation and steering; training shares no n-gram with them."""
    ngram: int = 20
    """Words per window of the greedy deduplication; 0 turns it off."""
    ngram_roles: tuple[str, ...] = ()
    """Roles whose turns are compared; empty: all. Without system, a long system prompt that repeats drops nothing."""
    memory_gb: float = 0
    """Memory for the n-grams; where more is needed the sources are read twice, with the same result. 0: no limit."""
    workers: int = 0
    """Processes that tokenise; 0: one per core."""
    max_length: int = 8192
    """Tokens after which a dialogue is cut (fast)."""
    block_size: int = 2048
    """Tokens per block (bt-f, bt-p)."""
    epochs: int = 1
    """Passes over the data; 0: as many as train.tokens needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestConfig:
    """How sequences are batched through the language model: speed, and the order in which activations come."""

    way: Literal["auto", "padded", "packed", "single"] = "auto"
    """How sequences share a forward: padded on the right, packed in one row, or single; auto: the first exact one."""
    token_budget: int = 0
    """Tokens per forward, padding counted; 0: chosen for the machine."""
    pool: int = 4096
    """Sequences that are sorted by length together."""
    prefix: Literal["auto", "on", "off"] = "auto"
    """Compute the tokens that the template puts before every dialogue once; auto: on a CPU, where it is exact."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A dialogue with NaN or infinite activations stops the run, or is left out and counted."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Read ahead in a thread while the SAEs train, half of the threads for either, to the same results; auto: on a CPU
    where model and SAEs have about as much to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferConfig:
    """The mixing buffer."""

    capacity: int = 500_000
    """Activations held; a random half is served and replaced meanwhile, then the next half is drawn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where they are held; auto: with the model, or on the CPU if they would take over half of a GPU's free memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEConfig:
    """The grid of SAEs: the product of the tuples below, at every layer."""

    architectures: tuple[Architecture, ...] = ("standard", "jumprelu")
    """standard: ReLU + L1; jumprelu: learned thresholds + L0."""
    expansion_factors: tuple[int, ...] = (8,)
    """d_sae / d_in."""
    form: Form = "paper"
    """paper: unit-norm decoder rows, unweighted L1, log thresholds; v6: sae_lens 6, which regularises."""
    l1_coefficients: tuple[float, ...] = (5.0,)
    """Weight of the L1 penalty (standard)."""
    l0_coefficients: tuple[float, ...] = (0.01,)
    """Weight of the L0 penalty (jumprelu)."""
    bandwidth: float = 0.001
    """Width of the straight-through estimator's kernel (jumprelu); sae_lens 6 uses 0.05."""
    init_threshold: float = 0.001
    """Initial threshold (jumprelu); sae_lens 6 uses 0.01."""
    lrs: tuple[float, ...] = (7e-5,)
    """Peak learning rates."""
    b_dec_init: Literal["geometric_median", "zeros"] = "geometric_median"
    """Initial decoder bias."""
    apply_b_dec_to_input: bool = False
    """Subtract b_dec from the input of the encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run."""

    tokens: int = 40_960_000
    """Activations each SAE is trained on."""
    batch_size: int = 128
    """Tokens per step."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    lr_end_share: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    lr_warmup_share: float = 0.05
    """Share of the steps with a rising learning rate (the paper's 16,000 of 320,000)."""
    lr_decay_share: float = 0.2
    """Share of the steps at the end in which the rate falls linearly to zero (64,000 of 320,000)."""
    sparsity_warmup_share: float = 0.03125
    """Share of the steps in which the sparsity coefficient rises from zero (10,000 of 320,000)."""
    step: Literal["auto", "plain", "fast"] = "auto"
    """plain: autograd and fused Adam; fast: sparse kernels (a CPU with chatsae[fast]); auto: by measured density."""
    encoder_precision: Precision = "float32"
    """Of the encoder's product on a GPU (chatsae[gpu]); tf32 and bf16 are faster and round its inputs."""
    clip_grad_norm: float = 1.0
    """Largest global norm of the gradient of an SAE."""
    dead_feature_window: int = 1000
    """Steps without firing after which a feature counts as dead."""
    seed: int = 42
    """Seeds initial weights, data order and the buffer."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl."""
    gsnr: bool = True
    """Measure the signal-to-noise ratio of each SAE's gradient for lines of metrics.jsonl, at most every 100 steps."""
    checkpoint_every: int = 5000
    """Steps between checkpoints."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Evaluation on held-out dialogues, each fed whole."""

    dialogues: int = 5000
    """Held-out dialogues."""
    sources: tuple[str, ...] = ()
    """Chat corpora to evaluate on; empty: the held-out part of data.sources."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
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
        UserError: an architecture is unknown, a tuple is empty, or a field of an absent architecture was changed.
    """
    for name in config.architectures:
        if name not in get_args(Architecture):
            raise UserError(f"sae.architectures: {name!r} is not one of {', '.join(get_args(Architecture))}")
    for name in ("architectures", "expansion_factors", "l1_coefficients", "l0_coefficients", "lrs"):
        if not getattr(config, name):
            raise UserError(f"sae.{name} is empty; at least one value is needed")
        if len(set(getattr(config, name))) != len(getattr(config, name)):
            raise UserError(f"sae.{name} holds a value twice: {getattr(config, name)}")
    positive = {
        "expansion_factors": config.expansion_factors,
        "lrs": config.lrs,
        "bandwidth": (config.bandwidth,),
        "init_threshold": (config.init_threshold,),
    }
    for name, values in positive.items():
        if min(values) <= 0:
            raise UserError(f"sae.{name} must be above 0, not {min(values)}")
    if min(*config.l1_coefficients, *config.l0_coefficients) < 0:
        raise UserError("sae.l1_coefficients and sae.l0_coefficients must not be negative")
    defaults = {f.name: f.default for f in fields(SAEConfig)}
    for name, architecture in _ONLY_FOR.items():
        if architecture not in config.architectures and getattr(config, name) != defaults[name]:
            raise UserError(
                f"sae.{name} is set, but only {architecture} SAEs have it and sae.architectures is "
                f"{', '.join(config.architectures)}"
            )


def sae_specs(config: SAEConfig, *, layers: tuple[int, ...], d_in: int) -> list[SAESpec]:
    """The SAEs of a grid, in order: layers x expansion factors x architectures x coefficients x learning rates.

    Names follow the paper (`L18-8x-standard`); a coefficient or a rate joins the name when the grid varies it.

    Raises:
        UserError: see `check_sae`.
    """
    check_sae(config)
    specs = []
    for layer in layers:
        for factor in config.expansion_factors:
            for architecture in config.architectures:
                penalty, values = (
                    ("l1", config.l1_coefficients) if architecture == "standard" else ("l0", config.l0_coefficients)
                )
                for coefficient in values:
                    for lr in config.lrs:
                        name = f"L{layer}-{factor}x-{architecture}"
                        name += f"-{penalty}_{coefficient:g}" if len(values) > 1 else ""
                        name += f"-lr_{lr:g}" if len(config.lrs) > 1 else ""
                        specs.append(
                            SAESpec(
                                name=name,
                                architecture=architecture,
                                form=config.form,
                                layer=layer,
                                d_in=d_in,
                                d_sae=factor * d_in,
                                coefficient=coefficient,
                                lr=lr,
                                bandwidth=config.bandwidth,
                                init_threshold=config.init_threshold,
                                b_dec_init=config.b_dec_init,
                                apply_b_dec_to_input=config.apply_b_dec_to_input,
                            )
                        )
    return specs
