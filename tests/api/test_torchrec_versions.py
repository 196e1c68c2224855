"""`import gpu_embed.torchrec` without TorchRec, or beside one that it does not know."""

import importlib
import sys
from importlib import metadata

import pytest


@pytest.fixture
def found(monkeypatch):
    """Sets TorchRec's version; None: it is not installed."""

    def set_version(version):
        def version_of(name):
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(metadata, "version", version_of)
        monkeypatch.delitem(sys.modules, "gpu_embed.torchrec", raising=False)

    return set_version


def test_without_torchrec_it_says_how_to_install_it(found):
    found(None)
    with pytest.raises(
        ImportError, match="needs TorchRec: make torchrec in a clone, or pip"
    ) as raised:
        importlib.import_module("gpu_embed.torchrec")
    assert raised.value.name == "torchrec"


@pytest.mark.parametrize("version", ["1.8.0", "1.9.20", "2.0.0+cu126"])
def test_an_unknown_torchrec_is_refused(found, version):
    found(version)
    plain = version.partition("+")[0]
    with pytest.raises(ImportError, match=f"knows TorchRec 1.9.2, found {plain}: make torchrec"):
        importlib.import_module("gpu_embed.torchrec")
