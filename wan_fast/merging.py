"""LoRAs added to a model's weights as these are loaded.

W' = W + s * up @ down with s = strength * alpha / rank, as in arXiv 2106.09685; LoHa and LoKr as in arXiv 2309.14859; DoRA as
in arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from wan_fast.errors import WanFastError
from wan_fast.headers import TensorInfo, state_dict_in
from wan_fast.lora_files import LoraFile, Update


class Merger:
    """Adds LoRAs to a model's tensors as these are loaded.

    Args:
        files: in the order in which they are added; those of strength 0 change nothing.
    """

    def __init__(self, files: Sequence[LoraFile]) -> None:
        self._updates: dict[str, list[tuple[float, Update]]] = {}
        for file in files:
            for name, updates in file.updates.items() if file.lora.strength else ():
                self._updates.setdefault(name, []).extend((file.lora.strength, update) for update in updates)
        self.targets = frozenset(self._updates)
        self._opened: dict[Path, Callable[[str], Tensor]] = {}

    def check(self) -> None:
        """Read every tensor once, one at a time.

        Raises:
            WanFastError: one holds NaN or infinity, or an alpha is negative.
        """
        infos = {
            (info.file, info.stored_name): (role, info)
            for updates in self._updates.values()
            for _, update in updates
            for role, info in update.tensors.items()
        }
        for role, info in infos.values():
            tensor = self._read(info)
            if not tensor.isfinite().all() or (role == "alpha" and tensor.item() < 0):
                what = "a positive number" if role == "alpha" else "a finite number everywhere"
                bad = tensor.item() if role == "alpha" else tensor[~tensor.isfinite()][0].item()
                raise WanFastError(
                    f"--lora {str(info.file)!r} has {bad:g} in {info.stored_name}, which must be {what}; download it again"
                )

    @torch.no_grad()
    def merged(self, name: str, weight: Tensor, device: torch.device | str | None = None) -> Tensor:
        """A tensor with all its updates.

        Args:
            name: its native name.
            weight: [...] of any floating dtype, as stored; not changed.
            device: where to compute; None: where the weight is.

        Returns:
            [...] fp32 on that device, computed in fp32; a tensor that is no target comes back as it is.
        """
        if name not in self._updates:
            return weight
        merged = weight.to(device or weight.device, torch.float32, copy=True, memory_format=torch.contiguous_format)
        for strength, update in self._updates[name]:
            self._apply(merged, strength, update)
        if not merged.isfinite().all():
            raise WanFastError(f"the LoRAs make {name} overflow; take smaller strengths, or other files")
        return merged

    def _apply(self, weight: Tensor, strength: float, update: Update) -> None:
        """Change a weight [out, ...] fp32 in place."""
        tensors = {role: self._read(info, weight.device) for role, info in update.tensors.items()}
        if update.rule == "set":
            weight.copy_(tensors["set"].reshape(weight.shape))
            return
        delta = _delta(update.rule, tensors).reshape(weight.shape)
        weight.add_(delta, alpha=strength * _scale(update, tensors))
        if (magnitude := tensors.get("dora_scale")) is not None:
            # the strength scales the factors, not the magnitudes, as in PEFT
            rows = _flat(weight)
            rows *= magnitude.reshape(-1, 1) / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    def _read(self, info: TensorInfo, device: torch.device | str = "cpu") -> Tensor:
        """A tensor in fp32; files stay open, and are mapped, not read whole."""
        if info.file not in self._opened:
            self._opened[info.file] = _opened(info.file)
        return self._opened[info.file](info.stored_name).to(device).float()


def _opened(file: Path) -> Callable[[str], Tensor]:
    if file.suffix == ".safetensors":
        return safe_open(file, framework="pt").get_tensor
    return state_dict_in(torch.load(file, map_location="cpu", mmap=True, weights_only=True)).__getitem__


def _scale(update: Update, tensors: dict[str, Tensor]) -> float:
    """alpha / rank, or 1 without alpha or without factors; an alpha of 0 is the rank."""
    if update.scale is not None:
        return update.scale
    alpha = tensors["alpha"].item() if "alpha" in tensors else 0
    return alpha / update.rank if alpha and update.rank else 1.0


def _delta(rule: str, tensors: dict[str, Tensor]) -> Tensor:
    """What is added to a weight at scale 1: [out, in], or the stored shape of a difference."""

    def product(left: str, right: str) -> Tensor:
        return _flat(tensors[left]) @ _flat(tensors[right])

    if rule == "diff":
        return tensors["diff"]
    if rule == "factors":
        return product("up", "down")
    if rule == "loha":
        return product("w1_a", "w1_b") * product("w2_a", "w2_b")
    one, two = (_flat(tensors[w]) if w in tensors else product(f"{w}_a", f"{w}_b") for w in ("w1", "w2"))
    return torch.kron(one, two)


def _flat(tensor: Tensor) -> Tensor:
    """[rows, ...] as [rows, columns]."""
    return tensor.reshape(tensor.shape[0], -1)
