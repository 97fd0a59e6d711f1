"""Those who take part in `chatsae bench sae-step`, each with one whole training step: gradients, clipping, Adam.

The peers do what their own trainers do, with their own parts; what a trainer does not do, such as clipping in
dictionary_learning's standard trainer, is not added.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chatsae.bench.step_cases import LR, Case, Start
from chatsae.sae.base import SAE
from chatsae.sae.choose import StepKind
from chatsae.sae.step import make_state, train_step

PLAIN, FAST = "chatsae plain", "chatsae fast"
SIMPLE, FASTER = "PyTorch", {"cpu": "PyTorch, oneDNN", "cuda": "PyTorch, TF32"}
SAE_LENS, DICTIONARY_LEARNING, SPARSIFY = "sae_lens", "dictionary_learning", "sparsify"
MODULES = {SAE_LENS: "sae-lens", DICTIONARY_LEARNING: "dictionary-learning", SPARSIFY: "eai-sparsify"}
_NEEDS = {"cpu": "numba", "cuda": "triton"}  # what our fast step is written in
_STEPS = 1_000_000  # that their schedules are told; the measured ones are at the beginning
_WARM_UP = 1000  # steps of the learning rate; that of dictionary_learning's trainers


class Contender(Protocol):
    """Someone who can train: `l0` is measured on its own weights, `took` says which way its last step went."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def took(self) -> str: ...
    def step(self, x: Float[Tensor, "N D"]) -> None: ...
    def l0(self, x: Float[Tensor, "N D"]) -> float: ...


def contenders(case: Case, device: str) -> dict[str, Callable[[Start, str], Contender]]:
    """Everyone who is here and can take part, by name, with what makes them of a start."""
    makers: dict[str, Callable[[Start, str], Contender]] = {PLAIN: _plain}
    if find_spec(_NEEDS[device]):
        makers[FAST] = Own
    makers |= {SIMPLE: Simple, FASTER[device]: _faster}
    if find_spec(SAE_LENS):
        makers[SAE_LENS] = SaeLens
    if find_spec(DICTIONARY_LEARNING):
        makers[DICTIONARY_LEARNING] = DictionaryLearning
    if find_spec(SPARSIFY) and case.l0 != "dense":
        makers[SPARSIFY] = Sparsify
    return makers


def absent(device: str) -> dict[str, str]:
    """Who cannot take part here, and why."""
    found = {name: "skipped: not installed" for name in MODULES if find_spec(name) is None}
    if find_spec(_NEEDS[device]) is None:
        found[FAST] = f"skipped: {_NEEDS[device]} is not installed"
    return found


class Own:
    """Our step as a run takes it, by `train.step`."""

    def __init__(self, start: Start, device: str, kind: StepKind = "auto") -> None:
        sae = SAE.create(start.spec, device=device)
        sae.load_file_tensors_({name: tensor.to(device) for name, tensor in start.tensors.items()})
        self._state = make_state(sae, step=kind)
        self.optimizer = self._state.optimizer

    @property
    def took(self) -> str:
        switch = self._state.switch
        return "sparse" if switch is not None and not switch.dense else "dense"

    def step(self, x: Float[Tensor, "N D"]) -> None:
        train_step(self._state, x, lr=LR, sparsity_scale=1.0, clip_grad_norm=1.0)

    def l0(self, x: Float[Tensor, "N D"]) -> float:
        return _l0(self._state.sae.encode(x))


def _plain(start: Start, device: str) -> Own:
    return Own(start, device, "plain")


class _Gate(torch.autograd.Function):
    """H(z - θ), differentiated for θ by a rectangle."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        return None, (near * grads[0]).sum(0) / -ctx.bandwidth, None


class Simple:
    """What one would write in PyTorch: autograd, clipping, and the fused Adam."""

    took = "dense"

    def __init__(self, start: Start, device: str, precision: str = "highest") -> None:
        self._spec, self._precision = start.spec, precision
        self.p = {name: nn.Parameter(tensor.to(device, copy=True)) for name, tensor in start.tensors.items()}
        self.optimizer = torch.optim.Adam(self.p.values(), lr=LR, fused=True)

    def step(self, x: Float[Tensor, "N D"]) -> None:
        with matmul_precision(self._precision):
            self.loss(x).backward()
            nn.utils.clip_grad_norm_(self.p.values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def loss(self, x: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
        """The same objective as that of the others with L1 or L0."""
        p, spec = self.p, self._spec
        z = torch.addmm(p["b_enc"], x - p["b_dec"], p["W_enc"])
        if spec.architecture == "standard":
            acts = z.relu()
            sparsity = (acts * p["W_dec"].norm(dim=1)).sum(-1)
        else:
            gate = _Gate.apply(z, p["threshold"], spec.bandwidth)
            acts, sparsity = z * gate, gate.sum(-1)
        error = torch.addmm(p["b_dec"], acts, p["W_dec"]) - x
        return error.pow(2).sum(-1).mean() + spec.coefficient * sparsity.mean()

    @torch.no_grad()
    def l0(self, x: Float[Tensor, "N D"]) -> float:
        p = self.p
        z = torch.addmm(p["b_enc"], x - p["b_dec"], p["W_enc"])
        return _l0(z > p["threshold"] if "threshold" in p else z.relu())


def _faster(start: Start, device: str) -> Simple:
    return Simple(start, device, "high")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """ "high" sends float32 products to TF32 on a GPU, and on a CPU to oneDNN, which is faster than MKL on some.

    A CPU that has TF32 uses it then ("medium" would take bfloat16), so the products have to be looked at.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class SaeLens:
    """sae_lens' own trainer: its step, and what its loop does between two steps without a logger."""

    took = "dense"

    def __init__(self, start: Start, device: str) -> None:
        lens, config = import_module("sae_lens"), import_module("sae_lens.config")
        spec = start.spec
        shared = {"d_in": spec.d_in, "d_sae": spec.d_sae, "device": device, "apply_b_dec_to_input": True}
        if spec.architecture == "standard":
            cfg = lens.StandardTrainingSAEConfig(**shared, l1_coefficient=spec.coefficient)
            self._sae = lens.StandardTrainingSAE(cfg)
        else:
            thresholds = {"jumprelu_bandwidth": spec.bandwidth, "jumprelu_init_threshold": spec.init_threshold}
            cfg = lens.JumpReLUTrainingSAEConfig(**shared, **thresholds, l0_coefficient=spec.coefficient)
            self._sae = lens.JumpReLUTrainingSAE(cfg)
        _copy(dict(self._sae.named_parameters()), start.tensors)
        self._trainer = import_module("sae_lens.training.sae_trainer").SAETrainer(
            cfg=config.SAETrainerConfig(
                total_training_samples=start.case.batch_size * _STEPS,
                train_batch_size_samples=start.case.batch_size,
                lr=LR,
                lr_end=LR,
                lr_warm_up_steps=_WARM_UP,
                device=device,
                logger=config.LoggingConfig(log_to_wandb=False),
            ),
            sae=self._sae,
            data_provider=iter(()),
        )
        self.optimizer = self._trainer.optimizer

    def step(self, x: Float[Tensor, "N D"]) -> None:
        self._trainer.maybe_reset_sparsity()
        self._trainer.step(x)
        self._trainer.n_training_steps += 1

    @torch.no_grad()
    def l0(self, x: Float[Tensor, "N D"]) -> float:
        return _l0(self._sae.encode(x))


class DictionaryLearning:
    """The trainers of dictionary_learning: ReLU + L1 with a constrained decoder, or JumpReLU towards an L0."""

    took = "dense"

    def __init__(self, start: Start, device: str) -> None:
        spec, t = start.spec, start.tensors
        shared = {"steps": _STEPS, "activation_dim": spec.d_in, "dict_size": spec.d_sae, "layer": 0, "lm_name": ""}
        shared |= {"lr": LR, "device": device}
        rows = nn.functional.normalize(t["W_dec"], dim=1)
        if spec.architecture == "standard":
            trainer = import_module("dictionary_learning.trainers.standard").StandardTrainer
            self._trainer = trainer(**shared, l1_penalty=spec.coefficient)
            weights = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": rows.T}
            weights["bias"] = t["b_dec"]
        else:
            trainer = import_module("dictionary_learning.trainers.jumprelu").JumpReluTrainer
            self._trainer = trainer(**shared, bandwidth=spec.bandwidth, target_l0=float(start.case.active))
            weights = t | {"W_dec": rows}
        _copy(dict(self._trainer.ae.named_parameters()), weights)
        self.optimizer = self._trainer.optimizer
        self._step = 0

    def step(self, x: Float[Tensor, "N D"]) -> None:
        self._trainer.update(self._step, x)
        self._step += 1

    @torch.no_grad()
    def l0(self, x: Float[Tensor, "N D"]) -> float:
        return _l0(self._trainer.ae.encode(x))


class Sparsify:
    """The TopK coder of sparsify and the step of its trainer around it, with its "adam"; another objective."""

    took = "sparse"

    def __init__(self, start: Start, device: str) -> None:
        package = import_module("sparsify")
        t = start.tensors
        cfg = package.SparseCoderConfig(num_latents=start.spec.d_sae, k=start.case.active)
        self._coder = package.SparseCoder(start.spec.d_in, cfg, device=device, dtype=torch.float32)
        weights = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
        _copy(dict(self._coder.named_parameters()), weights)
        self.optimizer = torch.optim.Adam(self._coder.parameters(), lr=LR)
        schedule = import_module("transformers").get_linear_schedule_with_warmup
        self._schedule = schedule(self.optimizer, _WARM_UP, _STEPS)
        self._since_fired = torch.zeros(start.spec.d_sae, dtype=torch.long, device=device)
        self._fired = torch.zeros(start.spec.d_sae, dtype=torch.bool, device=device)

    def step(self, x: Float[Tensor, "N D"]) -> None:
        self._coder.set_decoder_norm_to_unit_norm()
        out = self._coder(x)
        self._fired[out.latent_indices.flatten()] = True
        (out.fvu + out.multi_topk_fvu / 8).backward()
        self._coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._schedule.step()
        self._since_fired += len(x)
        self._since_fired[self._fired] = 0
        self._fired.zero_()

    @torch.no_grad()
    def l0(self, x: Float[Tensor, "N D"]) -> float:
        return _l0(self._coder(x).latent_acts)


@torch.no_grad()
def _copy(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    """The same names, or it is not the version that was read."""
    if parameters.keys() != weights.keys():
        raise ValueError(f"its parameters are {', '.join(parameters)}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def _l0(acts: Tensor) -> float:
    return (acts != 0).sum(-1).double().mean().item()
