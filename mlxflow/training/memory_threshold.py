"""The threshold above which the host waits for the device, found from measured peaks.

A peak is above the threshold by what the host has sent ahead by then: that depends on the model, the device, and how
busy the host is.

It begins well below the memory limit, falls at once if a peak exceeds the limit, and rises while peaks leave room. It
decides only when operations are sent, not which.
"""

# The share of the limit to begin with: of fine-tuning on a GPU the peak was above the threshold by up to 9 percent
_FIRST_SHARE = 0.85

# Peaks up to this share of the limit let the threshold rise: they differ a little from step to step
_WANTED_SHARE = 0.98

# The share of the limit by which the threshold falls at least; it doubles with each excess in a row
_LEAST_FALL = 1 / 32

# A smaller rise is not worth another peak above the limit
_LEAST_RISE = 1 / 256


def first_threshold(limit_bytes: int) -> int:
    """Return the threshold to begin with.

    Args:
        limit_bytes: the memory limit.
    """
    return int(limit_bytes * _FIRST_SHARE)


class MemoryThreshold:
    """Finds the largest threshold whose peaks stay within the memory limit.

    Args:
        limit_bytes: the memory limit.

    Attributes:
        bytes: the threshold; the limit itself once no threshold keeps the peaks within it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self.bytes = first_threshold(limit_bytes)
        self._too_high = limit_bytes
        self._lowest_active = limit_bytes
        self._excesses = 0
        self._peak_before = 0  # of the same threshold; 0 for none
        self._is_hopeless = False

    @property
    def careful_bytes(self) -> int:
        """The threshold without what it rose since the beginning: it does not depend on peaks that fit."""
        return min(self.bytes, first_threshold(self._limit))

    def learn(self, peak_bytes: int, active_bytes: int) -> None:
        """Take the peak of some work under this threshold, and choose the next one.

        Args:
            peak_bytes: of the work.
            active_bytes: after it; the least of these is taken for what is always held.
        """
        self._lowest_active = min(self._lowest_active, active_bytes)
        if self._is_hopeless:
            return
        if peak_bytes > self._limit:
            self._fall(peak_bytes - self._limit)
            return
        self._excesses = 0
        if peak_bytes > max(self.bytes, active_bytes):  # else the host did not wait, or there was no work
            if self._peak_before:
                self._rise(max(peak_bytes, self._peak_before))
            else:
                self._peak_before = peak_bytes

    def _fall(self, excess_bytes: int) -> None:
        if self.bytes <= self._lowest_active:  # the host waits after each operation
            self.bytes, self._is_hopeless = self._limit, True
            return
        self._excesses += 1
        self._too_high, self._peak_before = self.bytes, 0
        least = int(self._limit * _LEAST_FALL * 2 ** (self._excesses - 1))
        self.bytes = max(self._lowest_active, self.bytes - max(2 * excess_bytes, least))

    def _rise(self, peak_bytes: int) -> None:
        """Rise by half of the room, and by no more than half of the way to a threshold that was too high.

        A peak grows by no more than the threshold does.
        """
        self._peak_before = 0
        room = int(self._limit * _WANTED_SHARE) - peak_bytes
        rise = min(room, self._too_high - self.bytes) // 2
        if rise >= self._limit * _LEAST_RISE:
            self.bytes += rise
