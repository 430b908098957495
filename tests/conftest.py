"""Settings for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import graphopt
from graphopt.options import Options

torch.set_num_threads(1)  # several test processes share the cores: spinning OpenMP threads would slow all of them down


@pytest.fixture(autouse=True, scope="session")
def no_graphs_of_earlier_runs() -> Iterator[None]:
    """Tests trace and prepare each graph anew, whatever was kept on this machine, unless they name a folder."""
    folder = Options.graphs_dir.fget
    assert folder is not None
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Options, "graphs_dir", property(lambda o: None if o.cache_dir is None else folder(o)))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_tuning_database_of_the_user() -> Iterator[None]:
    """Tests compile with default schedules, whatever was tuned on this machine, unless they name a database or a folder."""
    path = Options.tuning_path.fget
    assert path is not None
    named = property(lambda o: None if o.tuning_db == "auto" and o.cache_dir is None else path(o))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Options, "tuning_path", named)
        yield


@pytest.fixture
def fresh() -> Iterator[None]:
    """Dynamo and the reports know nothing of earlier tests, and no gradients are recorded."""
    torch._dynamo.reset()
    graphopt.clear_reports()
    with torch.no_grad():
        yield
