"""vLLM behind our server: its command line, its deaths, and what passes through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from helpers.servers import running  # noqa: E402

from fm9g.errors import UserError  # noqa: E402
from fm9g.serve.app import create_app  # noqa: E402
from fm9g.serve.auth import ApiKeys  # noqa: E402
from fm9g.serve.limits import Limits  # noqa: E402
from fm9g.serve.proxy import proxy_backend  # noqa: E402
from fm9g.serve.vllm_process import Patience, VllmCommand, VllmProcess  # noqa: E402

FAKE = Path(__file__).resolve().parents[1] / "helpers" / "fake_vllm.py"
QUICK = Patience(poll=0.02, hang=3, healthy=60, first_delay=0.01, longest_delay=0.05, max_deaths=3, stop=5)


def wait_for(condition: Callable[[], object]) -> None:
    """Waits until a condition holds, at most 20 seconds."""
    pause = threading.Event()
    for _ in range(2000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen in 20 seconds")


@pytest.fixture
def process(tmp_path: Path) -> Iterator[VllmProcess]:
    process = VllmProcess(VllmCommand(str(FAKE), tmp_path / "hf", "mine"), tmp_path / "vllm.log", QUICK)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def address(process: VllmProcess) -> Iterator[str]:
    with running(create_app(proxy_backend(process, Limits()), Limits(), ApiKeys([]))) as url:
        yield url


def post(address: str, **body: object) -> httpx.Response:
    return httpx.post(f"{address}/v1/completions", json=body, timeout=20)


def test_the_command_line_has_what_our_folders_need(tmp_path: Path) -> None:
    for name, rank in (("a", 4), ("b", 33)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    adapters = {"a": tmp_path / "a", "b": tmp_path / "b"}
    command = VllmCommand(str(FAKE), tmp_path, "mine", adapters, "bf16", 512, 8, tmp_path / "t.jinja", "bitsandbytes")
    expected = f"serve {tmp_path} --served-model-name mine --dtype bfloat16 --host 127.0.0.1 --port 99"
    more = f"--max-model-len 512 --max-num-seqs 8 --chat-template {tmp_path}/t.jinja --quantization bitsandbytes"
    loras = f"--enable-lora --max-lora-rank 64 --lora-modules a={tmp_path}/a b={tmp_path}/b"
    assert command.words(99)[1:] == f"{expected} {more} {loras}".split()
    python = VllmCommand(sys.executable, tmp_path, "mine").words(99)
    assert python[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    with pytest.raises(UserError, match=r"--vllm_executable none: no such program. vLLM needs an environment"):
        VllmCommand("none", tmp_path, "mine").words(1)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"r": 1000}))
    with pytest.raises(UserError, match="adapter of rank 1000"):
        command.words(99)


def test_an_early_death_is_one_message_with_the_decisive_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "die")
    process = VllmProcess(VllmCommand(str(FAKE), tmp_path, "mine"), tmp_path / "vllm.log", QUICK)
    with pytest.raises(UserError, match="vLLM ended with status 1: ValueError: the architecture Own") as caught:
        process.start()
    assert "INFO" not in str(caught.value)


def test_requests_and_metrics_pass_through_with_its_own_key(address: str) -> None:
    (model,) = httpx.get(f"{address}/v1/models").json()["data"]
    assert model["words"][0] == "serve"
    answer = post(address, prompt="a", beam=3)
    assert answer.json()["got"] == {"prompt": "a", "beam": 3}
    text = httpx.get(f"{address}/metrics").text
    assert "vllm:requests 7" in text
    assert 'fm9g_requests_total{path="/v1/completions",status="200"} 1.0' in text
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_client_that_leaves_ends_the_request_of_vllm(address: str, tmp_path: Path) -> None:
    with httpx.stream("POST", f"{address}/v1/completions", json={"prompt": "a", "stream": True}) as answer:
        assert next(answer.iter_lines()) == "data: 0"
    wait_for(lambda: "the client left" in (tmp_path / "vllm.log").read_text())
    wait_for(lambda: "fm9g_running 0.0" in httpx.get(f"{address}/metrics").text)


@pytest.mark.parametrize("prompt", ["die", "hang"])
def test_it_is_started_again_when_it_dies_or_hangs(address: str, process: VllmProcess, prompt: str) -> None:
    first = post(address, prompt="a").json()["pid"]
    post(address, prompt=prompt)
    if prompt == "die":
        refused = post(address, prompt="a")
        if refused.status_code != 200:  # unless it runs again already
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "5"
    wait_for(lambda: (answer := post(address, prompt="a")).status_code == 200 and answer.json()["pid"] != first)
    assert httpx.get(f"{address}/health").status_code == 200
    assert not process.failure


def test_it_is_given_up_after_several_deaths_in_a_row(
    address: str, process: VllmProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "die")
    post(address, prompt="die")
    wait_for(lambda: process.failure)
    assert "vLLM ended with status 1, 3 times in a row: ValueError" in process.failure
    answer = httpx.get(f"{address}/health")
    assert (answer.status_code, "3 times in a row" in answer.json()["status"]) == (503, True)


def test_it_dies_with_us_however_we_die(tmp_path: Path) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(Path.cwd())!r})
from pathlib import Path
from fm9g.serve.vllm_process import Patience, VllmCommand, VllmProcess
command = VllmCommand({str(FAKE)!r}, Path("x"), "mine")
process = VllmProcess(command, Path({str(tmp_path / "log")!r}), Patience(poll=0.02))
process.start()
print(process._process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes())


@pytest.mark.slow
@pytest.mark.skipif("FM9G_TEST_VLLM" not in os.environ, reason="FM9G_TEST_VLLM names no vLLM")
@pytest.mark.parametrize("kind", ["qwen2", "llama", "granite"])
def test_real_vllm_says_what_transformers_says(kind: str, tmp_path: Path, tokenizer_path: Path) -> None:
    import shutil

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from fm9g.infer.generate import generate_batches
    from fm9g.infer.open_model import open_model
    from fm9g.infer.options import GenerationOptions

    torch.manual_seed(0)
    folder, adapter = tmp_path / "hf", tmp_path / "adapter"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=320, num_key_value_heads=1, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
        initializer_range=0.3, pad_token_id=None, **sizes,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    shutil.copytree(tokenizer_path, folder)
    model.save_pretrained(folder)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    lora.save_pretrained(adapter)
    command = VllmCommand(
        os.environ["FM9G_TEST_VLLM"], folder, "base", {"adapter": adapter}, dtype="fp32", max_num_seqs=4
    )
    process = VllmProcess(command, tmp_path / "vllm.log")
    process.start()
    try:
        with running(create_app(proxy_backend(process, Limits()), Limits(), ApiKeys([]))) as address:
            ours = open_model(folder, adapters={"adapter": adapter})
            for name in ("base", "adapter"):
                ours.use_adapter("" if name == "base" else name)
                for text in ("the quick", "seven wizards", "fox"):
                    ids = ours.prompts.encode_text(text)
                    ((answer,),) = generate_batches(ours, [ids], GenerationOptions(max_new_tokens=24))
                    # Texts of random tokens end in half characters, which vLLM leaves out; so tokens are compared.
                    asked = {"model": name, "prompt": ids, "max_tokens": 24, "temperature": 0, "logprobs": 0}
                    (choice,) = post(address, **asked, return_tokens_as_token_ids=True).json()["choices"]
                    tokens = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
                    assert tokens == list(answer.token_ids), (name, text)
    finally:
        process.stop()
