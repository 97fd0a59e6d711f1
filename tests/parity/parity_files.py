"""Files go both ways between chatsae and the installed sae_lens (5.10.7 or 6), with equal outputs."""

import pytest
import sae_lens
import torch
from their_files import GENERATION, write

from chatsae.sae import SAE, init_sae
from chatsae.sae.interop import read_sparsity
from parity_inputs import CASES, batch

X = batch(5, torch.float32)


@pytest.mark.parametrize("form", ["paper", "v6"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@torch.no_grad()
def test_sae_lens_reads_ours(case, form, tmp_path):
    sae = init_sae(case.spec(form), torch.Generator().manual_seed(1))
    for bias in (sae.b_enc, sae.b_dec):
        bias.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(2))
    sae.save(tmp_path, metadata={"model_name": "tiny", "context_size": 64}, sparsity=torch.rand(case.spec(form).d_sae))
    loaded = sae_lens.SAE.load_from_disk(str(tmp_path), device="cpu")
    assert loaded.encode(X).equal(sae.encode(X))
    assert loaded(X).equal(sae(X))
    facts = loaded.cfg if GENERATION == 5 else loaded.cfg.metadata
    assert (facts.hook_name, facts.model_name, facts.context_size) == ("blocks.0.hook_resid_post", "tiny", 64)
    assert loaded.cfg.apply_b_dec_to_input == case.apply_b_dec_to_input


@torch.no_grad()
def test_we_read_theirs(tmp_path):
    kinds = []
    for kind, theirs in write(tmp_path):
        ours = SAE.load(tmp_path / kind)
        assert ours.encode(X).equal(theirs.encode(X)), kind
        if kind == "standard-finetuned":  # the factor has been folded into W_dec: another order of rounding
            torch.testing.assert_close(ours(X), theirs(X), rtol=1e-6, atol=1e-6)
        else:
            assert ours(X).equal(theirs(X)), kind
        assert ours.spec.layer == 3
        assert ours.spec.coefficient == 0.7
        assert ours.metadata["model_name"] == "tiny"
        if kind.endswith("-runner"):
            sparsity = read_sparsity(tmp_path / kind)
            assert sparsity is not None
            expected = 10 ** torch.linspace(-10, 0, 40).double() - 1e-10
            torch.testing.assert_close(sparsity.double(), expected, rtol=1e-5, atol=1e-16)
        kinds.append(kind)
    assert len(kinds) == 4
