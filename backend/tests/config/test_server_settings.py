"""Settings of the server: which proxies can be trusted where."""

from __future__ import annotations

import pytest

from src.config.settings import load_settings
from src.errors import ConfigurationError

WIDE = [
    "0.0.0.0/0",
    "::/0",
    "10.0.0.1,0.0.0.0/1",
    "2000::/3",
    "::ffff:0:0/96",
    "::ffff:0.0.0.0/97",
    "1.2.3.4/0",
]
PRIVATE = [
    "10.0.0.0/8",
    "fc00::/7",
    "172.16.0.0/12,192.168.0.0/16",
    "::1",
    "::ffff:10.0.0.0/104",
    "100.64.0.0/10",
]


@pytest.mark.parametrize("networks", WIDE)
@pytest.mark.parametrize("environment", ["production", "test"])
def test_trusting_the_internet_is_refused_outside_development(environment: str, networks: str) -> None:
    with pytest.raises(ConfigurationError, match="TRUSTED_PROXIES: Must not contain") as refused:
        load_settings(environment=environment, trusted_proxies=networks)
    assert len(refused.value.faults) == 1
    assert load_settings(environment="development", trusted_proxies=networks).trusted_proxies


@pytest.mark.parametrize("networks", PRIVATE)
def test_private_networks_can_be_trusted_everywhere(networks: str) -> None:
    assert load_settings(environment="production", trusted_proxies=networks).trusted_proxies


def test_an_ipv4_mapped_network_is_one_of_ipv4() -> None:
    """A client of a dual-stack socket is known by its IPv4 address."""
    networks = load_settings(trusted_proxies="::ffff:10.0.0.0/104, ::ffff:192.0.2.1").trusted_proxies
    assert networks == ("10.0.0.0/8", "192.0.2.1/32")


@pytest.mark.parametrize("networks", ["*", "proxy.example.com", "10.0.0.0/33", ",".join(["10.0.0.1"] * 257)])
def test_networks_that_are_none_are_refused_with_an_example(networks: str) -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)TRUSTED_PROXIES: Must be .*For example 10\.0\.0\.0/8"):
        load_settings(trusted_proxies=networks)
