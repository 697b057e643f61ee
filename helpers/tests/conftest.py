"""All tests run offline and keep what they make in a temporary folder. The number of torch's threads stays as it is."""

import os
from pathlib import Path

import pytest

# Set before torch and transformers are imported; the kernels and subprocesses that tests start inherit them. Nothing listens on port 9,
# so a download that these switches do not stop fails at once. Kernels talk over loopback sockets, which no proxy touches.
NOWHERE = "http://127.0.0.1:9"
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", PIP_NO_INDEX="1",
                  http_proxy=NOWHERE, https_proxy=NOWHERE, HTTP_PROXY=NOWHERE, HTTPS_PROXY=NOWHERE, ALL_PROXY=NOWHERE,
                  no_proxy="localhost,127.0.0.1", NO_PROXY="localhost,127.0.0.1")


@pytest.fixture(scope="session", autouse=True)
def lab_home(tmp_path_factory) -> Path:
    """V3LAB_HOME for the whole session: checkpoints, corpus and results of all tests go here, and the corpus is tokenized once."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V3LAB_HOME", str(folder))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))  # no start-up scripts of the person who runs the tests
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this environment, not another one called python3
        yield folder
