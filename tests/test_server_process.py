"""How a process of `ebbtide serve` begins and ends."""

from __future__ import annotations

import signal
import socket
import subprocess

import pytest
from server_process import KEY, PATIENCE_S, command, environment, serving


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_answer_with_an_error_event(tmp_path, signum, code):
    with serving(tmp_path) as server:
        stream = iter(server.stream("Say something.", max_tokens=20000))
        next(stream)
        server.process.send_signal(signum)
        *_, last = stream
        assert last["error"]["code"] == "stopping"
        assert server.end() == (code, "")


def test_a_port_in_use_and_an_open_door_are_usage_errors(tmp_path):
    def fails(*args, key=KEY):
        variables = environment(tmp_path) | {"EBBTIDE_API_KEY": key}
        variables = {k: v for k, v in variables.items() if v}
        found = subprocess.run(
            command(*args), capture_output=True, env=variables, timeout=PATIENCE_S
        )
        assert (found.returncode, found.stdout) == (2, b"")
        assert KEY.encode() not in found.stderr
        return found.stderr.decode()

    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "--port" in fails("--port", str(other.getsockname()[1]))
    assert "--api-key" in fails("--host", "0.0.0.0", "--port", "0", key="")
    assert "--api-key" in fails("--cors-origin", "*", key="")
