"""The GPU step without a GPU: in Triton's interpreter, compiled for a GPU that is not there, and its choices."""

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the GPU step needs triton: pip install 'chatsae[gpu]'")

import triton

import chatsae
from chatsae.config import TrainConfig
from chatsae.errors import UserError
from chatsae.sae import Losses, init_sae, make_state, step_triton
from chatsae.sae.choose_gpu import GpuSwitch
from chatsae.sae.step_triton import CROSSOVER, GpuStep, Tiles
from chatsae.training.loop import make_states
from sae_samples import spec

HERE = Path(__file__).parent


def test_the_interpreted_kernels_are_the_plain_step():
    """In a process of its own: triton has to be told before it is imported, and other tests may want the compiler."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@pytest.mark.parametrize(
    ("architecture", "form", "precision", "dtype", "d_in", "tiles"),
    [
        ("standard", "v6", "float32", torch.float64, 33, Tiles(elements=64, strip=32, n=16, f=16)),
        ("jumprelu", "paper", "bf16", torch.float32, 3584, Tiles()),
    ],
)
def test_all_kernels_compile_for_a_gpu(architecture, form, precision, dtype, d_in, tiles, monkeypatch, tmp_path):
    """The interpreter takes what the compiler refuses; the compiler needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    compiled = {}

    def compile_only(self, *args, grid, warmup, num_warps=4, **constants):
        given = dict(zip(self.arg_names, args, strict=False)) | constants
        signature, fixed = {}, {}
        for parameter in self.params:
            value = given[parameter.name]
            signature[parameter.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if parameter.is_constexpr:
                signature[parameter.name], fixed[(parameter.num,)] = "constexpr", value
        key = (self.__name__, num_warps, *signature.values(), *fixed.values())
        if key not in compiled:
            source = ASTSource(self, signature, fixed, None)
            target = GPUTarget("cuda", 90, 32)
            compiled[key] = triton.compile(source, target=target, options={"num_warps": num_warps})

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    sae = init_sae(spec(d_in, architecture=architecture, form=form, factor=1), dtype=dtype)
    gpu = GpuStep(sae, make_state(sae, step="plain").optimizer, precision=precision, tiles=tiles)
    for route in ("dense", "stored", "folded"):
        gpu(route, 1, torch.zeros(8, d_in, dtype=dtype), lr=1e-3, sparsity_scale=1.0, clip_grad_norm=1.0)
    kernels = [f for module in (step_triton.kernels, step_triton.update) for f in vars(module).values()]
    names = {f.__name__ for f in kernels if isinstance(f, JITFunction) and not f.__name__.startswith("_")}
    assert names == {key[0] for key in compiled}
    assert all(kernel.asm["cubin"] for kernel in compiled.values())


class Stub(GpuStep):
    """A step of which only the density is asked."""

    def __init__(self, densities: list[float]) -> None:  # without super: it has no weights
        self.densities, self.routes = densities, []
        self.norms = torch.ones(1000)
        self.sae = SimpleNamespace(spec=SimpleNamespace(d_sae=1000))
        self.resets = 0

    def __call__(self, route, k, x, **numbers):
        self.routes.append(route)
        zero = torch.zeros(())
        return Losses(zero, zero, zero, torch.tensor(1000 * self.densities[k - 1]), torch.zeros(1000))

    def reset(self):
        self.resets += 1


NUMBERS = {"lr": 1e-3, "sparsity_scale": 1.0, "clip_grad_norm": 1.0}
X = torch.zeros(4, 2)


def routes(densities, switch=None, first=0, n=4, **options):
    stub = Stub(densities)
    switch = switch or GpuSwitch(stub, **options)
    switch.gpu = stub
    for step in range(first, len(densities)):
        switch(step, torch.zeros(n, 2), **NUMBERS)
    return stub.routes, switch


def test_the_density_of_16_steps_ago_decides_with_a_margin():
    low, between, high = 0.7 * CROSSOVER, 0.9 * CROSSOVER, 1.1 * CROSSOVER
    taken, _ = routes([low] * 16 + [between] * 16 + [high] * 16 + [between] * 16 + [low] * 17)
    changes = [i for i in range(1, len(taken)) if taken[i] != taken[i - 1]]
    assert changes == [16, 48, 80]  # sparse, dense, sparse; "between" stays with what there is
    assert [taken[0], taken[16], taken[48], taken[80]] == ["dense", "folded", "dense", "folded"]
    assert set(routes([0.9] * 40, always=True)[0]) == {"folded"}
    assert set(routes([0.9] * 40, always=True, n=1000)[0]) == {"stored"}


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_run_that_goes_on_takes_the_same_routes(cut):
    low, high = 0.5 * CROSSOVER, 2 * CROSSOVER
    densities = [low] * 9 + [high] * 9 + [low] * 5 + [high] * 20 + [low] * 30
    whole, _ = routes(densities)
    before, switch = routes(densities[:cut])
    saved = switch.saved()
    assert 0 <= saved < 8
    resumed = GpuSwitch(Stub([]))
    resumed.load(saved)
    after, _ = routes(densities, resumed, first=cut)
    assert before + after == whole
    switch.gpu = Stub(densities)
    rest = switch.gpu.routes
    for step in range(cut, len(densities)):  # saving changes nothing for the run itself
        switch(step, X, **NUMBERS)
    assert before + rest == whole


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("step", ["auto", "plain", "fast"])
def test_a_precision_that_a_cpu_has_not_is_refused(precision, step):
    sae = init_sae(replace(spec(4), name="L1-x"))
    config = TrainConfig(encoder_precision=precision, step=step)
    with pytest.raises(UserError, match=rf"train\.encoder_precision {precision} .*L1-x is on cpu"):
        make_states({"L1-x": sae}, config)


def test_triton_is_imported_for_a_gpu_only():
    gpu = {"choose_gpu", "step_triton", "triton_kernels", "triton_update"}
    for path in Path(chatsae.__file__).parent.rglob("*.py"):
        at_import = ast.parse(path.read_text(encoding="utf-8")).body
        modules = {node.module or "" for node in at_import if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names}
        imported = {name for module in modules for name in module.split(".")}
        assert path.stem in gpu or not imported & (gpu | {"triton"}), path
