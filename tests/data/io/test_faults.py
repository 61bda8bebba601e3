"""What may pass is tried again; a mistake, a bug and a wrong address are told at once."""

from __future__ import annotations

import contextlib
import ftplib
import socket
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data.errors import DataError
from data.io import retry as patience
from data.io import transport
from data.io.faults import ClientError, client_errors, is_lasting
from data.io.remote import read_all
from data.io.retry import give_up_on, persistently
from data.shards.batch import Batch
from data.shards.manifest import Manifest
from data.shards.stream import LatentStream
from tests.helpers.batches import assert_equal, order_of
from tests.helpers.servers import Server


class TokenError(Exception):
    """As the clients of S3 and others raise: of no kind that Python knows."""


def batches_of(manifest: Manifest) -> list[Batch]:
    return list(LatentStream(manifest, order_of(manifest), num_steps=8))


def in_memory(manifest: Manifest, name: str, monkeypatch: pytest.MonkeyPatch, errors: Any) -> Manifest:
    """The folder in fsspec's memory, whose files cannot be opened where `errors` gives an error."""
    memory = fsspec.filesystem("memory")
    memory.put(str(manifest.folder), f"/bucket/{name}", recursive=True)
    far = Manifest.load(f"memory://bucket/{name}")
    opened = memory.open

    def fails(self: Any, *arguments: Any, **more: Any) -> Any:
        error = next(errors)
        if error is not None:
            raise error
        return opened(*arguments, **more)

    monkeypatch.setattr(type(memory), "open", fails)
    return far


def test_errors_of_a_client_s_own_are_tried_again(
    manifest: Manifest, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    far = in_memory(manifest, "failing", monkeypatch, iter([TokenError("has expired"), None] * 100))
    assert_equal(batches_of(far), batches_of(manifest))


def test_errors_of_a_client_s_own_end_it_after_two_minutes(
    manifest: Manifest, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    far = in_memory(manifest, "failed", monkeypatch, iter([TokenError("has expired")] * 100))
    with pytest.raises(DataError, match=r"cannot be read \(TokenError: has expired\)"):
        batches_of(far)
    assert sum(waits[-7:]) == 120


@pytest.mark.parametrize("error", [TypeError("an argument"), AttributeError("none"), RuntimeError("no loop")])
def test_a_bug_is_raised_as_it_is(
    manifest: Manifest, waits: list[float], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    far = in_memory(manifest, type(error).__name__, monkeypatch, iter([error] * 100))
    with pytest.raises(type(error), match=str(error)):
        batches_of(far)
    assert not waits


def test_a_wrong_configuration_is_told_at_once(waits: list[float]) -> None:
    """By the client's own error, which is none of Python's kinds."""

    def no_credentials() -> None:
        with client_errors():
            raise type("NoCredentialsError", (Exception,), {})("Unable to locate credentials")

    with pytest.raises(DataError, match=r"^s3://b/x: cannot be read \(NoCredentialsError: Unable to locate"):
        persistently("s3://b/x", no_credentials)
    assert not waits


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_what_a_server_refuses_is_refused(server: Server, waits: list[float], code: int) -> None:
    server.failures, server.failure = 100, code
    with pytest.raises(DataError, match=rf"cannot be read \(HTTP {code} .*\); check"):
        read_all(f"{server.url}/manifest.json")
    assert not waits and server.failures == 99


@pytest.mark.parametrize(
    ("code", "lasting"), [(400, True), (403, True), (408, False), (429, False), (501, True), (503, False)]
)
def test_other_clients_carry_the_status_elsewhere(code: int, lasting: bool) -> None:
    for about in (
        {"code": code},
        {"status": code},
        {"status_code": code},
        {"response": {"ResponseMetadata": {"HTTPStatusCode": code}}},
    ):
        error = ClientError("refused")
        error.__cause__ = type("Refused", (Exception,), about)()
        assert is_lasting(error) == lasting, about


@pytest.mark.parametrize(("error", "lasting"), [(ftplib.error_perm("550 no"), True), (ftplib.error_temp("421"), False)])
def test_ftp_tells_what_lasts(error: ftplib.Error, lasting: bool) -> None:
    with pytest.raises(ClientError) as caught, client_errors():
        raise error
    assert is_lasting(caught.value) == lasting


def test_a_time_out_among_s3_s_400s_may_pass() -> None:
    error = TimeoutError("Your socket connection to the server was not read from")
    error.__cause__ = type("Refused", (Exception,), {"response": {"ResponseMetadata": {"HTTPStatusCode": 400}}})()
    assert not is_lasting(error)


def test_nobody_at_a_port_is_believed_until_somebody_was_there(
    manifest: Manifest, server: Server, waits: list[float]
) -> None:
    """A server that has answered may be starting anew."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/manifest.json"
    with pytest.raises(DataError, match=rf"^{url}: cannot be read \(.*refused\); check that it can be reached$"):
        Manifest.load(f"http://127.0.0.1:{port}")
    assert not waits
    with pytest.raises(DataError, match=r"cannot be read \(.*not known"):
        read_all("http://nobody.invalid/x")
    assert not waits
    patience.answered.add(f"http127.0.0.1:{port}")
    with pytest.raises(DataError, match="refused"):
        read_all(url)
    assert sum(waits) == 120
    read_all(f"{server.url}/manifest.json")
    assert f"http127.0.0.1:{server.url.rpartition(':')[2]}" in patience.answered


@pytest.mark.parametrize("address", ["http://127.0.0.1:x/y", "http://127.0.0.1/a\tb\x00"])
def test_what_is_no_address_is_told_at_once(waits: list[float], address: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_all(address)
    assert not waits


def test_blanks_and_letters_of_a_url(manifest: Manifest, server: Server) -> None:
    (manifest.folder / "mit Blank ä%.json").write_bytes(b"{}")
    assert read_all(f"{server.url}/mit Blank ä%25.json") == b"{}"


@pytest.mark.parametrize(
    ("command", "said", "expected"),
    [
        ("nosuch-command {}", r"the command exited with 127: .*nosuch-command: not found", []),
        ("./locked {}", r"the command exited with 126: .*Permission denied", []),
        ("echo no such bucket >&2; exit 3 # {}", r"the command exited with 3: no such bucket", [1]),
        ("exit 3 # {}", r"the command exited with 3", [1]),
    ],
)
def test_a_command_that_fails_in_the_same_way_is_a_mistake(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch, command: str, said: str, expected: list[float]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("locked").write_text("#!/bin/sh\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"manifest.json: cannot be read \({said}\); check"):
        Manifest.load(f"pipe:{command}")
    assert waits == expected


def test_a_command_that_may_work_later_is_tried_again(tmp_path: Path, waits: list[float]) -> None:
    """Its words differ, or it has given bytes before."""
    tries = tmp_path / "tries"
    counted = f"echo x >> {tries}; [ $(wc -l < {tries}) -gt 4 ] && echo done || (echo $(wc -l < {tries}) >&2; exit 1)"
    assert read_all(f"pipe:{counted}") == b"done\n"
    assert waits == [1, 2, 4, 8]
    tries.unlink()
    cut = f"echo x >> {tries}; echo half; [ $(wc -l < {tries}) -gt 3 ]"
    assert read_all(f"pipe:{cut}") == b"half\n"


@pytest.mark.parametrize("command", ["sleep 20 & wait", "sleep 20 & true", "printf x; exec >&-; sleep 20 & wait"])
def test_a_silent_command_is_ended_when_it_is_no_longer_wanted(tmp_path: Path, command: str) -> None:
    """With all that it started."""
    number, unwanted, errors = tmp_path / "number", threading.Event(), []

    def reads() -> None:
        give_up_on(unwanted)
        try:
            read_all(f"pipe:echo $$ > {number}; {command}")
        except DataError as error:
            errors.append(str(error))

    thread = threading.Thread(target=reads, daemon=True)
    thread.start()
    wait_until(lambda: number.exists() and number.read_text(encoding="utf-8"))
    unwanted.set()
    thread.join(10)
    assert len(errors) == 1 and errors[0].endswith("is no longer wanted")
    wait_until(lambda: not is_running(int(number.read_text(encoding="utf-8"))))


def wait_until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(group: int) -> bool:
    """Whether a process of the group lives; one that has ended may wait long for its parent."""
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, number = path.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
            states += [state] if int(number) == group else []
    return any(state != "Z" for state in states)


def test_a_command_without_a_byte_is_tried_again(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TIMEOUT", 0.1)
    tries = tmp_path / "tries"
    assert read_all(f"pipe:echo x >> {tries}; [ $(wc -l < {tries}) -gt 1 ] && echo done || sleep 20") == b"done\n"
    assert waits == [1]


def test_the_status_of_odd_clients_is_no_number() -> None:
    """What a client keeps under these names may be anything."""
    error = ClientError("odd")
    error.__cause__ = type("Odd", (Exception,), {"status": "gone", "response": types.SimpleNamespace()})()
    assert not is_lasting(error)
