"""Which URLs are read at all, and which addresses may be connected to."""

import ipaddress

import pytest

from opsin.errors import MediaError
from opsin.media.address import domain_allowed, parse_url, refusal

READ_AS = [
    ("http://example.com", "http", "example.com", 80, "/"),
    ("HTTPS://EXAMPLE.com/A?b=C#d", "https", "example.com", 443, "/A?b=C"),
    ("http://example.com:/x", "http", "example.com", 80, "/x"),
    ("http://example.com:8080/x", "http", "example.com", 8080, "/x"),
    ("http://example.com./x", "http", "example.com", 80, "/x"),
    ("https://bücher.example/ü x", "https", "xn--bcher-kva.example", 443, "/%C3%BC%20x"),
    ("http://127.0.0.1./", "http", "127.0.0.1", 80, "/"),
    ("http://①②⑦。⓪.⓪.①/", "http", "127.0.0.1", 80, "/"),
    ("http://[::FFFF:127.0.0.1]:81/", "http", "::ffff:7f00:1", 81, "/"),
    ("https://a.example?x=/../y", "https", "a.example", 443, "/?x=/../y"),
    ("https://a.example/a%2Fb?sig=a%2Bb+c", "https", "a.example", 443, "/a%2Fb?sig=a%2Bb+c"),
]


@pytest.mark.parametrize(("text", "scheme", "host", "port", "target"), READ_AS)
def test_row_01_one_parse_gives_the_parts_that_are_fetched(text, scheme, host, port, target):
    url = parse_url(text)
    same = ipaddress.ip_address("::ffff:127.0.0.1") if ":" in host else None
    assert (url.scheme, url.port, url.target) == (scheme, port, target)
    assert url.host == host or ipaddress.ip_address(url.host) == same
    assert parse_url(str(url)) == url


REFUSED_TEXT = [
    "http://ok\\@169.254.169.254/",
    "http://user:password@example.com/",
    "http://example.com@169.254.169.254/",
    "http://0x7f.1/",
    "http://0x7f000001/",
    "http://2130706433/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://127.0.0.1.1/",
    "http://1.2.3.256/",
    "http://%31%32%37.0.0.1/",
    "http://example.com%2f@evil.example/",
    "http://exa mple.com/",
    "http://example.com\t/",
    "http://example.com/\r\nHost: evil",
    "http://example.com\x00/",
    "http:///path",
    "http://",
    "http:example.com",
    "http://a..example/",
    "http://-a.example/",
    "http://[::1/",
    "http://[not-an-address]/",
    "http://example.com:99999/",
    "http://example.com:0/",
    "http://example.com:8o/",
    "ftp://example.com/",
    "gopher://example.com/",
    "javascript:alert(1)",
    "http://" + "a" * 300 + ".example/",
]


@pytest.mark.parametrize("text", REFUSED_TEXT)
def test_row_01_urls_with_two_readings_are_refused(text):
    with pytest.raises(MediaError) as caught:
        parse_url(text)
    assert "password" not in caught.value.line() or "user name" in caught.value.line()


NOT_PUBLIC = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "168.63.129.16",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
    "2606:4700::5efe:10.0.0.1",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_row_02_addresses_that_are_not_public_are_refused(address):
    assert refusal(ipaddress.ip_address(address)) is not None


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "172.15.0.1", "172.32.0.1", "100.63.255.255", "100.128.0.1",
                "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)  # fmt: skip
def test_public_addresses_are_allowed(address):
    assert refusal(ipaddress.ip_address(address)) is None


def test_allowed_domains_match_whole_labels():
    assert domain_allowed("a.example", None)
    assert domain_allowed("a.example", ("a.example",))
    assert domain_allowed("b.a.example", ("*.A.example",))
    assert not domain_allowed("ba.example", ("a.example",))
    assert not domain_allowed("a.example.evil", ("a.example",))
    assert not domain_allowed("a.example", ())
