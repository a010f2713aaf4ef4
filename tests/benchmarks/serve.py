"""Tokens per second of `align serve` with several clients, beside its engine offline. For a person to run.

    python -m tests.benchmarks.serve POLICY CLIPS [--engine transformers|vllm] [--clients 16] [--seconds 60]

Every client asks a question about a clip again and again, streamed, with OpenAI's client, in a process of its
own beside the server. Offline, the engine completes the same requests in this process in batches of as many;
vLLM is not run offline. On few cores, clients and server share them: the share of the server's is printed.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI

from align.generation.engine import Decoding, Request
from tests.align.serving.server_process import clip, serving, text, user

QUESTION = "Is the tone high or low?"


def ask(url: str, key: str, clips: list[Path], arguments: argparse.Namespace, result: Any) -> None:
    """A client: how many answers it got, and how many failed."""
    client = OpenAI(base_url=url, api_key=key, max_retries=0)
    deadline, done, failed = time.monotonic() + arguments.seconds, 0, 0
    for path in itertools.cycle(clips):
        if time.monotonic() > deadline:
            break
        try:
            options: Any = {"temperature": arguments.temperature, "max_tokens": arguments.tokens}
            messages: Any = [user(clip(path), text(QUESTION))]
            for _ in client.chat.completions.create(
                model="policy", messages=messages, seed=done, stream=True, **options
            ):
                pass
            done += 1
        except Exception:
            failed += 1
    result.put((done, failed))


def served(arguments: argparse.Namespace, clips: list[Path]) -> None:
    """Print what the server did."""
    with serving(arguments.policy, "--engine", arguments.engine) as server:
        result: Any = multiprocessing.Queue()
        words = (server.url, server.key, clips, arguments, result)
        clients = [multiprocessing.Process(target=ask, args=words) for _ in range(arguments.clients)]
        used = _processor_seconds(server.family())
        started = time.monotonic()
        for client in clients:
            client.start()
        counts = [result.get() for _ in clients]
        wall = time.monotonic() - started
        used = _processor_seconds(server.family()) - used
        done, failed = (sum(column) for column in zip(*counts, strict=True))
        tokens = server.metric("align_completion_tokens_total")
        statuses = [line for line in httpx.get(f"{server.root}/metrics").text.split("\n") if "chat" in line]
    print(f"served: {tokens / wall:.0f} tokens/s, {done / wall:.1f} answers/s, {failed} failed, {wall:.0f} s")
    print(f"  {tokens / used:.0f} tokens per processor second of the server's, {used / wall:.2f} processors")
    print("  " + "; ".join(statuses))


def offline(arguments: argparse.Namespace, clips: list[Path]) -> None:
    """Print what the engine does in this process."""
    from align.generation.transformers_engine import TransformersEngine
    from align.models.features import ClipFeatures
    from align.models.qwen2_audio.model import load_processor

    engine = TransformersEngine(
        arguments.policy, ClipFeatures(load_processor(arguments.policy), arguments.clips)
    )
    names = itertools.cycle(path.name for path in clips)
    decoding = Decoding(arguments.tokens, arguments.temperature)
    tokens, started, used = 0, time.monotonic(), time.process_time()
    for number in itertools.count(step=arguments.clients):
        batch = {number + i: Request(QUESTION, (next(names),)) for i in range(arguments.clients)}
        tokens += sum(len(group[0].token_ids) for _, group in engine.complete(batch, decoding, 0))
        if time.monotonic() - started > arguments.seconds / 3:
            break
    wall, used = time.monotonic() - started, time.process_time() - used
    print(f"offline: {tokens / wall:.0f} tokens/s, {tokens / used:.0f} per processor second, {wall:.0f} s")


def _processor_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("policy", type=Path)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=64, help="limit of an answer")
    parser.add_argument("--temperature", type=float, default=2.0, help="high, so that answers are long")
    arguments = parser.parse_args()
    clips = sorted(arguments.clips.glob("*.wav"))
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    served(arguments, clips)
    if arguments.engine == "transformers":
        offline(arguments, clips)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
