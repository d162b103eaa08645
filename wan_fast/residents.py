"""The models of an engine, and where they are: on the device they work on, or, where they take turns there, on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wan_fast import manifest
from wan_fast.config import EngineConfig
from wan_fast.encoders import AudioEncoder, ImageEncoder, TextEncoder
from wan_fast.loading import load_model
from wan_fast.setup import Setup
from wan_fast.vae import WanVAE, lay_out
from wan_fast.weights import Part

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Residents:
    """Models by name: "text", "vae", "image", "audio" and the experts.

    Args:
        config: of the engine, which says whether they take turns.
        setup: what is to be loaded, and in which dtype.
        device: where they work.
    """

    def __init__(self, config: EngineConfig, setup: Setup, device: torch.device) -> None:
        self.config, self.setup, self.device = config, setup, device
        self.models: dict[str, nn.Module] = {}
        self.home = torch.device("cpu") if config.offload_model else device
        self._active: str | None = None

    def load(self, report: Callable[[int], None]) -> None:
        """Load the VAE, and the encoders of pictures and sound where the task has them."""
        opened, spec = self.setup.checkpoint, self.config.spec
        assert opened is not None and opened.vae is not None
        vae, image, audio = opened.vae, opened.image_encoder, opened.audio_encoder
        self._add("vae", lambda: WanVAE(manifest.VaeDims.of_shapes(vae.shapes)), vae, self.setup.vae_dtype, report, lay_out)
        if image is not None and spec.image_tokens:
            dims = manifest.ClipDims.of_shapes(image.shapes)
            self._add("image", lambda: ImageEncoder(dims), image, self.setup.image_dtype, report)
        if audio is not None and spec.audio_encoder:
            heard = manifest.AudioDims.of_config(audio.config)
            self._add("audio", lambda: AudioEncoder(heard), audio, "fp32", report)

    def _add(
        self,
        name: str,
        make: Callable[[], nn.Module],
        part: Part,
        dtype: str,
        report: Callable[[int], None],
        lay_out: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.models[name] = load_model(make, part, self.home, lambda _: DTYPES[dtype], lay_out=lay_out, report=report)

    def load_text(self, report: Callable[[int], None] | None = None) -> None:
        """Load the text encoder, if it is not there yet."""
        if "text" in self.models:
            return
        assert self.setup.checkpoint is not None and self.setup.checkpoint.text_encoder is not None
        part = self.setup.checkpoint.text_encoder
        self.models["text"] = load_model(
            lambda: TextEncoder(part.shapes),
            part,
            torch.device("cpu") if self.config.t5_cpu else self.home,
            lambda name: DTYPES[self.setup.dtype],
            report=report,
        )

    @contextmanager
    def at_work(self, name: str) -> Iterator[Any]:
        """A model on the device it works on; where they take turns it goes back to the host afterwards."""
        moves = self.config.offload_model and not (name == "text" and self.config.t5_cpu)
        model = self.models[name]
        if moves:
            model.to(self.device)
        try:
            yield model
        finally:
            if moves:
                model.to("cpu")

    def expert(self, name: str | None) -> Any:
        """The DiT of that name, on the device; where they take turns the one before it leaves, and None leaves none."""
        if self.config.offload_model and name != self._active:
            if self._active is not None:
                self.models[self._active].to("cpu")
            if name is not None:
                self.models[name].to(self.device)
        self._active = name
        return self.models[name] if name is not None else None
