"""Prompt extension: a language model writes a prompt out before a clip is made of it.

It is Qwen on this machine, through transformers, or a model of the service DashScope, over HTTP. Both are asked the same. What
they need is imported where it is used.
"""

from __future__ import annotations

import base64
import gc
import io
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from wan_fast.config import WanFastError
from wan_fast.parsing import check_choice, option

if TYPE_CHECKING:
    from PIL.Image import Image
    from requests import PreparedRequest, RequestException, Response

# default models: of text, and of text and pictures
_MODELS = {
    "local_qwen": ("Qwen/Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
    "dashscope": ("qwen-plus", "qwen-vl-max"),
}
_NEW_TOKENS = 512
_LONGER_SIDE = 1024  # pixels, of a picture as the language model sees it
_KEY, _URL = "DASH_API_KEY", "DASH_API_URL"  # the official environment variables
_SERVICE = "https://dashscope.aliyuncs.com/api/v1"
_SEEDS = 2**31  # the service takes seeds below

_EN = (
    "Keep its meaning, everyone and everything in it, and any text in quotation marks word for word. Add what a viewer would "
    "see: how the subjects look and what they do, the place, the light, the colours, where the camera is and how it moves, and "
    "a visual style that suits it; nothing that contradicts what is given. Write one paragraph of 80 to 120 words in English, "
    "whatever the language of the description. Reply with the new description alone, without a title, list or remark."
)
_ZH = (
    "原意、其中的人和物都要保留，引号里的文字一字不改。补充观众会看到的内容：主体的外观与动作、环境、光线、色彩、"
    "镜头的位置与运动，以及合适的画面风格；不要写与已知内容矛盾的东西。无论原描述是什么语言，都用中文写成一段，"
    "80到150个字。只回复新的描述，不要标题、列表或说明。"
)
# (with pictures, language) -> what the model is told to do
_INSTRUCTIONS = {
    (False, "en"): "You prepare the input of a video generation model. The user describes a video in a few words; turn them "
    f"into a detailed description of that video. {_EN}",
    (False, "zh"): f"你为视频生成模型准备输入。用户用简短的话描述一段视频，请把它改写成详细的视频描述。{_ZH}",
    (True, "en"): "You prepare the input of a video generation model that starts from a picture. The user shows the picture "
    "and may describe the video in a few words; turn both into a detailed description of that video. Who and what is visible "
    f"must look as in the picture; the movement follows from the user's words. {_EN}",
    (True, "zh"): "你为由图片生成视频的模型准备输入。用户给出图片，也可能附上简短的描述，请结合两者写出详细的视频描述。"
    f"画面中可见的人和物要与图片一致，动作以用户的描述为准。{_ZH}",
}
_TWO_PICTURES = {
    "en": " There are two pictures: the first is the video's first frame, the second its last; tell how the one becomes the "
    "other.",
    "zh": "共有两张图片：第一张是视频的首帧，第二张是尾帧，请写出画面如何从前者变到后者。",
}
_NO_PROMPT = {"en": "(no description: what the picture suggests)", "zh": "（没有描述，请根据画面构思）"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptExtension:
    """Whether a language model writes the prompt out, and which.

    Raises:
        WanFastError: a value is not allowed, or would be ignored.
    """

    use_prompt_extend: bool = option(
        False, "let a language model write the prompt out before it is used", "--use_prompt_extend"
    )
    prompt_extend_method: Literal["local_qwen", "dashscope"] | None = option(
        None,
        f"local_qwen: on this machine; dashscope: Alibaba's service, with the key in {_KEY}; default local_qwen",
        "--prompt_extend_method",
        unit="local_qwen|dashscope",
    )
    prompt_extend_model: str | None = option(
        None,
        "folder or hub id of an instruct model, or the service's name of one; default: "
        + "; ".join(f"{method}: {text}, with pictures {vision}" for method, (text, vision) in _MODELS.items()),
        "--prompt_extend_model",
        unit="MODEL",
    )
    prompt_extend_target_lang: Literal["zh", "en"] | None = option(
        None, "language of the new prompt; default zh", "--prompt_extend_target_lang", unit="zh|en"
    )
    prompt_extend_fallback: bool = option(
        False, "where the prompt cannot be extended, use it as it is and say so", "--prompt_extend_fallback"
    )

    def __post_init__(self) -> None:
        check_choice(self, "prompt_extend_method", None, *_MODELS)
        check_choice(self, "prompt_extend_target_lang", None, "zh", "en")
        if self.prompt_extend_model is not None and not str(self.prompt_extend_model).strip():
            raise WanFastError("--prompt_extend_model is empty; give a folder, a hub id, or leave it out")
        if self.use_prompt_extend:
            return
        for name in ("method", "model", "target_lang", "fallback"):
            value = getattr(self, f"prompt_extend_{name}")
            if value not in (None, False):
                said = f"--prompt_extend_{name}" + ("" if value is True else f" {value}")
                raise WanFastError(f"{said} would be ignored without --use_prompt_extend; add it, or leave this out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """With the service. connect, read: seconds an attempt may take. waits: seconds before each further attempt."""

    connect: float = 10.0
    read: float = 60.0
    waits: tuple[float, ...] = (1.0, 3.0, 9.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended:
    """A prompt, in one line where it is new; `note` says why it is not, for the user to read."""

    prompt: str
    note: str | None = None


def extend(
    options: PromptExtension,
    prompt: str | None,
    pictures: Sequence[Image] = (),
    *,
    seed: int,
    device: str = "auto",
    quiet: bool = False,
    patience: Patience | None = None,
) -> Extended:
    """The prompt, written out by a language model; without `use_prompt_extend` as it is.

    Args:
        options: which model, and what to do where it fails.
        prompt: may be empty, or None, where there are pictures.
        pictures: none, the first frame, or the first and the last one.
        seed: the same one repeats the answer; of the service as far as it keeps to it.
        device: what local_qwen runs on: auto, cpu, cuda or cuda:N. Its memory is free again afterwards.
        quiet: transformers draws no progress bars from then on.
        patience: how long the service is waited for.

    Raises:
        WanFastError: there is nothing to extend, or it failed and there is no `prompt_extend_fallback`, or no prompt for it.
    """
    prompt = prompt or ""
    if not options.use_prompt_extend:
        return Extended(prompt=prompt)
    if len(pictures) > 2:
        raise WanFastError(f"a prompt is extended with at most 2 pictures, got {len(pictures)}; give the first and last frame")
    if not prompt.strip() and not pictures:
        raise WanFastError('--use_prompt_extend needs a prompt or a picture, got neither; add --prompt "..."')
    if quiet and options.prompt_extend_method != "dashscope":
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    try:
        return Extended(prompt=_written(options, prompt.strip(), pictures, seed, device, patience or Patience()))
    except WanFastError as error:
        problem = str(error)
    if options.prompt_extend_fallback and prompt.strip():
        return Extended(prompt=prompt, note=f"prompt not extended, used as it is: {problem}")
    if prompt.strip():
        problem += ", or add --prompt_extend_fallback to go on with the prompt as it is"
    # raised here, where it has no context: errors of the transport may quote the key
    raise WanFastError(problem)


def check(options: PromptExtension, pictures: bool) -> None:
    """What can be said before anything is downloaded or loaded, and the service asked.

    Raises:
        WanFastError: the model or the key is missing, or it is a model of another kind; not where there is a fallback.
    """
    if not options.use_prompt_extend or options.prompt_extend_fallback:
        return
    method, model, _ = _chosen(options, pictures)
    if method == "dashscope":
        _account()
    elif Path(source := _source(model)).is_dir():
        _check_model(model, _config(model, source), pictures)


def described(options: PromptExtension, pictures: bool) -> str:
    """In words: which model writes the prompt, and in which language."""
    method, model, language = _chosen(options, pictures)
    return f"to be written out by {model} ({method}), in {language}"


def _chosen(options: PromptExtension, pictures: bool) -> tuple[str, str, str]:
    """(method, model, language)."""
    method = options.prompt_extend_method or "local_qwen"
    model = options.prompt_extend_model or _MODELS[method][pictures]
    return method, model, options.prompt_extend_target_lang or "zh"


def _written(
    options: PromptExtension, prompt: str, pictures: Sequence[Image], seed: int, device: str, patience: Patience
) -> str:
    """What the model answers, in one line."""
    method, model, language = _chosen(options, bool(pictures))
    instruction = _INSTRUCTIONS[bool(pictures), language] + (_TWO_PICTURES[language] if len(pictures) == 2 else "")
    prompt, pictures = prompt or _NO_PROMPT[language], [_small(picture) for picture in pictures]
    if method == "dashscope":
        answer = _ask_service(model, instruction, prompt, pictures, seed, patience)
    else:
        answer = _ask_local(model, instruction, prompt, pictures, seed, device)
    line = _one_line(answer)
    if not line:
        raise WanFastError(f"{model} answered the prompt with an empty one; take another --prompt_extend_model")
    return line


def _small(picture: Image) -> Image:
    """A copy in RGB, whose longer side is at most 1024 px."""
    copy = picture.convert("RGB")
    copy.thumbnail((_LONGER_SIDE, _LONGER_SIDE))
    return copy


# the service


def _ask_service(model: str, instruction: str, prompt: str, pictures: Sequence[Image], seed: int, patience: Patience) -> str:
    messages: list[dict[str, Any]] = [{"role": "system", "content": instruction}, {"role": "user", "content": prompt}]
    if pictures:
        shown = [{"image": _data_url(picture)} for picture in pictures]
        messages[0]["content"] = [{"text": instruction}]
        messages[1]["content"] = [*shown, {"text": prompt}]
    body = {
        "model": model,
        "input": {"messages": messages},
        "parameters": {"result_format": "message", "seed": seed % _SEEDS},
    }
    response = _post(f"services/aigc/{'multimodal' if pictures else 'text'}-generation/generation", body, patience)
    try:
        content = response.json()["output"]["choices"][0]["message"]["content"]
        return content if isinstance(content, str) else "".join(part["text"] for part in content)
    except (ValueError, KeyError, IndexError, TypeError):
        pass
    raise WanFastError(f"DashScope answered with something else than a text; check {_URL}")


def _data_url(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _post(path: str, body: dict[str, Any], patience: Patience) -> Response:
    """The service's answer; connections, 429 and 5xx are tried again."""
    try:
        import requests
    except ImportError:
        raise WanFastError(
            "--prompt_extend_method dashscope needs requests, which is not installed; pip install 'wan-fast[dashscope]'"
        ) from None
    key, base = _account()

    # as `auth`, which goes before a password that ~/.netrc may have for this host
    def sign(request: PreparedRequest) -> PreparedRequest:
        request.headers["Authorization"] = f"Bearer {key}"
        return request

    for wait in (*patience.waits, None):
        try:
            response = requests.post(
                f"{base}/{path}",
                json=body,
                auth=sign,
                timeout=(patience.connect, patience.read),
                allow_redirects=False,  # a POST would become a GET
            )
        except requests.RequestException as error:
            problem, again = _unreached(error, patience)
        else:
            if response.status_code == 200:
                return response
            problem, again = _refused(response), response.status_code == 429 or response.status_code >= 500
        if not again or wait is None:
            break
        time.sleep(wait)
    raise WanFastError(f"DashScope at {_short(urlsplit(base).netloc.rpartition('@')[2])} {problem}")


def _account() -> tuple[str, str]:
    """(key, address), from the environment."""
    key, base = (os.environ.get(name, "").strip() for name in (_KEY, _URL))
    base = (base or _SERVICE).rstrip("/")
    if not key:
        raise WanFastError(
            f"--prompt_extend_method dashscope needs a key of the service, {_KEY} is not set; "
            "set it, or take --prompt_extend_method local_qwen"
        )
    if not re.fullmatch("[!-~]+", key):
        raise WanFastError(f"{_KEY} holds characters that no key has; copy the key again")
    if not re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", base, re.IGNORECASE):
        raise WanFastError(f"{_URL} must be an http or https address, got {_short(base)!r}; unset it for {_SERVICE}")
    return key, base


def _unreached(error: RequestException, patience: Patience) -> tuple[str, bool]:
    """What an error of the transport says, and whether to try again."""
    import requests

    # one while the body is read comes as a ConnectionError
    if isinstance(error, requests.ReadTimeout) or "Read timed out" in str(error):
        return f"gave no answer within {patience.read:g} s; try again later", False
    if isinstance(error, requests.ConnectTimeout):
        return f"cannot be reached within {patience.connect:g} s; check the network and {_URL}", True
    lost = isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError))
    # the last part is the reason, after classes, addresses and the path
    reason = str(error).rpartition(": ")[2].strip("'\")( ")
    said = f"cannot be reached ({_short(f'{type(error).__name__}: {reason}')}); check the network and {_URL}"
    return said, lost and not isinstance(error, requests.exceptions.SSLError)


def _refused(response: Response) -> str:
    """What an answer says that is an error, and what to do."""
    try:
        body = response.json()
        said = ": ".join(str(body[name]) for name in ("code", "message") if body.get(name))
    except (ValueError, AttributeError):  # not JSON, or not an object
        said = ""
    status = response.status_code
    hint = {401: f"check {_KEY}", 403: f"check {_KEY} and --prompt_extend_model", 404: f"check {_URL}"}.get(
        status, "try again later" if status == 429 or status >= 500 else f"check --prompt_extend_model and {_URL}"
    )
    return f"refused with status {status}" + (f" ({_short(said)})" if said else "") + f"; {hint}"


def _short(said: str) -> str:
    """What another program says, in one line, not too long, and without the key."""
    line, key = _one_line(said), os.environ.get(_KEY, "").strip()
    line = line.replace(key, "***") if key else line
    return line if len(line) <= 200 else line[:200] + "..."


def _one_line(text: str) -> str:
    """Without line breaks, and what else a terminal would obey."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


# this machine


def _ask_local(model: str, instruction: str, prompt: str, pictures: Sequence[Image], seed: int, device: str) -> str:
    import torch

    source = _source(model)
    _check_model(model, _config(model, source), bool(pictures))
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    problem = ""
    try:
        return _generated(model, source, instruction, prompt, pictures, seed, place)
    except WanFastError:
        raise
    except torch.OutOfMemoryError:
        problem = f"does not fit into the memory of {place}; take a smaller one"
    except Exception as error:  # what transformers, tokenizers, safetensors and the hub's transport raise has no common base
        if "torchvision" in str(error).lower():
            problem = "needs torchvision to read pictures; pip install torchvision"
        else:
            reason = next(iter(str(error).strip().splitlines()), "")
            problem = f"cannot be used ({_short(f'{type(error).__name__}: {reason}')}); give another one"
    finally:
        # the video model needs the memory; an error's traceback would hold it until here
        gc.collect()
        if place.type == "cuda":
            torch.cuda.empty_cache()
    raise WanFastError(f"--prompt_extend_model {model} {problem}")


def _source(model: str) -> str:
    """A folder's path, or a hub id."""
    # a hub id looks like a relative path of two parts; where the first part is a folder here, it is one
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) and not Path(model.split("/")[0]).exists():
        return model
    folder = Path(model).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise WanFastError(
            f"--prompt_extend_model {model!r} {what}; give a folder or a hub id such as {_MODELS['local_qwen'][0]}"
        )
    return str(folder)


def _config(model: str, source: str) -> dict[str, Any]:
    """The model's config.json, which is read before anything large is downloaded or loaded."""
    file = Path(source) / "config.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        log = logging.getLogger("huggingface_hub")
        before = log.level
        try:
            cached = try_to_load_from_cache(source, "config.json")
            log.setLevel(logging.CRITICAL)  # of every attempt it warns
            file = Path(cached if isinstance(cached, str) else hf_hub_download(source, "config.json"))
        except Exception as error:  # whatever the transport raises
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise WanFastError(
                f"--prompt_extend_model {model} is neither a folder nor in the hub cache, and cannot be downloaded "
                f"({_short(reason)}); give a folder"
            ) from None
        finally:
            log.setLevel(before)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise WanFastError(f"--prompt_extend_model {model!r} holds no model: no config.json that can be read; give another one")
    return config


def _check_model(model: str, config: dict[str, Any], pictures: bool) -> None:
    """Raise if the model is not of the kind that is needed, by its config."""
    sees = "vision_config" in config
    writes = sees or any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ())
    kind = config.get("model_type", "of an unknown type")
    text, vision = _MODELS["local_qwen"]
    if not writes:
        raise WanFastError(f"--prompt_extend_model {model} is {kind}, which writes no text; give one such as {text}")
    if pictures and not sees:
        raise WanFastError(f"--prompt_extend_model {model} is {kind}, which sees no pictures; give one such as {vision}")
    if sees and not pictures:
        raise WanFastError(f"--prompt_extend_model {model} is {kind}, for pictures, and there is none; give one such as {text}")


def _generated(model: str, source: str, instruction: str, prompt: str, pictures: Sequence[Image], seed: int, place: Any) -> str:
    """What the model writes; nothing else holds the model, which goes with this call."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    # never code from the hub; not saying so asks on the terminal
    coder: Any = (AutoProcessor if pictures else AutoTokenizer).from_pretrained(source, trust_remote_code=False)
    if not coder.chat_template:
        raise WanFastError(f"--prompt_extend_model {model} has no chat template; give an instruct model")
    messages: list[dict[str, Any]] = [{"role": "system", "content": instruction}, {"role": "user", "content": prompt}]
    if pictures:
        shown = [{"type": "image", "image": picture} for picture in pictures]
        messages[0]["content"] = [{"type": "text", "text": instruction}]
        messages[1]["content"] = [*shown, {"type": "text", "text": prompt}]
    inputs = coder.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        # Qwen3 would spend its tokens on thoughts
        **({} if pictures else {"enable_thinking": False}),
    )
    auto: Any = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
    network: Any = auto.from_pretrained(source, dtype="auto", trust_remote_code=False).to(place)
    moved = {name: value.to(place, network.dtype if value.is_floating_point() else None) for name, value in inputs.items()}
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        tokens = network.generate(**moved, do_sample=True, max_new_tokens=_NEW_TOKENS)
    return coder.decode(tokens[0, moved["input_ids"].shape[1] :], skip_special_tokens=True)
