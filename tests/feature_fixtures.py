"""Fixtures of tests about features: the planted model, its SAE's store; a test file names this as its plugin."""

from pathlib import Path

import pytest

import chatsae
from chatsae.batch import TokenBatch
from chatsae.features.records import Options
from chatsae.features.store import FeatureStore
from chatsae.lm.load import LanguageModel
from feature_samples import DEAD, FIRST, RARE, START, TOKEN, TWICE, plain_model, planted, rendered, said


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def lm(model: Path) -> LanguageModel:
    return LanguageModel(model, [1], head=True)


@pytest.fixture(scope="session")
def tokens(lm: LanguageModel) -> TokenBatch:
    return rendered(lm)


@pytest.fixture(scope="session")
def store(lm: LanguageModel) -> FeatureStore:
    sae = planted(lm)
    options = Options(features=(TOKEN, START, RARE, FIRST, DEAD, TWICE), kept=9, contexts=8, sampled=5, window=16)
    return chatsae.contexts({sae.spec.name: sae}, lm, said(30), options=options)[sae.spec.name]
