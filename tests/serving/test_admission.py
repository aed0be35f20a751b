"""rspd/serving/admission.py: what comes before dialling; none of it where nobody asks for it."""

from __future__ import annotations

from typing import Any

import pytest

from rspd.engine.loop import Loop
from rspd.net.networks import parse_network
from rspd.net.ways import Ways
from rspd.serving.access import Access, Refusals
from rspd.serving.admission import steps
from rspd.settings import ProxyConfig

ONE = (parse_network("192.0.2.1"),)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, []),
        ({"idle_timeout": 1.0, "send_proxy": "v2"}, []),
        ({"deny": ONE}, ["admit"]),
        ({"allow": ONE, "max_connections_per_client": 2}, ["admit"]),
        ({"accept_proxy": ONE}, ["hear_peer", "admit"]),
        ({"accept_proxy": ONE, "deny": ONE}, ["hear_peer", "admit"]),
    ],
)
@pytest.mark.parametrize("might_return", [False, True])
def test_a_proxy_has_the_steps_that_its_keys_need_and_no_other(
    keys: dict[str, Any], names: list[str], might_return: bool
) -> None:
    config = ProxyConfig((), (), **keys)
    access = Access(config.allow, config.deny, config.max_connections_per_client)
    with Loop() as loop:
        ways = Ways(loop)
        ways.needed = might_return
        found = [step.func.__name__ for step in steps(config, ways, access, Refusals(loop, ""))]  # type: ignore[attr-defined]
    assert found == ["find_way"] * might_return + names
