"""What --lora can say."""

import re
from math import inf

import pytest

from wan_fast.errors import WanFastError
from wan_fast.lora import Lora


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b.pth", "c,low=d.bin", "high=e.pt", "g,h.pt", "f:0.5.ckpt", "x.txt"):
        (tmp_path / name).touch()
    for name in ("folder", "folder:2"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.safetensors", [("a.safetensors", 1, None)]),
        (" a.safetensors:0.8 ", [("a.safetensors", 0.8, None)]),
        ("a.safetensors:-1", [("a.safetensors", -1, None)]),
        ("b.pth:0", [("b.pth", 0, None)]),
        ("folder:1e-1", [("folder", 0.1, None)]),
        ("folder:2", [("folder:2", 1, None)]),
        ("folder:2:3", [("folder:2", 3, None)]),
        ("f:0.5.ckpt", [("f:0.5.ckpt", 1, None)]),
        ("high=a.safetensors", [("a.safetensors", 1, "high_noise")]),
        ("low=a.safetensors:2", [("a.safetensors", 2, "low_noise")]),
        ("low=b.pth,high=a.safetensors:0.5", [("b.pth", 1, "low_noise"), ("a.safetensors", 0.5, "high_noise")]),
        ("c,low=d.bin:0.3", [("c,low=d.bin", 0.3, None)]),
        ("high=g,h.pt:3,low=g,h.pt", [("g,h.pt", 3, "high_noise"), ("g,h.pt", 1, "low_noise")]),
        ("high=e.pt", [("high=e.pt", 1, None)]),
        ("high=high=e.pt", [("high=e.pt", 1, "high_noise")]),
    ],
)
def test_flag(here, text, found):
    assert Lora.parse(text) == tuple(Lora(*lora) for lora in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; give the path"),
        ("  ", "empty; give the path"),
        ("no.safetensors", "--lora 'no.safetensors' does not exist"),
        ("no.safetensors:0.5", "'no.safetensors:0.5' does not exist; give PATH"),
        ("a.safetensors:", "after the colon comes the strength, a number such as 0.8, got ''"),
        ("a.safetensors:strong", "got 'strong'"),
        ("a.safetensors:nan", "must be a finite number, got nan"),
        ("a.safetensors:-inf", "must be a finite number, got -inf"),
        ("x.txt", "its name ends in '.txt'"),
        ("high=", "no path after high="),
        ("high=a.safetensors,low=:1", "no path after low="),
        ("high=no.pth", "--lora 'no.pth' does not exist"),
        ("high=a.safetensors,high=b.pth", "gives an expert twice"),
        ("mid=a.safetensors", "does not exist; give PATH"),
        ("a.safetensors,b.pth", "does not exist; give PATH"),
        ("x" * 5000, "does not exist"),
    ],
)
def test_flag_says_neither(here, text, message):
    with pytest.raises(WanFastError, match=re.escape(message)) as error:
        Lora.parse(text)
    assert "\n" not in str(error.value)


def test_fields_are_checked(here):
    with pytest.raises(WanFastError, match="finite number, got inf"):
        Lora("a.safetensors", inf)
    with pytest.raises(WanFastError, match="must be high_noise or low_noise, got 'high'"):
        Lora("a.safetensors", 1, "high")


def test_home_is_expanded(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert Lora.parse("high=~/a.safetensors:2") == (Lora(f"{here}/a.safetensors", 2, "high_noise"),)
