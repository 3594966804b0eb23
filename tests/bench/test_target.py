"""A server to be measured: which of its models, and one line where it cannot be."""

import socket

import pytest
from benchmarks.harness import ServerFailed, served_id
from tests.api.house import MODEL, PLAIN_MODEL, House


def test_the_first_model_is_measured_unless_another_is_named() -> None:
    house = House()
    with house.listening() as address:
        assert served_id(f"{address}/v1", house.key) == MODEL
        assert served_id(f"{address}/v1", house.key, PLAIN_MODEL) == PLAIN_MODEL
        with pytest.raises(ServerFailed, match=f"serves {MODEL}, {PLAIN_MODEL}, and not gpt"):
            served_id(f"{address}/v1", house.key, "gpt")
        with pytest.raises(ServerFailed, match="refuses this key; give another with --key"):
            served_id(f"{address}/v1", "tv_wrong")
        with pytest.raises(ServerFailed, match="answered 404"):
            served_id(f"{address}/v2", house.key)
    house.close()


def test_an_address_where_nobody_listens_is_one_line() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(ServerFailed, match=f"no server of ours answers at .*:{port}/v1") as said:
        served_id(f"http://127.0.0.1:{port}/v1", None)
    assert "\n" not in str(said.value)
