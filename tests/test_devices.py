"""Which GPUs are taken."""

import pytest
import torch

from nanowan.devices import pick_device
from nanowan.errors import BadInput


@pytest.fixture
def card(monkeypatch):
    """card(name, (major, minor), hip): the only GPU there is."""

    def be(name, capability, hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    return be


@pytest.mark.parametrize("flag, named", [(None, "cuda"), ("cuda:0", "cuda:0")])
def test_a_card_before_ampere_is_refused_by_name(card, flag, named):
    card("Tesla T4", (7, 5))
    with pytest.raises(BadInput, match=f"--device {named}: Tesla T4 has compute capability 7.5; 8.0 .* --device cpu"):
        pick_device(flag)
    assert pick_device("cpu") == "cpu"


def test_ampere_and_newer_are_taken(card, capsys):
    for capability in ((8, 0), (8, 6), (9, 0), (12, 0)):
        card("A card", capability)
        assert pick_device() == "cuda" and capsys.readouterr().err == ""


def test_rocm_is_said_to_be_untried(card, capsys):
    card("AMD Instinct MI300X", (9, 4), hip="6.4")
    assert pick_device() == "cuda"
    assert capsys.readouterr().err == "AMD Instinct MI300X: this has never been tried on ROCm\n"
