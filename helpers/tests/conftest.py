"""All tests run offline and keep what they make in a temporary folder.

The number of torch's threads stays as it is, but where a test file asks for one.
"""

import os
from pathlib import Path

# Set before torch and transformers are imported; the kernels and processes that tests
# start inherit them. Nothing listens on port 9, so a download that these switches do
# not stop fails at once. Kernels talk over loopback sockets, which no proxy touches.
NOWHERE = "http://127.0.0.1:9"
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    PIP_NO_INDEX="1",
    http_proxy=NOWHERE,
    https_proxy=NOWHERE,
    HTTP_PROXY=NOWHERE,
    HTTPS_PROXY=NOWHERE,
    ALL_PROXY=NOWHERE,
    no_proxy="localhost,127.0.0.1",
    NO_PROXY="localhost,127.0.0.1",
)

import helpers  # noqa: F401, I001, E402  (before torch: it sets torch's threads)

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import DeepseekV3ForCausalLM  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def lab_home(tmp_path_factory) -> Path:
    """V3LAB_HOME for the whole session.

    Checkpoints, corpus and results of all tests go there; the corpus is tokenized once.
    """
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V3LAB_HOME", str(folder))
        # no start-up scripts of the person who runs the tests
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        # the kernel of this environment, not another one called python3
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
        yield folder


@pytest.fixture(scope="module")
def one_thread():
    """Models this small run many times as fast on one thread on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def same_random_numbers():
    """The global generator starts from 0."""
    torch.manual_seed(0)


@pytest.fixture
def ignore_mtp_layers(monkeypatch):
    """Let transformers pass over the MTP layers of a small model.

    Its own list names layer 61 only.
    """

    def ignore(config):
        layers = [rf"model\.layers\.{config.num_hidden_layers}.*"]
        monkeypatch.setattr(
            DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", layers
        )

    return ignore
