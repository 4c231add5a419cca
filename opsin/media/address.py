"""One strict parse of a media URL, and which addresses it may lead to."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote

from opsin.errors import MediaError
from opsin.media.failure import source_name

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_URL = re.compile(r"(https?)://([^/?#]*)([^?#]*)(\?[^#]*)?(?:#.*)?", re.IGNORECASE | re.DOTALL)
_PORT = re.compile(r":([0-9]{0,5})$")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_KEEP = "%/:=&?~+!$,;'@()*[]-._|"


@dataclass(frozen=True, slots=True)
class WebURL:
    """An http(s) URL taken apart once; these parts, and no text, are what is fetched.

    `host` is lower-case ASCII without brackets or a trailing dot; `target` is path and query.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def netloc(self) -> str:
        """Host and port as the Host header carries them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return host if self.port == default else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.target}"


def _refuse(text: str, why: str) -> MediaError:
    return MediaError(
        f"{source_name(text, 'media')} was not fetched",
        why=why,
        remedy="Give a plain http:// or https:// URL of a public host",
    )


def parse_url(text: str) -> WebURL:
    """The parts of an http(s) URL; MediaError for what two parsers could read differently."""
    if "\\" in text or any((char <= " " and char != " ") or char == "\x7f" for char in text):
        raise _refuse(text, "it has a backslash or a control character")
    match = _URL.fullmatch(text.strip(" "))
    if match is None:
        raise _refuse(text, "it is not an http or https URL")
    scheme, authority, path, query = match[1].lower(), match[2], match[3], match[4] or ""
    if "@" in authority:
        raise _refuse(text, "it has a user name or password")
    port_match = _PORT.search(authority)
    host = authority[: port_match.start()] if port_match else authority
    digits = port_match[1] if port_match else ""
    port = int(digits) if digits else {"http": 80, "https": 443}[scheme]
    if not 0 < port < 65536:
        raise _refuse(text, "its port is not a number from 1 to 65535")
    target = quote((path or "/") + query, safe=_KEEP)
    return WebURL(scheme, _parse_host(text, host), port, target)


def _parse_host(text: str, host: str) -> str:
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1].partition("%")[0]))
        except ValueError:
            raise _refuse(text, "its host is not an IPv6 address") from None
    name = _to_ascii(text, host).lower().removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _refuse(text, "its host is not a valid name")
    if _NUMBER.fullmatch(labels[-1]):
        # Decimal, octal, hexadecimal and shortened spellings of IPv4 are read differently by
        # different resolvers; only the plain dotted form has one meaning.
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise _refuse(text, "its host is an unusual spelling of an IPv4 address") from None
    return name


def _to_ascii(text: str, host: str) -> str:
    if host.isascii():
        return host
    import idna

    try:
        return idna.encode(host, uts46=True).decode("ascii")
    except (idna.IDNAError, UnicodeError):
        raise _refuse(text, "its host is not a valid international name") from None


def domain_allowed(host: str, allowed: tuple[str, ...] | None) -> bool:
    """Whether `host` is one of the allowed domains or below one; None allows every host."""
    if allowed is None:
        return True
    domains = [domain.lower().strip(".").removeprefix("*.") for domain in allowed]
    return any(host == domain or host.endswith(f".{domain}") for domain in domains)


_NAMED = (
    ("0.0.0.0/8", "an unspecified address"),
    ("127.0.0.0/8", "a loopback address"),
    ("10.0.0.0/8", "a private address"),
    ("172.16.0.0/12", "a private address"),
    ("192.168.0.0/16", "a private address"),
    ("100.64.0.0/10", "a carrier's shared address"),
    ("169.254.0.0/16", "a link-local address"),
    ("168.63.129.16/32", "a cloud provider's control address"),
    ("192.0.0.0/24", "a reserved address"),
    ("192.88.99.0/24", "a reserved address"),
    ("192.0.2.0/24", "a reserved address"),
    ("198.18.0.0/15", "a reserved address"),
    ("198.51.100.0/24", "a reserved address"),
    ("203.0.113.0/24", "a reserved address"),
    ("224.0.0.0/4", "a multicast address"),
    ("240.0.0.0/4", "a reserved address"),
    ("::/128", "an unspecified address"),
    ("::1/128", "a loopback address"),
    ("fc00::/7", "a private address"),
    ("fe80::/10", "a link-local address"),
    ("fec0::/10", "a private address"),
    ("ff00::/8", "a multicast address"),
    ("2002::/16", "a 6to4 address"),
    ("2001::/32", "a Teredo address"),
    ("64:ff9b:1::/48", "a local NAT64 address"),
)
_NETWORKS = tuple((ipaddress.ip_network(network), name) for network, name in _NAMED)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)


def refusal(address: Address) -> str | None:
    """Why an address may not be connected to, or None when it is a public one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return refusal(address.ipv4_mapped)
        if address in _NAT64:
            return refusal(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
            return "an ISATAP address"
    for network, name in _NETWORKS:
        if address.version == network.version and address in network:
            return name
    if address.is_multicast or address.is_reserved or not address.is_global:
        return "a reserved address"
    return None
