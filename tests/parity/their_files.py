"""SAE directories as the installed sae_lens writes them, 5.10.7 or 6; run as a script it refreshes tests/golden."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import sae_lens
import torch
from safetensors.torch import save_file

from parity_inputs import D_IN, D_SAE, batch

GENERATION = int(sae_lens.__version__.split(".")[0])
GOLDEN = Path(__file__).parents[1] / "golden"


@torch.no_grad()
def _randomise(sae: torch.nn.Module) -> torch.nn.Module:
    """Weights that no default would give by chance."""
    generator = torch.Generator().manual_seed(3)
    for name, p in sae.named_parameters():
        noise = torch.rand(p.shape, generator=generator, dtype=p.dtype)
        if name == "threshold" or name.endswith("scaling_factor"):
            p.copy_(0.05 + noise)
        elif name == "log_threshold":
            p.copy_((0.05 + noise).log())
        else:
            p.add_(0.3 * (noise - 0.5))
    return sae


def _write_5(root: Path) -> Iterator[tuple[str, torch.nn.Module]]:
    from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE, TrainingSAEConfig

    for kind, architecture, finetuning, runner in (
        ("standard", "standard", None, False),
        ("standard-runner", "standard", None, True),
        ("jumprelu-runner", "jumprelu", None, True),
        ("standard-finetuned", "standard", "scale", False),
    ):
        cfg = LanguageModelSAERunnerConfig(
            architecture=architecture,
            d_in=D_IN,
            d_sae=D_SAE,
            model_name="tiny",
            hook_name="blocks.3.hook_resid_post",
            hook_layer=3,
            dataset_path="corpus",
            finetuning_method=finetuning,
            l1_coefficient=0.7,
            apply_b_dec_to_input=kind != "standard-runner",
            log_to_wandb=False,
            wandb_id="none",
            checkpoint_path="checkpoints",
            verbose=False,
        )
        sae = _randomise(TrainingSAE(TrainingSAEConfig.from_dict(cfg.get_training_sae_cfg_dict())))
        path = root / kind
        if runner:  # what the checkpoints of a training hold: the weights, and the configuration of the whole run
            sae.save_model(path, torch.linspace(-10, 0, D_SAE))
            (path / "cfg.json").write_text(json.dumps(cfg.to_dict()))
        else:
            sae.save_model(path)
        yield kind, sae


def _write_6(root: Path) -> Iterator[tuple[str, torch.nn.Module]]:
    from sae_lens import (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata

    def metadata() -> SAEMetadata:
        return SAEMetadata(
            model_name="tiny", hook_name="blocks.3.hook_resid_post", dataset_path="corpus", seqpos_slice=(None,)
        )

    shared = {"d_in": D_IN, "d_sae": D_SAE}
    for training in (False, True):
        for sae in (
            StandardTrainingSAE(
                StandardTrainingSAEConfig(
                    **shared, l1_coefficient=0.7, apply_b_dec_to_input=training, metadata=metadata()
                )
            ),
            JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shared, l0_coefficient=0.7, metadata=metadata())),
        ):
            kind = f"{sae.cfg.architecture()}-{'training' if training else 'inference'}"
            (_randomise(sae).save_model if training else _randomise(sae).save_inference_model)(root / kind)
            yield kind, sae


def write(root: Path) -> Iterator[tuple[str, torch.nn.Module]]:
    """Write every kind of directory that this generation knows; gives its name and the SAE it was written from."""
    yield from (_write_5 if GENERATION == 5 else _write_6)(root)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = GOLDEN / f"sae_lens_{sae_lens.__version__}_files"
    shutil.rmtree(folder, ignore_errors=True)
    outputs = {}
    for kind, sae in write(folder):
        with torch.no_grad():
            outputs[kind] = sae(batch(5, torch.float32))
    save_file(outputs, folder / "outputs.safetensors")
    print(f"{folder}: {', '.join(outputs)}")
