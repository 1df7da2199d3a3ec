"""What `helios up` refuses before anything starts."""

import socket

import pytest

from helios.cli.up import check_port_free, listen_host
from helios.mesh.errors import AlreadyExists, InvalidRequest


def test_hosts_are_ip_addresses() -> None:
    assert [listen_host(text) for text in ("127.0.0.1", "::1", "[::1]")] == ["127.0.0.1", "[::1]", "[::1]"]


@pytest.mark.parametrize("text", ["localhost", "", "127.0.0.1:80", "1.2.3.4.5"])
def test_other_hosts_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--host takes an IP address"):
        listen_host(text)


def test_a_taken_port_says_which_flag_to_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(AlreadyExists, match=f"port {port} on 127.0.0.1 is taken.*--admin-port"):
            check_port_free("127.0.0.1", port, "--admin-port")
    check_port_free("127.0.0.1", port, "--admin-port")


def test_an_address_of_another_machine_is_not_a_taken_port() -> None:
    with pytest.raises(InvalidRequest, match=r"can't listen on 192\.0\.2\.1:8080"):
        check_port_free("192.0.2.1", 8080, "--port")
