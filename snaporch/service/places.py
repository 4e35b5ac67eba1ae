"""Who may be connected: a place for each connection, so many for each door and each peer; none waits for another's.

Rules:

1. Root and the service's own user have places of their own, other users of the unix socket, too, and TCP.
2. One peer (a user of the unix socket, an address) has no more than a part of them.
3. Where all are taken, the connection with the longest silence makes room: only requests keep a place.
4. No client waits for a place: without a free one its connection ends at once.
"""

from __future__ import annotations

import ipaddress
import os
from collections import Counter
from collections.abc import Callable, Hashable

import attrs

from snaporch.drivers.local.sockets import Peer

OWN_PLACES = 200  # of root and the service's own user


@attrs.define(eq=False)
class Place:
    """The place of one connection.

    Attributes:
        peer: who has it.
        leave: ends the connection.
        idle: nothing is asked for by it at present.
    """

    peer: Hashable
    leave: Callable[[], None]
    idle: bool = True


@attrs.define(eq=False)
class Pool:
    """The places of one door.

    Attributes:
        most: how many there are.
        each: how many one peer may have.
    """

    most: int
    each: int
    _taken: dict[Place, None] = attrs.field(factory=dict)  # those that were idle for the longest come first
    _by_peer: Counter[Hashable] = attrs.field(factory=Counter)

    def take(self, peer: Hashable, leave: Callable[[], None]) -> Place | None:
        """Return a place, or None where there is none for this peer."""
        if self._by_peer[peer] >= self.each and not self._evict(lambda place: place.peer == peer):
            return None
        if len(self._taken) >= self.most and not self._evict(lambda _: True):
            return None
        place = Place(peer, leave)
        self._taken[place] = None
        self._by_peer[peer] += 1
        return place

    def _evict(self, which: Callable[[Place], bool]) -> bool:
        found = next((place for place in self._taken if place.idle and which(place)), None)
        if found is None:
            return False
        self.give_back(found)
        found.leave()
        return True

    def give_back(self, place: Place) -> None:
        """Have a place back; does nothing the second time."""
        if self._taken.pop(place, place) is None:
            self._by_peer[place.peer] -= 1
            if not self._by_peer[place.peer]:
                del self._by_peer[place.peer]

    def set_idle(self, place: Place, *, idle: bool) -> None:
        """Note whether something is asked for by a connection."""
        place.idle = idle
        if place in self._taken:
            del self._taken[place]
            self._taken[place] = None

    def __len__(self) -> int:
        return len(self._taken)


def is_own(peer: Peer | None) -> bool:
    """Return whether the other end of a unix socket is root or the service's own user."""
    return peer is not None and peer.uid in {0, os.geteuid()}


def tcp_peer(address: str) -> Hashable:
    """Return the key by which an address is counted: of IPv6 its network, which is one customer's."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return found if found.version == 4 else int(found) >> 64  # noqa: PLR2004 - IP's number
