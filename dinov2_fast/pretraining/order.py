"""What is random in a run, as functions of numbers: nothing has a state, so a run can begin at any position."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_ROUNDS = 4


def mix(*numbers: int) -> int:
    """A hash of 64 bits of integers from 0 to 2^64 - 1, for seeds. All bits depend on all numbers and their order.

    Each number goes through the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def image_at(seed: int, position: int, n_images: int) -> int:
    """The number of the image at a position of the endless stream of a run.

    Each pass over the `n_images` images, positions k n_images to (k + 1) n_images - 1, is another permutation of them.
    It is a Feistel network with keys of `mix`, on numbers of an even count of bits; a result that is no image goes
    through it again ("cycle walking": Black and Rogaway, CT-RSA 2002), so that time and memory do not grow with
    `n_images`.
    """
    number_of_pass, number = divmod(position, n_images)
    half = max((n_images - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    keys = [mix(seed, number_of_pass, key) for key in range(_ROUNDS)]
    while True:
        left, right = number >> half, number & low
        for key in keys:
            left, right = right, left ^ mix(key, right) & low
        number = left << half | right
        if number < n_images:
            return number
