"""How many processes make a video, as torchrun says in the environment, and whether they fit what is asked of them.

This version runs on one: what the official code would refuse is refused here, and then several altogether. Standard library
only.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from wan_fast.config import EngineConfig, WanFastError
from wan_fast.tasks import TaskSpec

PATIENCE = 2.0  # seconds


@dataclass(frozen=True, slots=True)
class World:
    """The processes that torchrun started: how many, and which one this is, of all and on its machine."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> World:
        """What RANK, WORLD_SIZE and LOCAL_RANK say; without them one process.

        Raises:
            WanFastError: one of them is no such number.
        """
        world = cls(*(_number(environment, *name) for name in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))))
        if world.size < 1:
            raise WanFastError(f"the environment's WORLD_SIZE must be 1 or more, got {world.size}; {_HOW}")
        for name, rank in (("RANK", world.rank), ("LOCAL_RANK", world.local_rank)):
            if rank >= world.size:
                raise WanFastError(f"the environment's {name} must be below its WORLD_SIZE of {world.size}, got {rank}; {_HOW}")
        return world


_HOW = "start with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK"


def _number(environment: Mapping[str, str], name: str, default: str) -> int:
    text = environment.get(name, default)
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise WanFastError(f"the environment's {name} must be a whole number, got {text[:40]!r}; {_HOW}")
    return int(text)


def speaks() -> bool:
    """Whether it falls to this process to say what is wrong: to the first of several, and to one that cannot tell."""
    try:
        return World.of(os.environ).rank == 0
    except WanFastError:
        return True


def let_the_first_speak() -> None:
    """Wait a while: torchrun ends all processes when one has ended, and the first must not be ended before it has spoken."""
    time.sleep(PATIENCE)


def asked(config: EngineConfig) -> str:
    """The flags for several processes that are given, as on a command line."""
    sizes = {"--ulysses_size": config.ulysses_size, "--ring_size": config.ring_size}
    words = [f"{flag} {size}" for flag, size in sizes.items() if size > 1]
    words += [flag for flag, given in (("--t5_fsdp", config.t5_fsdp), ("--dit_fsdp", config.dit_fsdp)) if given]
    return " ".join(words)


def check(config: EngineConfig, world: World | None = None) -> None:
    """Hold what is asked of several processes against those that there are; absent: the environment's.

    Raises:
        WanFastError: they do not fit; or they do, and there are several.
    """
    world = world or World.of(os.environ)
    ulysses, ring = config.ulysses_size, config.ring_size
    if world.size == 1:
        if words := asked(config):
            number = ulysses * ring if ulysses * ring > 1 else "NUMBER_OF_GPUS"
            raise WanFastError(
                f"{words}: for several processes, and there is 1; start them with torchrun --nproc_per_node={number} "
                "-m wan_fast run ..., or leave that out"
            )
        return
    if ulysses * ring != world.size:
        raise WanFastError(
            f"--ulysses_size {ulysses} times --ring_size {ring} must be the number of processes, and there are {world.size}; "
            f"take {_ways(config.spec, world.size)}"
        )
    if config.spec.num_heads % ulysses:
        raise WanFastError(
            f"--ulysses_size must divide the {config.spec.num_heads} heads of {config.task}, got {ulysses}; take "
            f"{_ways(config.spec, world.size)}"
        )
    raise WanFastError(
        f"this version runs on one process, and there are {world.size}; several GPUs come with a later one: start wan-fast run "
        "without torchrun" + (f" and without {words}" if (words := asked(config)) else "")
    )


def _ways(spec: TaskSpec, size: int) -> str:
    """Flags with which so many processes can share a model."""
    ways = [f"--ulysses_size {size}"] * (spec.num_heads % size == 0) + [f"--ring_size {size}"] * spec.has_ring
    able = (str(count) for count in range(2, spec.num_heads + 1) if spec.num_heads % count == 0)
    return " or ".join(ways) or f"as many processes as one of {' '.join(able)}"
