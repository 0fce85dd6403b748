"""`loragen-agents serve` as a process: it says where it serves, answers, and stops when it is told to."""

import json
import os
import signal
import subprocess
import sys
import time

import httpx

from tests.tiny_chat import tiny_generator, tiny_language_model

HELLO = {"model": "edge", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


def test_it_serves_and_stops(tmp_path):
    edge = tiny_language_model(tmp_path / "edge")
    tiny_generator(edge).save(tmp_path / "generator")
    command = [sys.executable, "-m", "loragen_agents", "serve", "--port", "0", "--device", "cpu", "--json"]
    models = ["--model", str(tmp_path / "edge"), "--generator", str(tmp_path / "generator")]
    process = subprocess.Popen(
        [*command, *models],
        env={**os.environ, "LORAGEN_AGENTS_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = "".join(process.stdout.readline() for _ in range(4))
        url = json.loads(said)["url"]
        deadline = time.monotonic() + 200
        while httpx.get(url.removesuffix("/v1") + "/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert httpx.post(f"{url}/chat/completions", json=HELLO, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        out, complaints = process.communicate(timeout=60)
        assert (process.returncode, out, complaints) == (0, "", "")
    finally:
        process.kill()
