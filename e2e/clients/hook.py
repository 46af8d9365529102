"""What the Python client programs share.

A program prints SWITCH where its transaction is to be moved and goes on when GO comes back; it
judges by its own data and exits with 0 only when all of it is right.
"""

import sys


def switch():
    """Asks for a switchover now, and waits until it is over."""
    print("SWITCH", flush=True)
    answer = sys.stdin.readline().strip()
    if answer != "GO":
        sys.exit(f"expected GO on standard input, got {answer!r}")


def check(what, got, expected):
    """Ends the program when a value is not what it has to be."""
    if got != expected:
        sys.exit(f"{what}: got {got!r}, expected {expected!r}")
