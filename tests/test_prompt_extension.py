"""Prompt extension: a stub of the service on this machine, and random models of a few thousand weights."""

from __future__ import annotations

import base64
import gc
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from wan_fast.config import WanFastError
from wan_fast.flags import Parser, add_options, build
from wan_fast.prompt_extension import Extended, Patience, PromptExtension, extend

KEY = "sk-0123456789abcdef"
HASTY = Patience(connect=0.5, read=0.3, waits=(0.0, 0.01))
RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")


def dashscope(**options) -> PromptExtension:
    return PromptExtension(use_prompt_extend=True, prompt_extend_method="dashscope", **options)


def local(folder, **options) -> PromptExtension:
    return PromptExtension(use_prompt_extend=True, prompt_extend_model=str(folder), **options)


def said(content) -> dict:
    return {"output": {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": content}}]}}


# the options


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], PromptExtension()),
        (["--use_prompt_extend"], PromptExtension(use_prompt_extend=True)),
        (
            [
                *("--use_prompt_extend", "--prompt_extend_method", "dashscope", "--prompt_extend_model", "qwen-max"),
                *("--prompt-extend-target-lang", "en", "--prompt_extend_fallback"),
            ],
            dashscope(prompt_extend_model="qwen-max", prompt_extend_target_lang="en", prompt_extend_fallback=True),
        ),
    ],
)
def test_flags(argv, expected):
    parser = Parser("wan-fast", "")
    add_options(parser, PromptExtension)
    assert build(PromptExtension, parser.parse_args(argv)) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_prompt_extend": True, "prompt_extend_method": "openai"}, "prompt_extend_method must be one of local_qwen"),
        ({"use_prompt_extend": True, "prompt_extend_target_lang": "de"}, "prompt_extend_target_lang must be one of zh en"),
        ({"use_prompt_extend": True, "prompt_extend_model": " "}, "--prompt_extend_model is empty"),
        ({"prompt_extend_method": "dashscope"}, "--prompt_extend_method dashscope would be ignored"),
        ({"prompt_extend_model": "qwen-max"}, "--prompt_extend_model qwen-max would be ignored"),
        ({"prompt_extend_target_lang": "en"}, "--prompt_extend_target_lang en would be ignored"),
        ({"prompt_extend_fallback": True}, "--prompt_extend_fallback would be ignored without --use_prompt_extend; add it"),
    ],
)
def test_what_is_not_allowed(options, words):
    with pytest.raises(WanFastError, match=words):
        PromptExtension(**options)


def test_without_the_flag_the_prompt_stays():
    assert extend(PromptExtension(), " a cat ", seed=0) == Extended(prompt=" a cat ")


@pytest.mark.parametrize("prompt", ["", " \n", None])
def test_nothing_to_extend(prompt):
    with pytest.raises(WanFastError, match="needs a prompt or a picture, got neither"):
        extend(dashscope(prompt_extend_fallback=True), prompt, seed=0)


def test_too_many_pictures():
    with pytest.raises(WanFastError, match="at most 2 pictures, got 3"):
        extend(dashscope(prompt_extend_fallback=True), "a cat", [RED] * 3, seed=0)


def test_importing_it_is_cheap():
    heavy = ("torch", "transformers", "requests", "PIL")
    code = f"import sys, wan_fast.prompt_extension; print(sorted(set({heavy}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# the service


class Service:
    """Answers in turn, the last one for ever; keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, object]] = [(200, said("a long description"))]
        self.asked: list[tuple[str, dict[str, str], dict]] = []
        self.closing = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.asked.append((self.path, dict(self.headers), json.loads(body)))
                status, answer = service.answers.pop(0) if len(service.answers) > 1 else service.answers[0]
                if answer in ("slow", "stalls", "breaks"):
                    if answer != "slow":
                        self.send_response(200)
                        self.send_header("Content-Length", "100")
                        self.end_headers()
                    if answer != "breaks":
                        service.closing.wait(5)
                    self.close_connection = True
                    return
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Service]:
    caplog.set_level(logging.DEBUG)
    found = Service()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("DASH_API_KEY", KEY)
    monkeypatch.setenv("DASH_API_URL", f"{found.url}/api/v1/")
    yield found
    found.close()
    assert KEY not in caplog.text


def failure(options: PromptExtension, prompt="a cat", pictures=()) -> str:
    """What the error says, which does not hold the key, nor does anything that is printed with it."""
    with pytest.raises(WanFastError) as caught:
        extend(options, prompt, pictures, seed=0, device="cpu", patience=HASTY)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


@pytest.mark.parametrize(("language", "words"), [(None, "中文"), ("zh", "中文"), ("en", "English")])
def test_a_text(service, language, words):
    service.answers = [(200, said("\n  A grey cat walks.\n\nIt is dusk. "))]
    answer = extend(dashscope(prompt_extend_target_lang=language), " a cat\n", seed=2**31 + 7)
    assert answer == Extended(prompt="A grey cat walks. It is dusk.")
    [(path, headers, body)] = service.asked
    assert path == "/api/v1/services/aigc/text-generation/generation"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    system, user = body["input"]["messages"]
    assert body == {
        "model": "qwen-plus",
        "input": {"messages": [system, user]},
        "parameters": {"result_format": "message", "seed": 7},
    }
    assert system["role"] == "system" and words in system["content"]
    assert user == {"role": "user", "content": "a cat"}


def shown(part: dict[str, str]) -> Image.Image:
    head, _, data = part["image"].partition(",")
    assert head == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.format == "JPEG" and picture.mode == "RGB"
    return picture


@pytest.mark.parametrize(("language", "first"), [("zh", "首帧"), ("en", "first frame")])
def test_pictures(service, language, first):
    service.answers = [(200, said([{"text": "A grey cat"}, {"text": " walks."}]))]
    options = dashscope(prompt_extend_target_lang=language)
    large = Image.new("RGBA", (2048, 512), "blue")
    assert extend(options, "a cat", [RED], seed=0).prompt == "A grey cat walks."
    assert extend(options, "a cat", [RED, large], seed=0).prompt == "A grey cat walks."
    assert large.size == (2048, 512)  # the caller's is as it was
    (path, headers, one), (_, _, two) = service.asked
    assert path == "/api/v1/services/aigc/multimodal-generation/generation"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert one["model"] == "qwen-vl-max"
    system, user = one["input"]["messages"]
    picture, text = user["content"]
    assert (system["role"], user["role"], text) == ("system", "user", {"text": "a cat"})
    [told_of_one], [told_of_two] = system["content"], two["input"]["messages"][0]["content"]
    assert shown(picture).size == (64, 64)
    assert first in told_of_two["text"].replace(told_of_one["text"], "")
    *pictures, text = two["input"]["messages"][1]["content"]
    assert [shown(part).size for part in pictures] == [(64, 64), (1024, 256)]
    assert shown(pictures[0]).getpixel((5, 5))[0] > 200 < shown(pictures[1]).getpixel((5, 5))[2]


def test_instructions_differ(service):
    for pictures in ([], [RED], [RED, BLUE]):
        for language in ("zh", "en"):
            extend(dashscope(prompt_extend_target_lang=language), "a cat", pictures, seed=0)
    told = [body["input"]["messages"][0]["content"] for *_, body in service.asked]
    texts = [content if isinstance(content, str) else content[0]["text"] for content in told]
    assert len(set(texts)) == 6
    assert all(("80" in text) and ("中文" in text) is (i % 2 == 0) for i, text in enumerate(texts))


@pytest.mark.parametrize(("language", "words"), [("zh", "没有描述"), ("en", "no description")])
def test_a_picture_without_a_prompt(service, language, words):
    service.answers = [(200, said("a red field"))]
    assert extend(dashscope(prompt_extend_target_lang=language), "", [RED], seed=0).prompt == "a red field"
    assert words in service.asked[0][2]["input"]["messages"][1]["content"][1]["text"]


def test_another_model(service):
    extend(dashscope(prompt_extend_model="qwen-max"), "a cat", seed=0)
    assert service.asked[0][2]["model"] == "qwen-max"


def test_the_default_address(monkeypatch):
    import requests

    asked = []
    monkeypatch.setenv("DASH_API_KEY", KEY)
    monkeypatch.delenv("DASH_API_URL", raising=False)
    monkeypatch.setattr(requests, "post", lambda url, **_: asked.append((url, _["timeout"])) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extend(dashscope(), "a cat", seed=0)
    assert asked == [("https://dashscope.aliyuncs.com/api/v1/services/aigc/text-generation/generation", (10.0, 60.0))]


@pytest.mark.parametrize("first", [(500, {"code": "InternalError"}), (429, {"code": "Throttling"}), (503, b"<html>"), "breaks"])
def test_tried_again(service, first):
    service.answers = [(200, first) if first == "breaks" else first, (200, said("a long description"))]
    assert extend(dashscope(), "a cat", seed=0, patience=HASTY).prompt == "a long description"
    assert len(service.asked) == 2
    assert service.asked[0][2] == service.asked[1][2]


def test_waits_grow(service, monkeypatch):
    waits = []
    monkeypatch.setattr("wan_fast.prompt_extension.time.sleep", waits.append)
    service.answers = [(500, {})]
    with pytest.raises(WanFastError, match="status 500; try again later"):
        extend(dashscope(), "a cat", seed=0)
    assert waits == [1.0, 3.0, 9.0] and len(service.asked) == 4


def test_a_proxy_is_used(service, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", service.url)
    monkeypatch.setenv("DASH_API_URL", "http://dashscope.invalid/api/v1")
    assert extend(dashscope(), "a cat", seed=0, patience=HASTY).prompt == "a long description"
    assert service.asked[0][0].startswith("http://dashscope.invalid/")


def test_a_netrc_does_not_replace_the_key(service, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    extend(dashscope(), "a cat", seed=0)
    assert service.asked[0][1]["Authorization"] == f"Bearer {KEY}"


def closed() -> str:
    gone = Service()
    gone.close()
    return gone.url


REFUSED = {"code": "InvalidApiKey", "message": f"Wrong key\n{KEY}: {'x' * 400}", "request_id": "1"}
# what goes wrong -> (answer, environment, words of the error, number of requests)
FAILURES = {
    "401": ((401, REFUSED), {}, r"status 401 \(InvalidApiKey: Wrong key \*\*\*: x{10,200}\.\.\.\); check DASH_API_KEY", 1),
    "400": ((400, {"code": "DataInspectionFailed", "message": "No."}), {}, r"400 \(DataInspectionFailed: No\.\); check", 1),
    "404": ((404, b"nothing here"), {}, "status 404; check DASH_API_URL", 1),
    "redirection": ((302, b""), {}, "status 302; check", 1),
    "key cut in two": ((400, {"message": "x" * 195 + KEY}), {}, r"x{195}\*\*\*", 1),
    "429": ((429, {"code": "Throttling", "message": "Slow down"}), {}, r"429 \(Throttling: Slow down\); try again later", 3),
    "500": ((500, {"code": "InternalError"}), {}, r"status 500 \(InternalError\); try again later", 3),
    "503": ((503, [f"no object {KEY}"]), {}, "status 503; try again later", 3),
    "garbage": ((200, b"<html>" + KEY.encode()), {}, "something else than a text", 1),
    "no choices": ((200, {"output": {"choices": []}}), {}, "something else than a text", 1),
    "no output": ((200, {"request_id": KEY}), {}, "something else than a text", 1),
    "a number": ((200, said(3)), {}, "something else than a text", 1),
    "nothing": ((200, said(None)), {}, "something else than a text", 1),
    "no texts": ((200, said([{"text": 3}])), {}, "something else than a text", 1),
    "empty": ((200, said(" \n ")), {}, "qwen-plus answered the prompt with an empty one", 1),
    "empty list": ((200, said([])), {}, "qwen-plus answered the prompt with an empty one", 1),
    "slow": ((200, "slow"), {}, r"gave no answer within 0\.3 s", 1),
    "stalls": ((200, "stalls"), {}, r"gave no answer within 0\.3 s", 1),
    "breaks": ((200, "breaks"), {}, "cannot be reached", 3),
    "no key": (None, {"DASH_API_KEY": " "}, "DASH_API_KEY is not set; set it, or take --prompt_extend_method local_qwen", 0),
    "two lines": (None, {"DASH_API_KEY": f"{KEY}\n{KEY}"}, "DASH_API_KEY holds characters that no key has", 0),
    "not ASCII": (None, {"DASH_API_KEY": f"{KEY}é"}, "DASH_API_KEY holds characters that no key has", 0),
    "ftp": (None, {"DASH_API_URL": "ftp://127.0.0.1"}, "DASH_API_URL must be an http or https address, got 'ftp://127", 0),
    "the key as address": (None, {"DASH_API_URL": f"file:///{KEY}"}, r"got 'file:///\*\*\*'", 0),
    "no host": (None, {"DASH_API_URL": "http:///api"}, "DASH_API_URL must be", 0),
    "bad port": (None, {"DASH_API_URL": "http://127.0.0.1:99999"}, "cannot be reached", 0),
    "no server": (None, {"DASH_API_URL": "closed"}, r"at 127\.0\.0\.1:\d+ cannot be reached \(\w+: \[Errno 111\] \w+ \w+\)", 0),
}  # fmt: skip


@pytest.fixture(params=FAILURES)
def failing(request, service, monkeypatch) -> tuple[Service, str, int]:
    answer, environment, words, count = FAILURES[request.param]
    service.answers = [answer]
    for name, value in environment.items():
        monkeypatch.setenv(name, closed() if value == "closed" else value)
    return service, words, count


def test_failures_of_the_service(failing):
    service, words, count = failing
    message = failure(dashscope())

    assert re.search(words, message), message
    assert "; " in message and message.endswith(", or add --prompt_extend_fallback to go on with the prompt as it is")
    assert len(service.asked) == count


def test_fallback_from_the_service(failing):

    answer = extend(dashscope(prompt_extend_fallback=True), " a cat", seed=0, patience=HASTY)
    assert answer.prompt == " a cat"
    assert answer.note and answer.note.startswith("prompt not extended, used as it is: ")
    assert re.search(failing[1], answer.note)
    assert KEY not in answer.note and "\n" not in answer.note and "fallback" not in answer.note


def test_no_prompt_to_fall_back_to(service):
    service.answers = [(401, REFUSED)]
    message = failure(dashscope(prompt_extend_fallback=True), "", [RED])
    assert "status 401" in message and "fallback" not in message


def test_requests_is_missing(service, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    assert "needs requests, which is not installed; pip install 'wan-fast[dashscope]'" in failure(dashscope())
    assert "pip install" in extend(dashscope(prompt_extend_fallback=True), "a cat", seed=0).note


# this machine


@pytest.fixture(autouse=True)
def brief(monkeypatch) -> None:
    """Random models do not end by themselves."""
    monkeypatch.setattr("wan_fast.prompt_extension._NEW_TOKENS", 24)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    from tiny_qwen import write_text

    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory) -> Path:
    from tiny_qwen import write_vision

    return write_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture
def processor(monkeypatch) -> None:
    """AutoProcessor, or one that needs no torchvision."""
    import transformers
    from tiny_qwen import Processor

    if find_spec("torchvision") is None:
        monkeypatch.setattr(transformers, "AutoProcessor", Processor)


def written(options, prompt, pictures=(), seed=0) -> str:
    answer = extend(options, prompt, pictures, seed=seed, device="cpu")
    assert answer.note is None
    assert answer.prompt and answer.prompt == " ".join(answer.prompt.split())
    return answer.prompt


def watch(monkeypatch, cls) -> list[dict]:
    """What the model is given to go on from, by call."""
    given, original = [], cls.generate
    monkeypatch.setattr(cls, "generate", lambda self, **inputs: given.append(inputs) or original(self, **inputs))
    return given


def test_a_local_text(text_model, monkeypatch):
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    given = watch(monkeypatch, Qwen2ForCausalLM)
    options = local(text_model, prompt_extend_target_lang="en")
    state = torch.get_rng_state()
    first = written(options, "a cat")
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) <= 24  # it begins after the question
    torch.rand(3)
    assert written(options, "a cat") == first
    assert written(options, "a cat", seed=1) != first
    text = AutoTokenizer.from_pretrained(text_model).decode(given[0]["input_ids"][0])
    assert text.startswith("<|im_start|>system") and "video generation model" in text
    assert text.endswith("<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant")
    assert given[0]["max_new_tokens"] == 24 and given[0]["do_sample"] is True


def test_what_a_local_model_is_told(text_model, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    asked, original = [], PreTrainedTokenizerBase.apply_chat_template
    monkeypatch.setattr(
        PreTrainedTokenizerBase,
        "apply_chat_template",
        lambda self, messages, **settings: asked.append((messages, settings)) or original(self, messages, **settings),
    )
    written(local(text_model), "a cat")
    [(messages, settings)] = asked
    assert [message["role"] for message in messages] == ["system", "user"]
    assert "中文" in messages[0]["content"] and messages[1]["content"] == "a cat"
    assert settings["add_generation_prompt"] is True and settings["enable_thinking"] is False


def test_local_pictures(vision_model, processor, monkeypatch):
    import torch
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    given = watch(monkeypatch, Qwen2_5_VLForConditionalGeneration)
    options = local(vision_model, prompt_extend_target_lang="en")
    first = written(options, "a cat", [RED])
    assert len(first) <= 24
    assert written(options, "a cat", [RED]) == first
    assert written(options, "", [BLUE], seed=1) != first
    written(options, "a cat", [RED, BLUE])
    red, _, blue, both = (inputs["pixel_values"] for inputs in given)
    assert not torch.equal(red, blue) and torch.equal(both, torch.cat([red, blue]))
    one, *_, two = (AutoTokenizer.from_pretrained(vision_model).decode(inputs["input_ids"][0]) for inputs in given)
    shown = "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
    assert one.endswith(f"<|im_start|>user\n{shown}a cat<|im_end|>\n<|im_start|>assistant")
    assert two.endswith(f"<|im_start|>user\n{shown * 2}a cat<|im_end|>\n<|im_start|>assistant")
    assert "first frame" in two and "first frame" not in one


def test_pictures_are_small_before_they_are_read(vision_model, processor, monkeypatch):
    import transformers

    sizes, original = [], transformers.AutoProcessor.from_pretrained

    def watched(*args, **settings):
        found = original(*args, **settings)
        apply = found.apply_chat_template
        monkeypatch.setattr(
            found,
            "apply_chat_template",
            lambda messages, **rest: (
                sizes.append([part.get("image") for part in messages[1]["content"]]) or apply(messages, **rest)
            ),
        )
        return found

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", watched)
    written(local(vision_model), "a cat", [Image.new("L", (500, 2000))])
    [[picture, text]] = sizes
    assert (picture.size, picture.mode, text) == ((256, 1024), "RGB", None)


def test_the_model_is_released(text_model, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

    alive, original = [], AutoModelForCausalLM.from_pretrained

    def load(*args, **settings):
        assert settings["dtype"] == "auto" and settings["trust_remote_code"] is False
        model = original(*args, **settings)
        model.__dict__["held"] = [model]  # a cycle, as a hook may be
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    gc.disable()
    try:
        written(local(text_model), "a cat")
        assert alive.pop()() is None

        def fail(self, **_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(Qwen2ForCausalLM, "generate", fail)
        assert "does not fit into the memory of cpu; take a smaller one" in failure(local(text_model))
        assert alive.pop()() is None
    finally:
        gc.enable()


def test_an_empty_local_answer(text_model, monkeypatch):
    import torch
    from tiny_qwen import VOCABULARY
    from transformers import Qwen2ForCausalLM

    end = torch.tensor([[VOCABULARY["<|im_end|>"]]])
    monkeypatch.setattr(Qwen2ForCausalLM, "generate", lambda self, input_ids, **_: torch.cat([input_ids, end], 1))
    assert "answered the prompt with an empty one" in failure(local(text_model))


def test_torchvision_is_missing(vision_model, monkeypatch):
    import transformers

    def fail(*_, **__):
        raise ImportError("\nAutoVideoProcessor requires the Torchvision library but it was not found in your environment.")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fail)
    assert "needs torchvision to read pictures; pip install torchvision" in failure(local(vision_model), pictures=[RED])


def without(folder: Path, name: str, tmp_path: Path) -> Path:
    """A copy of the folder that lacks a file."""
    return Path(shutil.copytree(folder, tmp_path / f"without-{name}", ignore=shutil.ignore_patterns(name)))


def local_failures(tmp_path: Path, text: Path, vision: Path) -> dict[str, tuple[object, list[Image.Image], str]]:
    """What goes wrong -> (model, pictures, words of the error)."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbled").mkdir()
    (tmp_path / "garbled" / "config.json").write_text("{")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    mute, bare = (without(text, name, tmp_path) for name in ("chat_template.jinja", "model.safetensors"))
    return {
        "no folder": (tmp_path / "none", [], "none' does not exist; give a folder or a hub id"),
        "a file": (tmp_path / "file", [], "file' is a file, not a folder"),
        "no model": (tmp_path / "empty", [], "holds no model: no config.json"),
        "garbled": (tmp_path / "garbled", [], "holds no model: no config.json"),
        "bert": (tmp_path / "bert", [], "is bert, which writes no text; give one such as Qwen/Qwen2.5-14B-Instruct"),
        "no weights": (bare, [], "cannot be used (OSError: "),
        "no chat template": (mute, [], "has no chat template; give an instruct model"),
        "text for pictures": (text, [RED], "is qwen2, which sees no pictures; give one such as Qwen/Qwen2.5-VL-7B-Instruct"),
        "pictures for text": (vision, [], "is qwen2_5_vl, for pictures, and there is none; give one such as Qwen/Qwen2.5-14B"),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "no folder",
        "a file",
        "no model",
        "garbled",
        "bert",
        "no weights",
        "no chat template",
        "text for pictures",
        "pictures for text",
    ],
)
def test_local_failures(kind, tmp_path, text_model, vision_model, monkeypatch):
    from transformers import PreTrainedModel

    model, pictures, words = local_failures(tmp_path, text_model, vision_model)[kind]
    if kind != "no weights":  # it is not even loaded
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    message = failure(local(model), pictures=pictures)
    assert words in message and "; " in message
    answer = extend(local(model, prompt_extend_fallback=True), "a cat", pictures, seed=0, device="cpu")
    assert answer.prompt == "a cat" and words in str(answer.note)


def test_a_hub_id(tmp_path, text_model, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.chdir(tmp_path)

    def download(repo, file):
        asked.append((repo, file))
        raise OSError("offline\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert "neither a folder nor in the hub cache, and cannot be downloaded (offline" in failure(local("Qwen/tiny"))
    assert "(offline" in failure(PromptExtension(use_prompt_extend=True))
    assert "(offline" in failure(PromptExtension(use_prompt_extend=True), pictures=[RED])
    assert asked == [(f"Qwen/{name}", "config.json") for name in ("tiny", "Qwen2.5-14B-Instruct", "Qwen2.5-VL-7B-Instruct")]
    # a folder here goes before the hub
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "tiny").symlink_to(text_model)
    assert written(local("Qwen/tiny"), "a cat")
    assert "'Qwen/none' does not exist" in failure(local("Qwen/none"))
    assert len(asked) == 3
