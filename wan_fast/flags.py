"""Command-line flags: one per field of the dataclasses in config.py, and the official ones that are for another program."""

from __future__ import annotations

import argparse
import re
import sys
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

from wan_fast.config import WanFastError

T = TypeVar("T")

# official flags that drive another program: whether they take a value
_TTS: dict[str, bool] = {
    "--enable_tts": False,
    **dict.fromkeys(("--tts_prompt_audio", "--tts_prompt_text", "--tts_text"), True),
}
# flags of other programs for Wan, and what to do here
_ELSEWHERE = {
    "--model-name": "did you mean --task?",
    "--prompt-file": "a run makes one video: give its text to --prompt",
    "--image-path-file": "a run makes one video: give its picture to --image",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and takes every flag with dashes or underscores."""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        hint = "; quote what has spaces, and put commas between several files" if message.startswith("unrecognized") else ""
        raise WanFastError(message + hint)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        try:
            return super().parse_args(self.spell(sys.argv[1:] if args is None else args), namespace)
        except _BadValue as error:
            raise WanFastError(str(error)) from None

    def spell(self, argv: Sequence[str]) -> list[str]:
        """The flags of `argv` as they are registered; a flag that is not gets the nearest one named."""
        known = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        spelled = []
        for word in argv:
            flag, equals, value = word.partition("=")
            if re.fullmatch(r"--[A-Za-z][\w-]*", flag):  # and not a value that begins with dashes
                name = known.get(flag.replace("_", "-"))
                if name is None:
                    close = get_close_matches(flag, self._option_string_actions, 1)
                    hint = f"did you mean {close[0]}?" if close else "see --help"
                    raise WanFastError(f"unknown flag {flag}; {_ELSEWHERE.get(flag.replace('_', '-'), hint)}")
                word = name + equals + value
            spelled.append(word)
        return phantom_tasks(spelled)


def phantom_tasks(words: list[str]) -> list[str]:
    """A command line; with --phantom_ckpt the tasks s2v-1.3B and s2v-14B are Phantom's own, subject to video."""
    if not any(word.partition("=")[0] == "--phantom_ckpt" for word in words):
        return words
    return re.sub(r"(?<=--task[\0=])s2v-(?=(?:1\.3B|14B)(?:\0|$))", "phantom-", "\0".join(words)).split("\0")


class _BadValue(Exception):
    """What a converter has to say; argparse would replace the message of a ValueError by its own."""


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


def add_tts(parser: argparse.ArgumentParser) -> None:
    """Accept the flags of `_TTS`; `refuse_tts` says which of them were given."""
    for flag, takes_value in _TTS.items():
        settings: dict[str, Any] = {} if takes_value else {"nargs": 0, "const": ""}
        parser.add_argument(flag, action=_Collect, dest="tts", help=argparse.SUPPRESS, default=[], **settings)


def refuse_tts(parsed: argparse.Namespace) -> None:
    """Raise if speech is to be made of text."""
    for flag, value in parsed.tts:
        raise WanFastError(
            f"{flag} {value}".strip() + " needs CosyVoice (github.com/FunAudioLLM/CosyVoice) with its model CosyVoice2-0.5B, "
            "which this version does not run; install it, make the speech there, and give its file as --audio"
        )


class _Collect(argparse.Action):
    """Append (flag, value), in the order given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        seen = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*seen, (option, values if isinstance(values, str) else "")])


def add_options(parser: argparse.ArgumentParser, cls: type, less: Collection[str] = ()) -> None:
    """One flag per field but for those in `less`: its names, type, choices, default and help come from the dataclass."""
    group = parser.add_argument_group(cls.__doc__.splitlines()[0].rstrip(".") if cls.__doc__ else cls.__name__)
    hints = typing.get_type_hints(cls)
    for field in (field for field in fields(cls) if field.name not in less):
        kind, optional = _unwrap(hints[field.name])
        help = field.metadata["help"].replace("%", "%%")
        settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if field.default is MISSING:
            settings["required"] = True
        elif not optional and field.default not in (False, ()):
            help += f" (default {field.default})"
        if kind is bool and not field.metadata["parse"]:
            settings["action"] = argparse.BooleanOptionalAction if optional else "store_true"
        elif typing.get_origin(kind) is tuple and not field.metadata["parse"]:
            settings |= {"action": "append", "metavar": field.metadata["unit"]}
        else:
            choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
            settings["type"] = _converter(field.metadata["parse"] or (str if choices else kind), field.metadata["flags"][0])
            settings["metavar"] = field.metadata["unit"] or ("|".join(choices) if choices else kind.__name__.upper())
        group.add_argument(*field.metadata["flags"], help=help, **settings)


def build(cls: type[T], parsed: argparse.Namespace) -> T:
    """The dataclass from what was given; what was not keeps its default."""
    given = {f.name: getattr(parsed, f.name) for f in fields(cls) if hasattr(parsed, f.name)}  # type: ignore[arg-type]
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return cls(**given)


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """(X, True) of X | None; of a longer union the first member, whose `parse` does the work."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        return members[0], len(members) < len(typing.get_args(hint))
    return hint, False


def _converter(convert: Any, flag: str) -> Any:
    def converted(text: str) -> Any:
        try:
            return convert(text)
        except WanFastError as error:
            raise _BadValue(str(error) if flag in str(error) else f"{flag}: {error}") from None
        except ValueError:
            what = {int: "a whole number", float: "a number"}.get(convert, "another value")
            raise _BadValue(f"{flag} must be {what}, got {text[:40]!r}") from None

    return converted
