"""Results as data: one JSON file per machine and run, `results/<machine>/<date>.json`, written again after every row.

A file belongs to one state of the sources and one set of versions, named in it; rows of another are never added.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import wan_fast
from bench import ROOT
from wan_fast.device import describe

FORMAT = 1
_PACKAGES = ("torch", "triton", "diffusers", "transformers", "flash-attn", "xformers", "sageattention", "torchao")


class Results:
    """The file of a run: `facts` of machine and versions, `roofs`, `rows`, and sections of other findings."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "format": FORMAT,
            **facts,
            "roofs": {},
            "rows": {},
            "accuracy": {},
            "tiles": {},
            "notes": {},
        }
        if path.exists():
            self.data = read(path)

    def put(self, section: str, name: str, value: Any) -> None:
        """Add a finding, and write the file: whatever happens next, this one is kept."""
        self.data[section][name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".partial")
        scratch.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, self.path)


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is none, or of another format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no results file ({error})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is no results file of format {FORMAT}; measure again with python -m bench.campaign")
    return data


def open_results(folder: Path, device: torch.device) -> Results:
    """Today's file of this machine under `folder`; a further one where the sources or versions have changed since."""
    facts = describe_run(device)
    for count in range(1, 1000):
        name = f"{date.today()}{f'-{count}' if count > 1 else ''}.json"
        path = folder / slug(facts["machine"]["device"]) / name
        if not path.exists() or _identity(read(path)) == _identity(facts):
            return Results(path, facts)
    raise ValueError(f"{folder} holds a thousand files of today")


def newest(folder: Path, *, but: Path | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The newest file of every machine under `folder`, `but` left out: rows of one version, never mixed with another's."""
    for machine in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        if files := sorted((f for f in machine.glob("*.json") if but is None or not f.samefile(but)), key=_age):
            yield files[-1], read(files[-1])


def _age(path: Path) -> tuple[str, int]:
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)(?:-(\d+))?", path.stem)
    if match is None:
        raise ValueError(f"{path} is not named by its date, as 2026-01-31.json or 2026-01-31-2.json; rename it")
    return match[1], int(match[2] or 1)


def _identity(data: dict[str, Any]) -> tuple[Any, ...]:
    """What all rows of one file have in common."""
    return data["sources"], data["versions"], data["machine"].get("driver")


def line(error: BaseException) -> str:
    """An error as one short line fit for a results file."""
    return without_paths(" ".join(str(error).split()))[:300] or type(error).__name__


def without_paths(text: str) -> str:
    """A message without where things lie on this machine."""
    for place, name in ((str(ROOT), "."), (sysconfig.get_path("purelib"), "site-packages"), (str(Path.home()), "~")):
        text = text.replace(place, name)
    return re.sub(r"/(?:[\w.+-]+/){2,}", ".../", text)


def describe_run(device: torch.device) -> dict[str, Any]:
    """Machine, versions and sources: what a number must be read with."""
    host = describe("cpu")
    machine = {"device": host.model, "cpu": host.model, "memory_gib": round(host.memory / 2**30, 1)}
    machine["threads"] = torch.get_num_threads()
    versions = {"wan-fast": wan_fast.__version__, "python": platform.python_version()}
    versions |= {name: found for name in _PACKAGES if (found := _version(name))}
    versions["torch"] = torch.__version__
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        machine |= {"device": facts.name, "gpu_memory_gib": round(facts.total_memory / 2**30, 1)}
        machine |= {"multiprocessors": facts.multi_processor_count, "l2_mib": round(facts.L2_cache_size / 2**20)}
        machine["driver"], machine["power_limit"] = _nvidia_smi()
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"machine": machine, "versions": versions, "commit": commit(), "sources": sources()}


def commit() -> str:
    """The checked-out commit; "+" where files differ from it; "unknown" without git."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head[:12] + ("+" if changed.stdout.strip() else "")


def sources() -> str:
    """A digest of the code that is measured and of the code that measures."""
    digest = hashlib.sha256()
    measuring = [ROOT / "bench" / f"{name}.py" for name in ("registry", "timer", "operations", "networks", "official", "tune")]
    measuring += [ROOT / "tests" / f"{name}.py" for name in ("kernel_cases", "meter", "numerics")]
    # not through the link wan_fast/kernels: the folder itself is in the list
    measured = [path for folder in ("wan_fast", "kernels", "csrc") for path in (ROOT / folder).glob("*.*")]
    for path in sorted(measuring + measured):
        if path.suffix in (".py", ".cu", ".cpp", ".h"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def slug(name: str) -> str:
    """A device's name as a folder's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> tuple[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown", "unknown"
    driver, _, power = line.partition(",")
    return driver.strip(), power.strip()
