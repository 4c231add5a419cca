"""Bodies of URLs kept for a while: when they are used as they are, asked for, and let go."""

import pytest

from opsin.errors import MediaError
from opsin.media import fetched as fetched_module
from opsin.media.fetched import FetchedCache
from opsin.media.limits import Deadline, MediaLimits
from tests.media.samples import LOOPBACK, reply, web_server


class Site:
    """A page whose body and headers can change, and the headers of every request for it."""

    def __init__(self, **headers):
        self.body = b"first"
        self.headers = headers
        self.seen = []

    def __call__(self, handler):
        self.seen.append(dict(handler.headers))
        tag = self.headers.get("ETag")
        if tag is not None and handler.headers.get("If-None-Match") == tag:
            reply(handler, status=304, ETag=tag)
        else:
            reply(handler, self.body, **self.headers)


def get(cache, url, salt=b"", limits=LOOPBACK):
    return cache.get(url, salt, limits, Deadline(10.0))


def test_a_body_is_fetched_once_a_minute_where_nothing_is_said(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(fetched_module.time, "monotonic", lambda: clock[0])
    site, cache = Site(), FetchedCache()
    with web_server(site) as url:
        limits, deadline = LOOPBACK, Deadline(10.0)
        assert [cache.get(url, b"", limits, deadline) for _ in range(3)] == [b"first"] * 3
        assert (len(site.seen), cache.hits, cache.misses, cache.num_bytes) == (1, 2, 1, 5)
        clock[0] += fetched_module.FRESH_SECONDS + 1
        site.body = b"second!"
        assert cache.get(url, b"", limits, Deadline(10.0)) == b"second!"
    assert (len(site.seen), cache.num_bytes) == (2, 7)


def test_what_may_have_changed_is_asked_for_with_its_validators():
    site, cache = Site(ETag='"a"', Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT"), FetchedCache()
    site.headers["Cache_Control"] = "no-cache"
    with web_server(site) as url:
        assert [get(cache, url) for _ in range(2)] == [b"first"] * 2
        assert site.seen[1]["If-None-Match"] == '"a"'
        assert site.seen[1]["If-Modified-Since"] == "Mon, 01 Jan 2024 00:00:00 GMT"
        assert "If-None-Match" not in site.seen[0]
        assert (cache.hits, cache.misses) == (1, 1)
        site.body, site.headers["ETag"] = b"second", '"b"'
        assert get(cache, url) == b"second"
    assert (len(site.seen), cache.misses) == (3, 2)


def test_a_stated_age_is_kept_to_and_no_store_obeyed():
    site, cache = Site(Cache_Control="public, max-age=600"), FetchedCache()
    with web_server(site) as url:
        assert [get(cache, url) for _ in range(2)] == [b"first"] * 2
    assert len(site.seen) == 1
    for words in ("no-store", "max-age=0"):
        site, cache = Site(Cache_Control=words), FetchedCache()
        with web_server(site) as url:
            assert [get(cache, url) for _ in range(2)] == [b"first"] * 2
        assert len(site.seen) == 2
        assert cache.num_bytes == (0 if words == "no-store" else 5)


def test_salts_and_urls_share_nothing():
    site, cache = Site(), FetchedCache()
    with web_server(site) as url:
        for salt in (b"one", b"two"):
            for path in ("/a", "/b"):
                assert get(cache, url + path, salt) == b"first"
    assert (len(site.seen), cache.hits) == (4, 0)


def test_the_oldest_goes_first_and_what_does_not_fit_is_not_kept():
    site, cache = Site(), FetchedCache(max_bytes=12)
    with web_server(site) as url:
        for path in ("/a", "/b", "/a", "/c", "/a", "/b"):
            get(cache, url + path)
        assert (len(site.seen), cache.num_bytes) == (4, 10)  # /b was let go for /c
        site.body = bytes(13)
        get(cache, url + "/d")
        assert cache.num_bytes == 10


def test_another_host_hears_no_validators_and_errors_are_not_kept():
    other = Site(ETag='"other"', Cache_Control="no-cache")
    hops = []

    def moved(handler):
        hops.append(dict(handler.headers))
        reply(handler, status=302, Location=f"{there}/x")

    cache = FetchedCache()
    with web_server(other) as there, web_server(moved) as here:
        assert [get(cache, here) for _ in range(2)] == [b"first"] * 2
    assert [hop.get("If-None-Match") for hop in hops] == [None, None]
    assert other.seen[1]["If-None-Match"] == '"other"'
    with (
        web_server(lambda handler: reply(handler, b"gone", status=404)) as url,
        pytest.raises(MediaError, match="404"),
    ):
        get(cache, url)
    with web_server(Site()) as url, pytest.raises(MediaError, match="public internet"):
        get(cache, url, limits=MediaLimits())
