from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from chatsae.config import DataConfig, RunConfig, SAEConfig, TrainConfig, sae_specs
from chatsae.errors import UserError
from chatsae.recipe import differences, load_recipe, to_yaml

RECIPES = Path(__file__).parents[1] / "recipes"

# Table 1 of the paper: layers, expansion factors, SAEs over two architectures and three methods
TABLE_1 = {
    "meta-llama/Llama-3.1-8B-Instruct": ((4, 12, 18, 20, 25), (8,), 30),
    "meta-llama/Llama-3.2-3B-Instruct": ((4, 12, 20), (8, 16), 36),
    "meta-llama/Llama-3.2-1B-Instruct": ((4, 9, 14), (8, 16), 36),
    "Qwen/Qwen2.5-7B-Instruct": ((4, 12, 18, 20, 25), (8,), 30),
    "Qwen/Qwen2.5-3B-Instruct": ((4, 18, 32), (8, 16), 36),
    "Qwen/Qwen2.5-1.5B-Instruct": ((4, 14, 24), (8, 16), 36),
    "Qwen/Qwen2.5-0.5B-Instruct": ((4, 12, 20), (8, 16), 36),
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_paper_recipes_are_the_240_saes_of_table_1():
    configs = [load_recipe(path) for path in sorted((RECIPES / "paper").glob("*.yaml"))]
    assert {c.model.name for c in configs} == set(TABLE_1)
    total = 0
    for config in configs:
        layers, factors, count = TABLE_1[config.model.name]
        assert config.model.layers == layers
        assert config.sae.expansion_factors == factors
        specs = sae_specs(config.sae, layers=config.model.layers, d_in=64)
        assert len({s.name for s in specs}) == len(specs)
        assert 3 * len(specs) == count
        total += 3 * len(specs)
    assert total == 240


def test_the_paper_recipes_keep_the_constants_of_the_paper():
    for path in (RECIPES / "paper").glob("*.yaml"):
        config = load_recipe(path)
        train, sae = config.train, config.sae
        steps = train.tokens // train.batch_size
        assert (train.tokens, train.batch_size, steps, train.seed) == (40_960_000, 128, 320_000, 42)
        assert round(train.lr_warmup_share * steps) == 16_000
        assert round(train.lr_decay_share * steps) == 64_000
        assert round(train.sparsity_warmup_share * steps) == 10_000
        assert (sae.lrs, train.lr_end_share * sae.lrs[0]) == ((7e-5,), pytest.approx(7e-6))
        assert (sae.l1_coefficients, sae.l0_coefficients) == ((5.0,), (0.01,))
        assert (sae.bandwidth, sae.init_threshold, sae.form) == (0.001, 0.001, "paper")
        assert (train.adam_betas, train.dead_feature_window) == ((0.9, 0.999), 1000)
        assert (config.data.block_size, config.data.max_length, config.data.ngram) == (2048, 8192, 20)
        assert not sae.apply_b_dec_to_input
        assert sae.b_dec_init == "geometric_median"
        assert config.eval.dialogues == 5000


def test_names_follow_the_paper_and_stay_unique_when_coefficients_vary():
    names = [s.name for s in sae_specs(SAEConfig(l1_coefficients=(1.0, 5.0)), layers=(18,), d_in=8)]
    assert names == ["L18-8x-standard-l1_1", "L18-8x-standard-l1_5", "L18-8x-jumprelu"]


@given(
    st.builds(
        TrainConfig,
        tokens=st.integers(1, 10**9),
        clip_grad_norm=st.floats(1e-9, 1e9),
        adam_betas=st.tuples(*2 * [st.floats(0, 1, exclude_max=True)]),
    )
)
def test_yaml_round_trip(tmp_path_factory, train):
    config = replace(RunConfig(), train=train, data=DataConfig(method="bt-p", sources=("a.jsonl", "b")))
    path = tmp_path_factory.mktemp("recipe") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_recipe(path) == config
    assert differences(load_recipe(path), config) == []


def test_a_number_in_scientific_notation_is_a_number(tmp_path):
    assert load_recipe(write(tmp_path, "sae: {lrs: [7e-5]}")).sae.lrs == (7e-5,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {tokens: 3}", "unknown key trian; perhaps you meant train"),
        ("train: {token: 3}", "unknown key train.token; perhaps you meant train.tokens"),
        ("train: {tokens: many}", "train.tokens must be a whole number, not 'many'"),
        ("train: {tokens: true}", "train.tokens must be a whole number, not True"),
        ("train: {clip_grad_norm: big}", "train.clip_grad_norm must be a number, not 'big'"),
        ("train: 3", "train must be a mapping with the keys tokens, batch_size"),
        ("- 1", "the file must be a mapping with the keys model, data"),
        (
            "data: {method: fsat}",
            "data.method must be one of fast, bt-f, bt-f-isolated, bt-p, not 'fsat'; perhaps you meant fast",
        ),
        ("train: {adam_betas: [0.9]}", "train.adam_betas must hold 2 values, not 1"),
        ("model: {layers: [1, two]}", r"model.layers\[1\] must be a whole number, not 'two'"),
        ("model: {name: [}", "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_names_file_field_and_expectation(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as raised:
        load_recipe(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ("standard",), "bandwidth": 0.1}, "sae.bandwidth is set, but only jumprelu"),
        ({"architectures": ("jumprelu",), "l1_coefficients": (1.0,)}, "sae.l1_coefficients is set, but only standard"),
        ({"architectures": ()}, "sae.architectures is empty"),
        ({"lrs": (1e-3, 1e-3)}, "sae.lrs holds a value twice"),
        ({"expansion_factors": (8, 0)}, r"sae.expansion_factors\[1\] must be at least 1, not 0"),
        ({"bandwidth": -1.0}, "sae.bandwidth must be above 0, not -1.0"),
        ({"l1_coefficients": (-1.0,)}, "sae.l1_coefficients must be at least 0, not -1.0"),
    ],
)
def test_a_grid_that_cannot_be_or_would_ignore_a_field_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        sae_specs(SAEConfig(**values), layers=(0,), d_in=8)


def test_lists_and_one_value_become_what_a_field_holds():
    config = SAEConfig(lrs=[1e-3, 1], expansion_factors=4)
    assert config == SAEConfig(lrs=(1e-3, 1.0), expansion_factors=(4,))
    assert isinstance(config.lrs[1], float)


def test_every_recipe_in_the_repository_loads():
    for path in RECIPES.rglob("*.yaml"):
        config = load_recipe(path)
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["name"] == config.model.name
        sae_specs(config.sae, layers=config.model.layers, d_in=64)
