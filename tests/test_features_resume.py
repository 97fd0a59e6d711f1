"""A kill while the stores of a pass are written: nothing is missing afterwards, and nothing is left over."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from chatsae.cli import main
from chatsae.features import build as build_module
from chatsae.features import session
from chatsae.features.session import RunFeatures
from chatsae.features.store import FeatureStore
from feature_samples import planted_run

pytest_plugins = ["feature_fixtures"]

NAME = "L1-1x-standard"


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Path:
    return planted_run(tmp_path / "of", model)


class Killed(BaseException):
    pass


def test_a_kill_between_the_stores_of_a_pass_leaves_none_missing(run, monkeypatch):
    save, saved = FeatureStore.save, []

    def one_only(self, path):
        if saved:
            raise Killed
        save(self, path)
        saved.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "save", one_only)
        with pytest.raises(Killed):
            main(["features", str(run)])
    assert main(["features", str(run)]) == 0
    assert not (run / "features" / ".pass").exists()
    monkeypatch.setattr(session, "build", lambda *args, **options: pytest.fail("the pass is repeated"))
    features = RunFeatures(run)
    assert set(features.random_stores(features.stores())) == {NAME}


def test_a_kill_before_the_state_of_a_pass_is_removed_leaves_none(run, monkeypatch):
    monkeypatch.setattr(build_module, "collect", partial(build_module.collect, seconds=0.0))

    real = shutil.rmtree

    def die(path, *args, **options):
        if Path(path).name == ".pass":
            raise Killed
        real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(Killed):
            main(["features", str(run)])
    assert (run / "features" / ".pass" / "state.json").is_file()
    assert main(["features", str(run)]) == 0
    assert not (run / "features" / ".pass").exists()
