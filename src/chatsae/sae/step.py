"""One training step of one SAE, and all the state it changes."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chatsae.config import Precision
from chatsae.errors import UserError
from chatsae.sae.base import SAE, Losses
from chatsae.sae.choose import Chooser, StepKind, Switch, make_switch

SAMPLING_WINDOW = 2000
"""Steps over which firing frequencies are counted (paper: feature sampling window)."""


@dataclass
class StepState:
    """An SAE in training: its weights, its optimizer and what has been counted."""

    sae: SAE
    optimizer: torch.optim.Adam
    steps_since_fired: Int[Tensor, " F"]
    firing_counts: Float[Tensor, " F"]
    """Tokens of the current window on which each feature fired; float32 counts exactly up to 2²⁴ tokens."""
    window_tokens: int = 0
    step: int = 0
    switch: Chooser | None = None
    """Chooses between the plain and the fast step; without one, every step is plain."""

    def firing_frequency(self) -> Float[Tensor, " F"]:
        """Share of the tokens of the current window on which each feature fired."""
        return self.firing_counts / max(self.window_tokens, 1)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and ints by name; most tensors are the live ones, so write or copy them before the next step."""
        moments = self.optimizer.state_dict()["state"]
        names = [name for name, _ in self.sae.named_parameters()]
        return {
            **{f"sae.{name}": p.detach().contiguous() for name, p in self.sae.named_parameters()},
            **{f"adam.{names[i]}.{key}": v.contiguous() for i, state in moments.items() for key, v in state.items()},
            "steps_since_fired": self.steps_since_fired,
            "firing_counts": self.firing_counts,
            "window_tokens": self.window_tokens,
            "step": self.step,
            **({"dense": self.switch.saved()} if self.switch is not None else {}),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, bit for bit.

        Raises:
            UserError: a tensor is missing, unknown, or of another shape; nothing has been changed then.
        """
        params = dict(self.sae.named_parameters())
        _check_fits(self.sae.spec.name, state, {name: p.shape for name, p in params.items()})
        for name, p in params.items():
            p.copy_(state[f"sae.{name}"])
        adam = self.optimizer.state_dict()
        adam["state"] = {
            i: {
                "step": state[f"adam.{name}.step"].clone(),
                # in the strides of the weight: torch's fused Adam goes through memory as it lies
                "exp_avg": torch.empty_like(p).copy_(state[f"adam.{name}.exp_avg"]),
                "exp_avg_sq": torch.empty_like(p).copy_(state[f"adam.{name}.exp_avg_sq"]),
            }
            for i, (name, p) in enumerate(params.items())
            if state["step"] > 0
        }
        self.optimizer.load_state_dict(adam)
        self.steps_since_fired.copy_(state["steps_since_fired"])
        self.firing_counts.copy_(state["firing_counts"])
        self.window_tokens, self.step = int(state["window_tokens"]), int(state["step"])
        if self.switch is not None:
            self.switch.load(int(state.get("dense", True)))


def make_state(
    sae: SAE,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    fused: bool = True,
    step: StepKind = "auto",
    encoder_precision: Precision = "float32",
) -> StepState:
    """A state at step 0.

    Args:
        sae: trained in place.
        betas: of Adam.
        fused: changes the speed of Adam (6 to 10 times on a CPU) and its rounding; without it every step is plain.
        step: plain, fast, or whichever is the faster one; changes the speed and the rounding.
        encoder_precision: of the encoder's product; only a GPU has others than float32.

    Raises:
        UserError: the fast step or a precision is asked for and cannot be had here.
    """
    optimizer = torch.optim.Adam(sae.parameters(), lr=sae.spec.lr, betas=betas, fused=fused)
    return StepState(
        sae=sae,
        optimizer=optimizer,
        steps_since_fired=torch.zeros_like(sae.b_enc, dtype=torch.int64),
        firing_counts=torch.zeros_like(sae.b_enc, dtype=torch.float32),
        switch=make_switch(sae, optimizer, step, encoder_precision) if fused else None,
    )


def train_step(
    state: StepState, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float
) -> Losses:
    """One step of Adam on one batch of activations; returns the loss before the step, on its device.

    Raises:
        UserError: the loss is not finite, and the CPU's fast step runs; no weight has been changed then. Other steps
            return such a loss: on a GPU, looking at it would make everything wait.
    """
    numbers = {"lr": lr, "sparsity_scale": sparsity_scale, "clip_grad_norm": clip_grad_norm}
    switch = state.switch
    losses = _plain_step(state, x, **numbers) if switch is None else switch(state.step, x, **numbers)
    if switch is not None and switch.waits and not math.isfinite(loss := losses.total.item()):
        name = state.sae.spec.name
        raise UserError(f"the loss of {name} is {loss} at step {state.step + 1}; a lower sae.lrs may help")

    if state.step % SAMPLING_WINDOW == 0:
        state.firing_counts.zero_()
        state.window_tokens = 0
    state.window_tokens += len(x)
    state.step += 1
    if isinstance(switch, Switch):
        switch.count(losses.firings, state.firing_counts, state.steps_since_fired)
        return losses
    state.firing_counts += losses.firings
    state.steps_since_fired += 1
    state.steps_since_fired.masked_fill_(losses.fired, 0)
    return losses


def _plain_step(
    state: StepState, x: Float[Tensor, "N D"], *, lr: float, sparsity_scale: float, clip_grad_norm: float
) -> Losses:
    sae, optimizer = state.sae, state.optimizer
    sae.before_step_()

    losses = sae.loss(x, sparsity_scale)
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), clip_grad_norm)

    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Losses(*(value.detach() for value in losses))


def _check_fits(name: str, state: dict[str, Any], params: dict[str, torch.Size]) -> None:
    """Compare the names and shapes of a saved state with what the SAE needs."""
    width = params["b_enc"]
    expected = {f"sae.{k}": shape for k, shape in params.items()}
    expected |= {"steps_since_fired": width, "firing_counts": width}
    if state.get("step", 0) > 0:
        for k, shape in params.items():
            expected |= {f"adam.{k}.step": torch.Size(), f"adam.{k}.exp_avg": shape, f"adam.{k}.exp_avg_sq": shape}
    if missing := [k for k in (*expected, "step", "window_tokens") if k not in state]:
        raise UserError(f"the checkpoint of {name} has no {missing[0]!r}")
    if unknown := [k for k in state if k not in expected and k not in ("step", "window_tokens", "dense")]:
        raise UserError(
            f"the checkpoint of {name} holds {unknown[0]!r}, which this SAE has not; another form or version?"
        )
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise UserError(
                f"the checkpoint of {name} holds {key!r} of shape {list(state[key].shape)}, not {list(shape)}"
            )
