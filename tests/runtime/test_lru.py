"""The byte-bounded cache against a list that is searched from end to end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mgvq_runtime.cache.lru import LRUCache

ACTIONS = st.tuples(
    st.sampled_from(["get", "put", "discard"]), st.integers(0, 5), st.integers(0, 9)
)


@given(st.integers(0, 20), st.lists(ACTIONS, max_size=40))
def test_it_keeps_what_was_used_last_as_far_as_the_bytes_go(
    max_bytes: int, actions: list[tuple[str, int, int]]
) -> None:
    cache: LRUCache[int, str] = LRUCache(max_bytes)
    plain: list[tuple[int, str, int]] = []  # key, value, bytes; oldest first
    for number, (action, key, num_bytes) in enumerate(actions):
        found = [entry for entry in plain if entry[0] == key]
        if action == "get":
            assert cache.get(key) == (found[0][1] if found else None)
            plain = [entry for entry in plain if entry[0] != key] + found
        else:
            plain = [entry for entry in plain if entry[0] != key]
            if action == "discard":
                cache.discard(key)
            else:
                cache.put(key, str(number), num_bytes)
                plain.append((key, str(number), num_bytes))
            if num_bytes > max_bytes and action == "put":
                plain.pop()
            while sum(entry[2] for entry in plain) > max_bytes:
                plain.pop(0)
        assert cache.num_bytes == sum(entry[2] for entry in plain) <= max_bytes
        assert len(cache) == len(plain)
    assert [cache.get(key) for key in range(6)] == [
        next((value for k, value, _ in plain if k == key), None) for key in range(6)
    ]
