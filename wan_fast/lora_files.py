"""LoRA files in the styles they are published in, matched against a model's tensors. Standard library only; reads no weight.

A key is a prefix, a module's path in native or Diffusers' spelling with dots or underscores, and a suffix that says what it is.
Underscored paths are unambiguous in Wan, so every path is looked up with underscores. LoHa and LoKr as in arXiv 2309.14859,
DoRA as in arXiv 2402.09353, rank-stabilised scales as in arXiv 2312.03732.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, prod, sqrt
from pathlib import Path
from typing import Any

from wan_fast.errors import WanFastError
from wan_fast.headers import TensorInfo, read_header
from wan_fast.lora import EXPERTS, SUFFIXES, Lora
from wan_fast.manifest import Shapes
from wan_fast.manifest.pose import POSE_TENSORS
from wan_fast.names import DIT_NAMES, native_name

_PREFIX = re.compile(
    r"^(?:(?:model|diffusion_model|base_model\.model|pipe\.dit|transformer|transformer_2|unet)\.)*(?:lora_unet__?|lycoris_)?"
)
_UP = (".lora_up.weight", ".lora_B.weight", ".lora_B", "_lora.up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
_DOWN = tuple(suffix.replace("up", "down").replace("_B", "_A") for suffix in _UP)
# suffix -> (what it belongs to in the module, rule, role)
_SUFFIX_ROLES = {
    **dict.fromkeys(_UP, ("weight", "factors", "up")),
    **dict.fromkeys(_DOWN, ("weight", "factors", "down")),
    **{f".hada_{role}": ("weight", "loha", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f".lokr_{role}": ("weight", "lokr", role) for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    **dict.fromkeys((".diff", ".w_norm"), ("weight", "diff", "diff")),
    **dict.fromkeys((".diff_b", ".b_norm", ".lora_B.bias"), ("bias", "diff", "diff")),
    ".diff_m": ("modulation", "diff", "diff"),
    ".set_weight": ("weight", "set", "set"),
    ".alpha": ("weight", "", "alpha"),
    **dict.fromkeys((".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"), ("weight", "", "dora_scale")),
}
# in the order in which they are applied to a tensor
_ROLES = {
    "set": [{"set"}],
    "diff": [{"diff"}],
    "factors": [{"up", "down"}],
    "loha": [{"w1_a", "w1_b", "w2_a", "w2_b"}],
    "lokr": [{*one, *two} for one in (["w1"], ["w1_a", "w1_b"]) for two in (["w2"], ["w2_a", "w2_b"])],
}
_UNSUPPORTED = re.compile(r"lora_mid|hada_t[12]|lokr_t2|reshape_weight|oft_(?:blocks|diag)")
_IMAGE_BRANCH = re.compile(r"(?:^|_)(?:img_emb|k_img|v_img|norm_k_img)_")
_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_UNDERSCORED = {pattern.replace(r"\.", "_"): name.replace(".", "_") for pattern, name in DIT_NAMES.items()}
_LOW_PART = "transformer_2"
_GUESSES = {
    r"lora_te|text_encoder|text_model|encoder\.block": "they belong to a text encoder, which takes no LoRA; remove them",
    r"(?:double|single|transformer|input|output|down|up|mid)_blocks?[._]": "it is a LoRA of another kind of model",
    r"inpaint_embedding|learn_in_embedding": "it is UniAnimate's for inpainting, which this version does not run; take "
    "UniAnimate-Wan2.1-14B-Lora-12000.ckpt",
    r"dwpose_embedding|randomref_embedding": "it is UniAnimate's; give it as --unianimate_ckpt, with --task unianimate-14B",
    r"vace|face_|audio|control_adapter|ref_conv|pose_": "it is a LoRA of another variant of Wan, with modules that this lacks",
    r"^(?!.*lora).*\.(?:weight|bias)$": "they are whole weights, as training code saves them beside a LoRA",
}


@dataclass(frozen=True)
class Update:
    """One change of one tensor.

    target: the tensor's native name. rule: "factors", "loha", "lokr", "diff" or "set". tensors: by role (up, down; w1, w1_a,
    w1_b, w2, w2_a, w2_b; diff; set; alpha, dora_scale), under their names in the file less the prefix. scale: by which
    strength is multiplied, where metadata tell it; None: alpha / rank, or 1 without alpha.
    """

    target: str
    rule: str
    tensors: Mapping[str, TensorInfo]
    scale: float | None = None

    @property
    def rank(self) -> int:
        """Of the factors that alpha refers to; 0 where there are none."""
        roles = {"loha": ("w1_b",), "lokr": ("w2_b", "w1_b")}.get(self.rule, ("down",))
        return next((self.tensors[role].shape[0] for role in roles if role in self.tensors), 0)


@dataclass(frozen=True)
class LoraFile:
    """What one file changes in one expert. absent: its keys for an image branch that the model has not, which are skipped."""

    lora: Lora
    path: Path
    updates: Mapping[str, tuple[Update, ...]]
    absent: int
    warnings: tuple[str, ...]

    def described(self) -> str:
        skipped = f", {self.absent} keys of an image branch skipped" if self.absent else ""
        count = f"{len(self.updates)} tensor{'s' if len(self.updates) > 1 else ''}"
        return f"{self.path.name} at strength {self.lora.strength:g}: changes {count}{skipped}"


def open_loras(loras: Sequence[Lora], experts: Mapping[str, Shapes]) -> dict[str, tuple[LoraFile, ...]]:
    """Find each LoRA's files, assign them to experts, and match every key in them.

    Args:
        loras: in the order in which they are added.
        experts: "model", or "high_noise" and "low_noise", to the shapes of its tensors by native name.

    Raises:
        WanFastError: a file is damaged, of another model or of another expert, or a key in it has no known meaning.
    """
    opened: dict[str, list[LoraFile]] = {expert: [] for expert in experts}
    one_expert = len(experts) == 1
    for lora in loras:
        for path, named in _files_of(lora, one_expert=one_expert):
            contents = _contents(path, lora.flag)
            assigned = _assigned(contents, lora.expert, named, one_expert=one_expert)
            told = []
            if one_expert and named:
                told.append(f"{path.name} is named for the {_words(named)} expert, and this model has only one")
            elif len(assigned) == 2 and len(contents.parts) == 1:
                told.append(f"{path.name} goes to both experts; choose with --lora high=PATH or --lora low=PATH")
            elif not one_expert and named and not lora.expert and not re.search("noise", path.name + lora.path, re.IGNORECASE):
                told.append(f"{path.name} goes to the {_words(named)} expert by its name alone; else say --lora high= or low=")
            for expert, part in assigned.items():
                opened[expert].append(_matched(contents, part, lora, experts[expert], told))
    return {expert: tuple(files) for expert, files in opened.items()}


def _words(expert: str | None) -> str:
    return str(expert).replace("_", "-")


def _named(name: str) -> str | None:
    """The one expert that a file's name speaks of."""
    said = [
        expert
        for word, expert in EXPERTS.items()
        if re.search(rf"{word}[_-]?noise|(?<![a-z]){word}(?![a-z])", name, re.IGNORECASE)
    ]
    return said[0] if len(said) == 1 else None


def _files_of(lora: Lora, *, one_expert: bool) -> list[tuple[Path, str | None]]:
    """The LoRA's files, each with the expert that its name speaks of."""
    path, flag = Path(lora.path), f"--lora {lora.path!r}"
    if one_expert and lora.expert:
        raise WanFastError(f"{flag} is for the {_words(lora.expert)} expert, but this model has only one; give the path alone")
    if not path.is_dir():
        return [(path, _named(path.stem))]
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    pair = [file for file in found if file.name in ("high_noise_model.safetensors", "low_noise_model.safetensors")] or found
    if len(pair) == 2 and {_named(file.stem) for file in pair} == {*EXPERTS.values()}:
        if one_expert:
            raise WanFastError(f"{flag} holds a file per expert, but this model has only one; give one of the files")
        return [(file, _named(file.stem)) for file in pair if lora.expert in (None, _named(file.stem))]
    adapter = [file for file in found if file.stem == "adapter_model"]
    safetensors = [file for file in found if file.suffix == ".safetensors"]
    found = next((some for some in (adapter, safetensors) if len(some) == 1), found)
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:4]) or f"none of {' '.join(SUFFIXES)}"
        raise WanFastError(f"{flag} must hold one LoRA file, or one per expert, and has {len(found)} ({names}); give the file")
    return [(found[0], _named(found[0].stem) or _named(path.resolve().name))]


@dataclass(frozen=True)
class _Contents:
    """A file's tensors by part and stored name, each under its name without prefix.

    parts: "" and, where Diffusers' files speak of the low-noise expert, _LOW_PART. where: names the file in messages.
    """

    where: str
    path: Path
    texts: Mapping[str, str]
    parts: Mapping[str, Mapping[str, TensorInfo]]
    is_peft: bool


def _contents(path: Path, flag: str) -> _Contents:
    where, header = f"{flag} {str(path)!r}", read_header(path)
    parts: dict[str, dict[str, TensorInfo]] = {}
    for key, (dtype, shape) in header.tensors.items():
        bare = re.sub(r"\.default(?=\.[^.]+$|$)", "", key).replace(".processor.", ".")
        prefix = str(_PREFIX.match(bare)[0])  # type: ignore[index]
        info = TensorInfo(bare[len(prefix) :], key, shape, dtype, path)
        parts.setdefault(_LOW_PART if f"{_LOW_PART}." in prefix else "", {})[key] = info
    keys = [(key, info.name) for part in parts.values() for key, info in part.items()]
    if not any(_role_of(name) or _UNSUPPORTED.search(key) for key, name in keys):
        some = ", ".join(key for key, _ in keys[:3]) or "no tensor"
        raise WanFastError(f"{where} holds no LoRA but {some}; a whole model is given as --ckpt_dir")
    return _Contents(where, path, header.texts, parts, any(key.startswith("base_model.model.") for key, _ in keys))


def _assigned(contents: _Contents, asked: str | None, named: str | None, *, one_expert: bool) -> dict[str, str]:
    """The experts that a file is for, each with its part of the file."""
    where, parts = contents.where, contents.parts
    if one_expert:
        if _LOW_PART in parts:
            raise WanFastError(f"{where} is for a model of two experts ({_LOW_PART}.*), but this model has only one")
        return {"model": ""}
    if len(parts) == 2:
        both = {"high_noise": "", "low_noise": _LOW_PART}
        return {asked: both[asked]} if asked else both
    part = next(iter(parts))
    held = "low_noise" if part == _LOW_PART else None
    if asked and not re.search("noise", contents.path.stem, re.IGNORECASE):
        named = None  # a word may mean another thing, in low-rank say
    chosen = asked or named or held
    for what, claim in (("its name says", named), (f"its keys ({part}.*) say", held)):
        if claim not in (None, chosen):
            raise WanFastError(
                f"{where} would go to the {_words(chosen)} expert, but {what} {_words(claim)}; take the other file"
            )
    return dict.fromkeys([chosen] if chosen else EXPERTS.values(), part)


def _role_of(name: str) -> tuple[str, str, str, str] | None:
    """(module's path, what of the module, rule, role) of a key without its prefix; the longest suffix counts."""
    suffix = max((suffix for suffix in _SUFFIX_ROLES if name.endswith(suffix)), key=len, default=None)
    return None if suffix is None else (name[: -len(suffix)], *_SUFFIX_ROLES[suffix])


def _underscored(path: str) -> str:
    """A tensor's native name, with underscores for dots, from any spelling of it."""
    path = re.sub(r"_to_out_(?!0_)", "_to_out_0_", path.replace(".", "_"))
    return str(native_name(path, _UNDERSCORED))


def _matched(contents: _Contents, part: str, lora: Lora, shapes: Shapes, told: Sequence[str]) -> LoraFile:
    """Every key of one part of a file held against one expert's tensors."""
    where, scaling = contents.where, _scaling(contents, part)
    by_spelling = {name.replace(".", "_"): name for name in shapes}
    found: dict[str, dict[tuple[str, str], TensorInfo]] = {}
    left, absent = [], 0
    for key, info in contents.parts[part].items():
        if info.name in shapes and POSE_TENSORS.match(info.name):
            continue  # the model's own, which are read with it
        if match := _UNSUPPORTED.search(key):
            raise WanFastError(f"{where} has {key}: {match[0]} is not supported; take another export of the LoRA")
        path, leaf, rule, role = _role_of(info.name) or (info.name, "", "", "")
        # `.diff` may follow a tensor that is no module's weight: the modulation, or positions of pictures
        spellings = [_underscored(f"{path}.{leaf}"), *([_underscored(path)] if rule == "diff" else [])]
        target = next((by_spelling[spelled] for spelled in spellings if spelled in by_spelling), None)
        if role and target is None and any(map(_IMAGE_BRANCH.search, spellings)):
            absent += 1
        elif not role or target is None:
            left.append(key)
        elif (rule, role) in found.setdefault(target, {}):
            other = found[target][rule, role].stored_name
            raise WanFastError(f"{where} changes {target} twice, by {other} and by {key}; remove one of them")
        else:
            found[target][rule, role] = info
    updates = {target: tuple(_updates(where, target, found, shapes[target], scaling)) for target in found}
    if left:
        raise _leftover(where, left, shapes)
    if not updates:
        raise WanFastError(f"{where} changes nothing in this model: all its {absent} keys are of an image branch")
    if absent:
        told = [*told, f"{contents.path.name}: {absent} keys of an image branch, which this model has not, are left out"]
    every = [update for some in updates.values() for update in some]
    if lora.strength not in (0, 1) and any(update.rule == "set" for update in every):
        raise WanFastError(f"{where} replaces weights (set_weight), which has no strength {lora.strength:g}; take 1")
    if contents.is_peft and any(u.rank and u.scale is None and "alpha" not in u.tensors for u in every):
        told = [*told, f"{contents.path.name} has no adapter_config.json beside it; its alpha is taken to be its rank"]
    return LoraFile(lora, contents.path, updates, absent, tuple(told))


def _leftover(where: str, left: Sequence[str], shapes: Shapes) -> WanFastError:
    """The error for keys without a tensor, with a guess at why."""

    def depth(names: Iterable[str]) -> int:
        return 1 + max((int(match[1]) for name in names if (match := re.search(r"blocks[._](\d+)[._]", name))), default=-1)

    guess = next((guess for pattern, guess in _GUESSES.items() if any(re.search(pattern, key) for key in left)), None)
    if guess is None and depth(left) > depth(shapes):
        guess = f"it is a LoRA of a model of {depth(left)} blocks or more, and this one has {depth(shapes)}"
    some = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
    return WanFastError(
        f"{where} has {len(left)} key{'s' * (len(left) > 1)} without a place in this model: {some}; "
        f"probably {guess or 'it is damaged, or of a style that is not known'}"
    )


def _updates(
    where: str,
    target: str,
    found: Mapping[str, Mapping[tuple[str, str], TensorInfo]],
    shape: tuple[int, ...],
    scaling: _Scaling,
) -> Iterator[Update]:
    """The updates of one tensor, whole and of fitting sizes."""
    by_rule: dict[str, dict[str, TensorInfo]] = {}
    for (rule, role), info in found[target].items():
        by_rule.setdefault(rule, {})[role] = info
    shared = by_rule.pop("", {})
    for rule in sorted(by_rule, key=list(_ROLES).index):
        tensors = by_rule[rule]
        first = next(iter(tensors.values()))
        if set(tensors) not in _ROLES[rule]:
            roles = " and ".join(sorted(tensors))
            raise WanFastError(
                f"{where} has only {roles} for {target} ({first.stored_name}), not what belongs to it; download it again"
            )
        if first.name.endswith(".lora_B.bias"):
            # the bias of the factor B is scaled with it
            weight = found.get(target.removesuffix("bias") + "weight", {})
            tensors |= {
                role: weight[rule, role] for rule, role in (("factors", "down"), ("", "alpha")) if (rule, role) in weight
            }
        elif rule not in ("diff", "set"):
            tensors |= shared
        update = Update(target, rule, tensors)
        _check(where, update, shape)
        yield update if "alpha" in tensors else replace(update, scale=scaling.of(where, first, update.rank))
    # alpha beside a difference means nothing
    unused = {role: info for role, info in shared.items() if role != "alpha" or not by_rule}
    if unused and not set(by_rule) - {"diff", "set"}:
        key = next(iter(unused.values())).stored_name
        raise WanFastError(f"{where} has {key} without the factors that it scales; download it again")


def _check(where: str, update: Update, shape: tuple[int, ...]) -> None:
    """Sizes and dtypes of an update against its tensor's shape."""
    tensors, target, wanted = update.tensors, update.target, _flat(shape)
    for role, info in tensors.items():
        if info.dtype not in _DTYPES and role != "alpha":
            raise WanFastError(f"{where} holds {info.stored_name} in {info.dtype}; take a file in {' '.join(_DTYPES)}")
        if role == "alpha" and prod(info.shape) != 1:
            raise WanFastError(f"{where} has {info.stored_name} of shape {list(info.shape)}, which must be one number")
        if role == "dora_scale" and not (info.shape[:1] == shape[:1] and prod(info.shape) == shape[0]):
            raise WanFastError(
                f"{where} has {info.stored_name} of shape {list(info.shape)}; "
                f"only a magnitude per output row, [{shape[0]}, 1], is supported"
            )
    roles = sorted(set(tensors) - {"alpha", "dora_scale"}, key=lambda role: (role == "down", role))
    said = " and ".join(f"{role} {list(tensors[role].shape)}" for role in roles)

    def product(left: str, right: str) -> tuple[int, int]:
        (rows, rank), (down_rank, columns) = _flat(tensors[left].shape), _flat(tensors[right].shape)
        if rank != down_rank or not rank:
            raise WanFastError(f"{where} has factors of different ranks for {target}: {said}; download it again")
        return rows, columns

    if update.rule == "factors":
        sizes = {product("up", "down")}
    elif update.rule == "loha":
        sizes = {product("w1_a", "w1_b"), product("w2_a", "w2_b")}
    elif update.rule == "lokr":
        one, two = (_flat(tensors[w].shape) if w in tensors else product(f"{w}_a", f"{w}_b") for w in ("w1", "w2"))
        sizes = {(one[0] * two[0], one[1] * two[1])}
    else:
        given = tensors[update.rule].shape
        # [6, D] for [1, 6, D]; [D, 64] for [D, 16, 1, 2, 2]
        sizes = {wanted if [n for n in given if n > 1] == [n for n in shape if n > 1] else _flat(given)}
    if sizes != {wanted}:
        raise WanFastError(
            f"{where} is a LoRA of another model: for {target} it has {said} against {list(shape)} in this model; "
            "take the LoRA that was made for this one"
        )


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a shape flattened from dim 1."""
    return (shape[0] if shape else 0), prod(shape[1:])


@dataclass(frozen=True)
class _Scaling:
    """r, lora_alpha, rank_pattern, alpha_pattern and use_rslora, as PEFT writes them, and where."""

    source: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    def of(self, where: str, info: TensorInfo, rank: int) -> float | None:
        """alpha / rank of a factor's module, or alpha / sqrt(rank); None where nothing is known, or nothing is scaled."""
        if not self.config or not rank:
            return None
        declared = self._of_module("rank_pattern", info, self.config.get("r"))
        if declared not in (None, rank):
            raise WanFastError(
                f"{where}: {info.stored_name} has rank {rank}, but {self.source} says {declared:g}; take the one of this file"
            )
        alpha = self._of_module("alpha_pattern", info, self.config.get("lora_alpha", self.config.get("alpha")))
        return (alpha or rank) / (sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of_module(self, pattern: str, info: TensorInfo, default: Any) -> float | None:
        """The value of the first pattern that fits a module's path, as PEFT matches them; else the default."""
        path = (_role_of(info.name) or (info.name,))[0]
        some = self.config.get(pattern) or {}
        value = next((some[name] for name in some if re.match(rf"(?:.*\.)?(?:{name})$", path)), default)
        return None if value is None else float(value)


def _scaling(contents: _Contents, part: str) -> _Scaling:
    """What the file's metadata say, else adapter_config.json beside it."""
    beside = contents.path.parent / "adapter_config.json"
    source, text = "lora_adapter_metadata", contents.texts.get("lora_adapter_metadata")
    if text is None and beside.exists():
        # in a folder of many LoRAs it belongs to PEFT's own
        others = [file for file in contents.path.parent.iterdir() if file.suffix in SUFFIXES and file != contents.path]
        if contents.is_peft or not others or contents.path.stem == "adapter_model":
            source, text = str(beside), beside.read_text(encoding="utf-8", errors="replace")
    if text is None:
        return _Scaling()
    try:
        config = dict(json.loads(text))
        for prefix in ("transformer.", f"{part}."):
            config |= {name.removeprefix(prefix): value for name, value in config.items() if name.startswith(prefix)}
        patterns = [*(config.get("rank_pattern") or {}).items(), *(config.get("alpha_pattern") or {}).items()]
        numbers = [config.get("r"), config.get("lora_alpha"), config.get("alpha"), *(number for _, number in patterns)]
        if not all(number is None or 0 <= float(number) < inf for number in numbers):
            raise ValueError("a rank or an alpha is no positive number")
        for pattern, _ in patterns:
            re.compile(pattern)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise WanFastError(f"{contents.where}: {source} is not as PEFT writes it ({error}); take the released one") from error
    return _Scaling(source, config)
