"""A vLLM server of one policy, in an environment of its own, for this process alone.

It listens on a UNIX socket in a folder that only we can enter: vLLM's own key guards /v1 alone, and the
endpoints that change weights lie beside it. vLLM 0.32 wants an older transformers than ours, so it can never
share our environment; on a CPU it takes our torch, because its own is a gigabyte of CUDA.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import torch

from align.models.qwen2_audio.model import CHAT_TEMPLATE
from align.run_folder.artifacts import read_json
from align.run_folder.server_environment import LOCKED, ServerEnvironment, own_variables

_HERE = Path(__file__).parent
_STARTS_WITHIN_S = 600.0
_STOPS_WITHIN_S = 10.0
_LONGEST_CONTEXT = 8192
"""Tokens. vLLM sets memory aside for one request of this length."""
_MAX_CLIPS = 8
"""Per request. vLLM computes so many at once when it measures its memory."""
_PLAIN = (  # a text that is continued as it stands: its <|AUDIO|> are its clips
    "{% if messages[0]['role'] == 'plain' %}"
    "{% for part in messages[0]['content'] %}{{ part['text'] if part['type'] == 'text' }}{% endfor %}"
    "{% else %}"
)
_LEAST_SHARE = 0.1
"""Of a GPU's memory, what a server beside a training must have."""
_CUDA_SHARE = 0.05
"""Of a GPU's memory, what two processes' CUDA contexts and kernels take beside what each counts."""
_CPU_HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""`get_supported_head_sizes` in vLLM 0.32's `v1/attention/backends/cpu_attn.py`."""
_CPU_FLAGS = {
    "--dtype": "float32",
    "--block-size": "32",  # the default, 128, is longer than most prompts: nothing would be shared
    "--kv-cache-memory-bytes": str(256 << 20),
    "--enforce-eager": None,
    "--no-enable-chunked-prefill": None,  # vLLM 0.32: a seeded request in chunks ends the engine
}
_CPU_VARIABLES = {
    "TORCH_COMPILE_DISABLE": "1",  # else the first log-probability costs half a minute of g++
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it pins itself to core 0, whoever is there
}


def environment() -> ServerEnvironment:
    """The environment for this machine: locked and with our torch on a CPU, vLLM's own choice on GPUs."""
    on_gpu = torch.cuda.is_available()
    lock = _HERE / ("requirements-cuda.txt" if on_gpu else "requirements.lock")
    return ServerEnvironment(
        name="vllm",
        server="the vLLM engine",
        install_command="align engine install",
        costs="several minutes, 10 GB" if on_gpu else "about two minutes, 1.7 GB",
        variable="ALIGN_VLLM_ENV",
        lock_file=lock,
        pip_options=() if on_gpu else LOCKED,
        proof="import vllm.entrypoints.openai.api_server, vllm.v1.engine.core, vllm.v1.worker.cpu_worker"
        if not on_gpu
        else "import vllm.entrypoints.openai.api_server",
        pythons=((3, 11), (3, 13) if on_gpu else (3, 11)),
        borrows=() if on_gpu else (_site_packages(),),
        proof_variables={"HOME": "{scratch}", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )


def _site_packages() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


class ServerFailed(RuntimeError):
    """The server is not installed, did not start, died or refused; the message says why."""


def missing() -> str | None:
    """What vLLM lacks on this machine and how to get it; None if nothing."""
    own = environment()
    if not own.is_ready:
        return f"vLLM is not in {own.location}. Run: {own.install_command}"
    if find_library("numa") is None:
        return "vLLM needs libnuma. Run: apt-get install libnuma1"
    return None


def training_problem(training_gb: float | None) -> str | None:
    """Why vLLM cannot complete for a training that uses so much of a GPU's memory; None if it can."""
    if not torch.cuda.is_available():
        return None
    if training_gb is None:
        return (
            "on a GPU the training and vLLM share its memory: say how much of it the training may use, "
            "hardware: {memory_gb: ...}; the server takes the rest. Or say engine: transformers"
        )
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if (share := share_left(total, training_gb)) < _LEAST_SHARE:
        return (
            f"hardware.memory_gb {training_gb:g} leaves vLLM {max(0, share):.0%} of the GPU's "
            f"{total / 1e9:.0f} GB, and it needs {_LEAST_SHARE:.0%} or more: lower memory_gb, or say "
            "engine: transformers"
        )
    return None


def share_left(total: int, training_gb: float) -> float:
    """What of a GPU's bytes a server may take beside a training, but for what CUDA takes twice."""
    return 1 - training_gb * 1e9 / total - _CUDA_SHARE


def memory_of_others_gb(n_servers: int) -> float | None:
    """What the others of `n_servers` use of the GPU that they share equally; None without one, or others."""
    if n_servers == 1 or not torch.cuda.is_available():
        return None
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return (1 - 1 / n_servers) * total / 1e9


def width_problem(head_width: int) -> str | None:
    """Why the language model's attention heads are too narrow or too wide for vLLM here; None if not."""
    if torch.cuda.is_available() or head_width in _CPU_HEAD_WIDTHS:
        return None
    widths = ", ".join(map(str, _CPU_HEAD_WIDTHS))
    return f"attention heads {head_width} wide: on a CPU vLLM takes {widths}"


class Server:
    """Starts where it is made, ends with `stop` or with this process, however that ends.

    Args:
        policy: folder of a saved model, or a Hub id.
        longest: tokens of a prompt and its completion; by default what the model takes, at most 8,192.
        training_gb: of this process' GPU, what a training in this process, or other servers, use; None:
            there are none.

    Raises:
        ServerFailed: vLLM is not installed or did not start; the message has the end of its log.
    """

    def __init__(
        self, policy: Path | str, *, longest: int | None = None, training_gb: float | None = None
    ) -> None:
        if problem := missing() or _width_problem_of(policy):
            raise ServerFailed(problem)
        self._home = Path(tempfile.mkdtemp(prefix="vllm-"))  # a socket's path must be short (107 bytes)
        self.socket, self._log = self._home / "vllm.sock", self._home / "vllm.log"
        (self._home / "template.jinja").write_text(_PLAIN + CHAT_TEMPLATE + "{% endif %}")
        command = self._command(environment().python, policy, longest or longest_context(policy))
        self._process = self._start([*command, *_memory_flags(training_gb)])
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _command(self, python: Path, policy: Path | str, longest: int) -> list[str]:
        on_gpu = torch.cuda.is_available()
        options = {
            "--model": str(policy),
            "--served-model-name": "policy",
            "--uds": str(self.socket),
            "--chat-template": str(self._home / "template.jinja"),
            "--chat-template-content-format": "openai",
            "--generation-config": "vllm",  # nothing of generation_config.json that the request does not say
            "--max-model-len": str(longest),
            "--limit-mm-per-prompt": json.dumps({"audio": _MAX_CLIPS}),
            "--media-io-kwargs": json.dumps({"audio": {"audio_backend": "soundfile"}}),  # as training decodes
            **({} if on_gpu else _CPU_FLAGS),
        }
        words = [word for key, value in options.items() for word in (key, value) if word is not None]
        # `vllm serve` does not run where the package is called vllm-cpu: it looks for its own version.
        return [str(python), "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", *words]

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        environ = {
            **own_variables(),
            "PYTHONPATH": str(_HERE / "plugin"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc, /pause, /reset_prefix_cache
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",  # 5 s would close connections that wait for our decoding
            **(_own_gpu() if torch.cuda.is_available() else _CPU_VARIABLES),
        }
        with self._log.open("wb") as log:
            return subprocess.Popen(
                command,
                env=environ,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + _STARTS_WITHIN_S
        with self.client() as client:
            while time.monotonic() < deadline:
                self.check()
                with suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        return
                time.sleep(0.2)
        raise ServerFailed(f"vLLM did not answer within {_STARTS_WITHIN_S:g} s: {self._tail()}")

    @property
    def pid(self) -> int:
        """Of the server's process, which leads a group of its own."""
        return self._process.pid

    def check(self) -> None:
        """Raise if it has died.

        Raises:
            ServerFailed: with the end of its log.
        """
        if (code := self._process.poll()) is not None:
            raise ServerFailed(f"vLLM has ended (exit code {code}): {self._tail()}")

    def client(self) -> httpx.Client:
        """For its plain endpoints."""
        transport = httpx.HTTPTransport(uds=str(self.socket))
        return httpx.Client(transport=transport, base_url="http://vllm", timeout=_STARTS_WITHIN_S)

    def load(self, policy: Path) -> None:
        """Serve other weights of the same shape; waits for what is in flight, drops caches of the old ones.

        Raises:
            FileNotFoundError: there is nothing to load; vLLM would not survive trying.
            ServerFailed: the server refused.
        """
        if not (policy / "config.json").is_file() or not list(policy.glob("*.safetensors")):
            raise FileNotFoundError(f"{policy} holds no saved policy")
        weights = {"method": "reload_weights", "kwargs": {"weights_path": str(policy.resolve())}}
        with self.client() as client:
            for path, body in (
                ("/pause?mode=wait", None),
                ("/collective_rpc", weights),
                ("/reset_prefix_cache", None),
                ("/reset_encoder_cache", None),
                ("/resume", None),
            ):
                answer = client.post(path, json=body)
                if answer.status_code != 200:
                    raise ServerFailed(f"vLLM, {path}: {answer.text[:300]}")

    def stop(self) -> None:
        """End it and its workers."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signum)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOPS_WITHIN_S)
        shutil.rmtree(self._home, ignore_errors=True)

    def _tail(self) -> str:
        """The end of its log, without the tensors that it dumps."""
        lines = self._log.read_text(errors="replace").split("\n")
        return "\n".join(line[:300] for line in lines if "dump_input" not in line)[-3000:]


def _end_with_parent() -> None:
    """On Linux: a SIGTERM when the thread that started us ends, however it does."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _memory_flags(training_gb: float | None) -> list[str]:
    """The share of this process' GPU that a server takes beside a training."""
    if training_gb is None or not torch.cuda.is_available():
        return []
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return ["--gpu-memory-utilization", f"{share_left(total, training_gb):.3f}"]


def _own_gpu() -> dict[str, str]:
    """Shows a server the GPU of this process alone, by its name among those that the process may see."""
    number, visible = torch.cuda.current_device(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[number] if visible else str(number)}


def _text_config(policy: Path | str) -> dict[str, Any]:
    """What config.json says of the language model; nothing of a model on the Hub."""
    if not isinstance(policy, Path):
        return {}
    config: dict[str, Any] = read_json(policy / "config.json").get("text_config", {})
    return config


def longest_context(policy: Path | str) -> int:
    """Tokens of a prompt and its completion that a server takes by itself: the model's, at most 8,192."""
    return min(_LONGEST_CONTEXT, _text_config(policy).get("max_position_embeddings", _LONGEST_CONTEXT))


def _width_problem_of(policy: Path | str) -> str | None:
    text = _text_config(policy)
    if not {"hidden_size", "num_attention_heads"} <= text.keys():  # the released 7B's, heads 128 wide
        return None
    problem = width_problem(text["hidden_size"] // text["num_attention_heads"])
    return f"{policy} has {problem}" if problem else None
