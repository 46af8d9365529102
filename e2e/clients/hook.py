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


def check_rows(rows, contents, seen):
    """What a table holds at the end: `rows` of (n, v, id) in the order of n, against all (n, v),
    and the ids that the program saw, by n. Ids are unique; sequences may leave gaps in those that
    nobody saw."""
    check("contents", [(n, v) for n, v, _ in rows], contents)
    ids = {n: key for n, _, key in rows}
    check("unique ids", len(set(ids.values())), len(rows))
    check("ids that were seen", {n: ids[n] for n in seen}, seen)
