import atexit
import gc
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import nanowan.environment  # noqa: F401, E402  # isort: skip
import torch  # noqa: E402  # isort: skip


def pytest_collection_finish():
    """Leave what was imported until here out of garbage collections, which the code under test asks for."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries complain at the end that their objects are left


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_words():
    """Words that a test gives a meaning are unknown to the next one."""
    from nano.world import NEW_WORDS

    before = {**NEW_WORDS}
    yield
    NEW_WORDS.clear()
    NEW_WORDS.update(before)


@pytest.fixture(params=[1, 3])
def threads(request):
    """Once on one thread, once on three."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{"ti2v", "t2v", "i2v"}: folders of tiny random checkpoints in the official layout."""
    from benchmarks import tiny

    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: tiny.checkpoint(root / kind, kind) for kind in ("ti2v", "t2v", "i2v")}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder of two captioned clips and a photo, 64 px wide."""
    pytest.importorskip("av")  # a machine for `make gpu` may lack it
    from test_data import clip, photo

    folder = tmp_path_factory.mktemp("media")
    clip(folder / "a.mp4", 9, 64, 64, caption="a red square\na square that is red")
    clip(folder / "b.mp4", 13, 64, 64, caption="a dog runs")
    photo(folder / "c.png", 64, 64)
    return folder


@pytest.fixture
def report(request):
    """report(name, value, limit): list the error as a share of its tolerance after all tests, and hold it to that
    tolerance.
    """

    def check(name, value, limit):
        request.node.user_properties.append(
            ("error", f"{request.node.name}: {name} {value:.1e} = {value / limit:.0%} of {limit:.0e}")
        )
        assert value <= limit, f"{name}: {value:.3e} > {limit:.0e}"

    return check


def pytest_terminal_summary(terminalreporter):
    reports = [
        r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, []) if r.when == "call"
    ]
    for line in (text for r in reports for key, text in r.user_properties if key == "error"):
        terminalreporter.write_line(line)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: the same as a faster test, longer; make test-slow")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="only the tests marked slow")


# files that take longest, which begin first, so that no worker is left alone with one at the end
LONG_FILES = (
    "test_train test_parallel test_train_lora test_train_te test_memory_estimate test_kernels test_sample".split()
)


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        return bool(item.get_closest_marker("slow")) == config.getoption("--slow") and (
            torch.cuda.is_available() or not item.get_closest_marker("gpu")
        )

    config.hook.pytest_deselected(items=[i for i in items if not wanted(i)])
    rank = {name: i for i, name in enumerate(LONG_FILES)}
    items[:] = sorted(filter(wanted, items), key=lambda item: rank.get(item.path.stem, len(rank)))
