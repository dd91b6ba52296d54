"""The subcommands that use a model: fm9g generate, chat, serve."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fm9g.config.mixture import NO_TEMPLATE
from fm9g.errors import UserError
from fm9g.infer.options import GenerationOptions
from fm9g.printable import raw_stream

if TYPE_CHECKING:
    from fm9g.config.dialects.infer import InferRequest, Verb
    from fm9g.infer.open_model import LoadedModel
    from fm9g.infer.prompt_source import PromptRecord
    from fm9g.serve.app import Backend
    from fm9g.serve.limits import Limits

logger = logging.getLogger(__name__)

_MODEL_HELP = (
    "a Hugging Face folder, a checkpoint (RUN/STEP, RUN/best, RUN/last), an adapter, a .pt file, a registered name, or "
    "ORG/NAME of a hub that was downloaded"
)
_SAMPLING: dict[str, tuple[type, str]] = {
    "max_new_tokens": (int, "maximum length of an answer, in tokens"),
    "temperature": (float, "randomness of sampling; 0: always the most probable token"),
    "top_k": (int, "sample from that many of the most probable tokens; 0: from all"),
    "top_p": (float, "sample from the most probable tokens whose probabilities add up to this"),
    "min_p": (float, "leave out tokens less probable than this share of the most probable one"),
    "repetition_penalty": (float, "above 1: repeating tokens becomes less probable; 1: no change"),
    "seed": (int, "random seed of the sampling"),
}
_CHAT_TOKENS = 1024
_VLLM = ("vllm_executable", "tensor_parallel_size", "gpu_memory_utilization")  # options of that backend alone
_DEFAULT_PORT = 8000


def add_infer_commands(subcommand: Any) -> None:
    """Adds `fm9g generate`, `chat` and `serve`. subcommand: adds one to the command line."""
    _add_generate(subcommand)
    _add_chat(subcommand)
    _add_serve(subcommand)


def _add_generate(subcommand: Any) -> None:
    parser = subcommand("generate", _generate, "continue prompts, or answer them", accepts_overrides=True)
    _add_model(parser)
    parser.add_argument("--prompt", help="the text to continue")
    parser.add_argument(
        "--prompts", type=Path, help="file of prompts: a text per line, or .jsonl with messages or prompt per line"
    )
    parser.add_argument("--data", help="datasets, as in `fm9g train --data`; their prompts are answered")
    parser.add_argument(
        "--val_split", type=float, help="with --data: answer the part that training kept for validation"
    )
    parser.add_argument("--split_seed", type=int, help="with --val_split: its seed in training")
    parser.add_argument("--sample", type=int, default=0, help="with --data: number of records; default: all")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question: put it into the chat template")
    parser.add_argument("--system", default="", help="with --chat: the system message; default: none")
    parser.add_argument("--output", type=Path, help="write answers to this .jsonl file instead of printing them")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--batch_size", type=int, default=8, help="answers at a time (default: %(default)s)")
    _add_sampling(parser)
    parser.add_argument("--num_return_sequences", type=int, help="answers per prompt (default: 1)")
    parser.add_argument("--logprobs", type=int, help="with --output: log-probabilities, and so many alternatives")
    _add_talking(parser)
    _add_opening(parser)


def _add_chat(subcommand: Any) -> None:
    parser = subcommand("chat", _chat, "talk to a model in the terminal", accepts_overrides=True)
    _add_model(parser)
    parser.add_argument("--compare", metavar="MODEL", help="a second model, which answers beside the first")
    parser.add_argument(
        "--url", help="talk to a server at this address (http://HOST:PORT/v1) instead of opening a model"
    )
    parser.add_argument("--api_key", default="", help="with --url: its API key (default: FM9G_API_KEY)")
    parser.add_argument("--system", default="", help="the system message; default: none")
    parser.add_argument("--no_stream", action="store_true", help="show answers when they are complete")
    _add_sampling(parser)
    _add_talking(parser)
    _add_opening(parser)


def _add_serve(subcommand: Any) -> None:
    parser = subcommand("serve", _serve, "serve a model: the OpenAI API, and a page", accepts_overrides=True)
    _add_model(parser)
    parser.add_argument(
        "--served_model_name", default="", help="what requests call the model (default: its folder's name)"
    )
    parser.add_argument(
        "--backend",
        default="transformers",
        choices=["transformers", "vllm"],
        help="who generates (default: %(default)s)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; others than this machine's own need keys"
    )
    parser.add_argument("--port", type=int, default=_DEFAULT_PORT, help="port; 0: a free one (default: %(default)s)")
    parser.add_argument(
        "--api_keys", type=Path, help="file with the hashes of API keys; FM9G_API_KEY holds keys as well"
    )
    parser.add_argument(
        "--new_api_key", metavar="NAME", help="make a key, add its hash to --api_keys, print it, and end"
    )
    parser.add_argument("--max_num_seqs", type=int, default=64, help="answers at a time (default: %(default)s)")
    parser.add_argument(
        "--max_model_len", type=int, default=0, help="maximum of prompt and answer, in tokens (default: the model's)"
    )
    for name, default, meaning in (
        ("max_queue", 256, "answers that may wait"),
        ("max_body_mb", 4, "size of a request, in MB"),
        ("request_timeout", 600, "seconds for one request, waiting included"),
        ("shutdown_timeout", 60, "seconds for what runs when the server is stopped"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument(
        "--vllm_executable", help="vLLM's program, in an environment of its own (default: vllm on PATH)"
    )
    parser.add_argument("--vllm_log", default="vllm.log", help="file for vLLM's output (default: %(default)s)")
    parser.add_argument("--tensor_parallel_size", type=int, default=0, help="with vLLM: GPUs that share the model")
    parser.add_argument("--gpu_memory_utilization", type=float, default=0, help="with vLLM: share of the GPU's memory")
    parser.add_argument("--page", action="store_true", help="also serve a chat page, at /page")
    parser.add_argument(
        "--feedback",
        type=Path,
        default=Path("feedback"),
        help="folder for what people on the page think of answers (default: %(default)s)",
    )
    parser.add_argument("--system", default="", help="with --page: the system message that the page begins with")
    _add_sampling(parser, "for requests that do not say: ")
    _add_opening(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(own_words=_OWN_WORDS)
    parser.add_argument("model", nargs="?", help=_MODEL_HELP)
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]PATH", help="an adapter on the model; may be repeated"
    )
    parser.add_argument(
        "--from", dest="dialect", metavar="TOOL", help="the other words, or the file, are arguments of this tool"
    )


def _add_sampling(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    for name, (kind, meaning) in _SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, help=prefix + meaning)
    parser.add_argument("--stop", action="append", help="a text that ends an answer; may be repeated")


def _add_talking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max_model_len", type=int, default=0, help="maximum of prompt and answer, in tokens (default: the model's)"
    )
    parser.add_argument(
        "--save_generation_config",
        type=Path,
        metavar="FILE",
        help="write the sampling options to this file, as generation_config.json has them",
    )


def _add_opening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=["auto", "bf16", "fp16", "fp32"], help="type of the weights in memory (default: auto)"
    )
    parser.add_argument("--quantization", choices=["nf4", "int8"], help="quantize the weights; default: no")
    parser.add_argument("--device", help="auto (all GPUs), cpu, cuda:N (default: auto)")
    parser.add_argument("--chat_template", help="a built-in name or a Jinja file (default: the model's own)")


def _generate(options: argparse.Namespace) -> int | None:
    if request := _translate(options, "generate"):
        return _run_request(request, options)
    _run_generate(options)
    return None


def _chat(options: argparse.Namespace) -> int | None:
    if request := _translate(options, "chat"):
        return _run_request(request, options)
    return _run_chat(options)


def _serve(options: argparse.Namespace) -> int | None:
    if request := _translate(options, "serve"):
        return _run_request(request, options)
    _run_serve(options)
    return None


def _run_generate(options: argparse.Namespace) -> None:
    given = [name for name in ("prompt", "prompts", "data") if getattr(options, name) is not None]
    if len(given) != 1:
        raise UserError("generate: give one of --prompt TEXT, --prompts FILE and --data DATA")
    if given != ["data"]:
        _refuse(options, ("val_split", "split_seed", "sample"), "--data")
    if options.system and not options.chat and given == ["prompt"]:
        raise UserError("system: needs a chat (--chat)")
    if options.logprobs is not None and not options.output:
        raise UserError("logprobs: needs --output FILE.jsonl, which has a place for them")
    if options.batch_size < 1:
        raise UserError(f"--batch_size: found {options.batch_size}, expected at least 1")
    sampling = _sampling(options, {}, GenerationOptions.max_new_tokens)
    if given == ["prompt"] and not options.output and sampling.num_return_sequences == 1:
        _print_one(options, sampling)
        return
    from fm9g.infer.prompt_source import PromptRecord, read_prompts, records_of

    if options.data:
        keys = {key: getattr(options, key) for key in ("val_split", "split_seed") if getattr(options, key) is not None}
        records = list(records_of(options.data, keys, options.sample))
    else:
        records = read_prompts(options.prompts) if options.prompts else [PromptRecord(options.prompt)]
    _write_answers(options, sampling, records)


def _print_one(options: argparse.Namespace, sampling: GenerationOptions) -> None:
    # A file or a pipe gets the text itself.
    out = sys.stdout if raw_stream(sys.stdout).isatty() else raw_stream(sys.stdout)
    prompt: Any = options.prompt
    if options.chat:
        prompt = _messages(options.prompt, options.system)

    started = False

    def show(text: str) -> None:
        nonlocal started
        print(text if started or options.chat else options.prompt, end="", flush=True, file=out)
        started = True

    _open(options).generate(prompt, sampling, show)
    print()


def _write_answers(options: argparse.Namespace, sampling: GenerationOptions, records: Sequence[PromptRecord]) -> None:
    """Answers many prompts, to a file or to the terminal."""
    from fm9g.infer.generate import generate_batches
    from fm9g.io.atomic import atomic_file

    if options.output and options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output}: exists; choose another --output, or add --overwrite")
    model = _open(options)
    # Records were trained on in the chat template, if there is one.
    chat = (
        options.chat
        or any(not isinstance(record.prompt, str) for record in records)
        or (options.data is not None and model.prompts.can_chat)
    )
    prompts = []
    for record in records:
        if chat:
            prompts.append(model.prompts.encode_chat(_messages(record.prompt, options.system), record.tools))
        else:
            prompts.append(model.prompts.encode_text(str(record.prompt)))
    answers = generate_batches(model, prompts, sampling, chat=chat, batch_size=options.batch_size)
    lines = [
        _answer(record, completion, model)
        for record, completions in zip(records, answers)
        for completion in completions
    ]
    if not options.output:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False, indent=2))
        return
    with atomic_file(options.output) as file:
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{options.output}: {len(lines)} answers")


def _answer(record: PromptRecord, completion: Any, model: LoadedModel) -> dict[str, Any]:
    """A line of the output."""
    line: dict[str, Any] = {"prompt": record.prompt, "answer": completion.text}
    if record.reference:
        line["reference"] = record.reference
    line |= {
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
    }
    if completion.index:
        line["index"] = completion.index
    if completion.logprobs:
        decode = model.prompts.tokenizer.decode
        line["logprobs"] = [
            {
                "token": decode([item.token_id]),
                "logprob": item.logprob,
                "top": [[decode([token]), logprob] for token, logprob in item.top],
            }
            for item in completion.logprobs
        ]
    return line


def _run_chat(options: argparse.Namespace) -> int:
    from fm9g.chat.model import LocalChatModel, OpenAIChatModel
    from fm9g.chat.terminal import run_chat

    if options.url:
        _refuse(options, ("dtype", "quantization", "device", "chat_template", "max_model_len"), "a model, not --url")
    else:
        _refuse(options, ("api_key",), "--url")
    if options.url:
        from fm9g.serve.auth import ENVIRONMENT

        if options.adapter:
            raise UserError("--adapter: the server at --url has adapters of its own; /adapter NAME chooses one")
        key = options.api_key or os.environ.get(ENVIRONMENT, "")
        names = [name for name in (options.model or "", options.compare) if name is not None]
        models: list[Any] = [OpenAIChatModel(options.url, key, name) for name in names]
        defaults: dict[str, Any] = {}
    else:
        opened = [_open(options)]
        if options.compare:
            opened.append(_open(options, options.compare, adapters=False))
        for model in opened:
            model.prompts.stop_ids(chat=True)  # a model without a chat template is refused before the first question
        models, defaults = [LocalChatModel(model) for model in opened], opened[0].sampling
    sampling = _sampling(options, {"temperature": 0.7, **defaults}, _CHAT_TOKENS)
    return run_chat(models, sampling, system=options.system, stream=not options.no_stream)


def _run_serve(options: argparse.Namespace) -> None:
    from fm9g.serve.auth import add_key, check_exposure, load_keys

    if options.new_api_key is not None:
        if not options.api_keys:
            raise UserError("--new_api_key: needs --api_keys FILE, to which the hash of the key is added")
        print(add_key(options.new_api_key, options.api_keys))
        return
    if not options.page:
        _refuse(options, ("system",), "--page")
    keys = load_keys(options.api_keys)
    check_exposure(options.host, keys)
    _require_serve_packages(options.page, options.backend)
    from fm9g.serve.app import create_app
    from fm9g.serve.limits import Limits
    from fm9g.serve.server import address_of, bind, serve

    limits = Limits(
        max_body_bytes=options.max_body_mb * 1_000_000,
        max_queue=options.max_queue,
        request_timeout=options.request_timeout,
        shutdown_timeout=options.shutdown_timeout,
    )
    if options.max_num_seqs < 1 or options.max_model_len < 0:
        raise UserError("--max_num_seqs and --max_model_len: expected positive numbers")
    given: dict[str, Any] = {name: getattr(options, name) for name in _SAMPLING if getattr(options, name) is not None}
    if options.stop:
        given["stop"] = tuple(options.stop)
    GenerationOptions(**given)  # a wrong value is said before the model is opened
    with bind(options.host, options.port) as listener:
        start = _start_vllm if options.backend == "vllm" else _start_engine
        backend, names, beginning = start(options, limits, given)
        app = create_app(backend, limits, keys)
        address = address_of(listener)
        if options.page:
            _add_page(app, options, address, bool(keys), beginning)

        def announce() -> None:
            page = f", and a page at {address}/page" if options.page else ""
            print(f"serving {', '.join(names)} at {address}/v1{page} (Ctrl-C stops)", flush=True)

        serve(app, listener, limits, announce)


def _start_engine(
    options: argparse.Namespace, limits: Limits, given: dict[str, Any]
) -> tuple[Backend, Sequence[str], dict[str, Any]]:
    """The embedded backend, the names of its models, and the sampling options that the page begins with."""
    from fm9g.infer.continuous import ContinuousEngine
    from fm9g.serve.app import engine_backend

    _refuse(options, _VLLM, "--backend vllm")
    model = _open(options)
    engine = ContinuousEngine(model, options.served_model_name, options.max_num_seqs, options.max_model_len)
    sampling = {**model.sampling, **given}
    room = {"max_new_tokens": min(_CHAT_TOKENS, engine.max_model_len // 2)}
    return engine_backend(engine, limits, sampling), engine.model_names, {**room, **sampling}


def _start_vllm(
    options: argparse.Namespace, limits: Limits, given: dict[str, Any]
) -> tuple[Backend, Sequence[str], dict[str, Any]]:
    """As `_start_engine`, with vLLM behind this server."""
    from fm9g.config.mixture import BUILTIN_TEMPLATES, TEMPLATE_FOLDER
    from fm9g.infer.adapters import is_adapter
    from fm9g.infer.open_model import locate, locate_base, short_name
    from fm9g.serve.export_cache import hf_folder_of, peft_folder_of
    from fm9g.serve.proxy import proxy_backend
    from fm9g.serve.vllm_process import VllmCommand, VllmProcess

    if options.device:
        raise UserError("--device: vLLM takes the GPUs that CUDA_VISIBLE_DEVICES names")
    if options.quantization == "int8":
        raise UserError("--quantization int8: vLLM has nf4 (bitsandbytes) alone; or use --backend transformers")
    if given:
        raise UserError("sampling options: with --backend vllm, requests say them; vLLM takes generation_config.json's")
    path, template = locate(_require_model(options))
    adapters = _adapters(options)
    if is_adapter(path):
        adapters = {short_name(options.model): path, **adapters}
        path, template = locate_base(path)
    template = options.chat_template or template
    folder = hf_folder_of(path)
    name = options.served_model_name or short_name(str(path))
    command = VllmCommand(
        options.vllm_executable or "vllm",
        folder,
        name,
        {adapter: peft_folder_of(locate(str(where))[0]) for adapter, where in adapters.items()},
        dtype=options.dtype or "auto",
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        chat_template=TEMPLATE_FOLDER / f"{template}.jinja" if template in BUILTIN_TEMPLATES else template or None,
        quantization="bitsandbytes" if options.quantization else "",
        tensor_parallel_size=options.tensor_parallel_size,
        gpu_memory_utilization=options.gpu_memory_utilization,
    )
    process = VllmProcess(command, Path(options.vllm_log))
    process.start()
    return (
        proxy_backend(process, limits, options.max_num_seqs),
        [name, *command.adapters],
        {"max_new_tokens": _CHAT_TOKENS},
    )


def _add_page(app: Any, options: argparse.Namespace, address: str, needs_key: bool, sampling: dict[str, Any]) -> None:
    from fm9g.serve.page.page import build_page, mount_page

    beginning = GenerationOptions(**{"temperature": 0.7, **sampling})
    page = build_page(
        f"{address}/v1", feedback=options.feedback, needs_key=needs_key, system=options.system, options=beginning
    )
    mount_page(app, page, "/page")


def _require_serve_packages(with_page: bool, backend: str) -> None:
    from importlib.util import find_spec

    names = ["fastapi", "uvicorn", "prometheus_client"]
    names += ["gradio", "openai"] if with_page else []
    names += ["httpx"] if backend == "vllm" else []
    missing = [name for name in names if not find_spec(name)]
    if missing:
        raise UserError(
            f"serve: the packages {', '.join(missing)} are missing; pip install 'fm9g[serve]' installs them"
        )


def _messages(prompt: str | list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    """A question or a conversation, with a system message before it unless it has one."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system and messages[0].get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _refuse(options: argparse.Namespace, names: Sequence[str], needed: str) -> None:
    """Raises UserError for an option that was given and would have no effect. needed: what it is for."""
    for name in names:
        if getattr(options, name):
            raise UserError(f"--{name}: needs {needed}")


def _require_model(options: argparse.Namespace) -> str:
    if not options.model:
        raise UserError(f"{options.command}: give a model: {_MODEL_HELP}")
    return str(options.model)


def _adapters(options: argparse.Namespace) -> dict[str, str | Path]:
    """Name -> path of the adapters that were given."""
    from fm9g.infer.open_model import short_name

    adapters: dict[str, str | Path] = {}
    for text in options.adapter:
        name, equals, adapter = text.rpartition("=")
        name = name if equals else short_name(adapter)
        if name in adapters:
            raise UserError(f"--adapter {text}: another one is called {name}, too; give NAME=PATH")
        adapters[name] = adapter
    return adapters


def _open(options: argparse.Namespace, path: str = "", adapters: bool = True) -> LoadedModel:
    """The model of a command, or another one, with the first of its adapters active.

    Args:
        adapters: whether it gets the adapters that were given.
    """
    from fm9g.infer.hf_folder import OpenOptions
    from fm9g.infer.open_model import open_model

    path = path or _require_model(options)
    opening = {
        field.name: getattr(options, field.name) for field in fields(OpenOptions) if getattr(options, field.name)
    }
    model = open_model(path, OpenOptions(**opening), _adapters(options) if adapters else {})
    if options.command != "serve" and options.max_model_len:
        model.max_model_len = min(model.max_model_len, options.max_model_len)
    return model


def _sampling(options: argparse.Namespace, defaults: dict[str, Any], max_new_tokens: int) -> GenerationOptions:
    """The options of a command. defaults: for those that were not given."""
    names = {field.name for field in fields(GenerationOptions)} - {"stop"}
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    values = {"max_new_tokens": max_new_tokens, **defaults, **given}
    sampling = GenerationOptions(**values, stop=tuple(options.stop or ()))
    if options.save_generation_config:
        _save_generation_config(options.save_generation_config, sampling)
    return sampling


def _save_generation_config(file: Path, sampling: GenerationOptions) -> None:
    from fm9g.io.atomic import atomic_file

    content: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    content |= {name: getattr(sampling, name) for name in names[: 1 if not sampling.temperature else None]}
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    logger.info(f"{file}: written")


def _translate(options: argparse.Namespace, verb: Verb) -> InferRequest | None:
    """The request that the words in another tool's spelling make; None: they are our own."""
    if not options.dialect:
        if options.rest:
            raise UserError(f"unknown arguments: {' '.join(options.rest)} (see fm9g {options.command} --help)")
        return None
    from fm9g.config.command_line import parse_words
    from fm9g.config.dialects.infer import translate_inference
    from fm9g.io.yaml_file import read_config_object
    from fm9g.shorthand.load import split_file

    file, words = split_file(list(options.rest))
    given: dict[str, Any] = dict(read_config_object(Path(file))) if file else {}
    given |= {key: " ".join(values) if values else "true" for key, values in parse_words(words).items()}
    return translate_inference(options.dialect, given, str(file or "command line"), verb)


# Options that are ours in any spelling: what to answer, and where the answers go. True: takes a value.
_OWN_WORDS = {"--from": True, "--prompt": True, "--prompts": True, "--output": True, "--overwrite": False}


def split_foreign_words(words: Sequence[str], own: dict[str, bool]) -> tuple[list[str], list[str]]:
    """Divides the words of a command with --from: those of our options, and those of the other tool."""
    ours: list[str] = []
    foreign: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name in own:
            ours += [word, *([next(rest, "")] if own[name] and not equals else [])]
        else:
            foreign.append(word)
    return ours, foreign


def _run_request(request: InferRequest, options: argparse.Namespace) -> int | None:
    """Runs what another tool's arguments ask for."""
    from fm9g.cli import build_parser

    for note in request.notes:
        logger.info(note)
    if api_key := request.options.get("api_key"):
        from fm9g.serve.auth import ENVIRONMENT

        os.environ[ENVIRONMENT] = api_key
    words = _words(request, options)
    logger.info(f"that is: fm9g {shlex.join(words)}")
    parsed = build_parser().parse_args(words)
    parsed.rest = []
    status: int | None = parsed.run(parsed)
    return _run_request(request.then, options) if request.then and not status else status


def _words(request: InferRequest, options: argparse.Namespace) -> list[str]:
    """The command of fm9g for a request."""
    from fm9g.infer.open_model import short_name

    values = dict(request.options)
    if request.verb == "merge":
        from fm9g.infer.adapters import base_of

        adapter = request.adapters[0]
        words = ["lora", "merge", request.model or base_of(Path(adapter)), adapter, str(values.pop("output"))]
    else:
        words = [request.verb, request.model]
        words += [word for adapter in request.adapters for word in ("--adapter", adapter)]
    for name in ("prompt", "prompts", "data", "output"):  # what to answer is said in our own words
        if (value := getattr(options, name, None)) is not None:
            values[name] = value
            if name in ("prompt", "prompts"):
                values.pop("data", None)
                values["chat"] = values.get("chat_template") != NO_TEMPLATE  # the other tools have no plain prompts
    if "data" not in values:
        values = {key: value for key, value in values.items() if key not in ("val_split", "split_seed", "sample")}
    if values.pop("save_generation_config", False):
        values["save_generation_config"] = f"{short_name(request.model)}-generation_config.json"
    if "max_num_seqs" in values and request.verb == "generate":
        values["batch_size"] = values.pop("max_num_seqs")
    values["no_stream"] = not values.pop("stream", True) and request.verb == "chat"
    for name in ("references", "api_key"):  # always shown; in the environment
        values.pop(name, None)
    for name, value in values.items():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each is not False and each != "":
                words += [f"--{name}"] if each is True else [f"--{name}", str(each)]
    return words
