"""What `wan-fast calibrate` is told besides the run. No torch: what is wrong is said at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wan_fast.calibration import FILE
from wan_fast.config import WanFastError
from wan_fast.parsing import option
from wan_fast.video import check_folder

PROMPTS = (
    "a red ball bounces on a black background",
    "a cat walks through tall grass towards the camera",
    "waves break on a rocky shore at sunset",
    "a woman turns her head and smiles, the street behind her is blurred",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What `wan-fast calibrate` is told besides the run.

    Raises:
        WanFastError: a value is not allowed.
    """

    prompts: str | None = option(None, "file of prompts, one per line; default: four of ours", "--prompts", unit="FILE")
    search: bool = option(False, "also search the best mask for every number of computed steps", "--search")
    out: str | None = option(
        None, f"file to write; default: {FILE} beside the checkpoint, or the user's cache", "--out", unit="JSON"
    )
    curve: str | None = option(
        None, "picture of quality against passes; default: beside the file; off: none", "--curve", unit="PNG"
    )
    quiet: bool = option(False, "no progress bars", "--quiet")

    def __post_init__(self) -> None:
        self.texts()
        for flag, path, suffix in (("--out", self.out, ".json"), ("--curve", self.curve, ".png")):
            if path is None or (path, flag) == ("off", "--curve"):
                continue
            if Path(path).suffix != suffix:
                raise WanFastError(f"{flag} must end in {suffix}, got {path!r}")
            check_folder(Path(path), flag)

    def texts(self) -> list[str]:
        """The prompts.

        Raises:
            WanFastError: the file cannot be read, or holds none.
        """
        if self.prompts is None:
            return list(PROMPTS)
        try:
            lines = Path(self.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise WanFastError(f"--prompts {self.prompts!r} is not a file of text; give one with a prompt per line") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise WanFastError(f"--prompts {self.prompts!r} holds no prompt; write one per line")
        return found
