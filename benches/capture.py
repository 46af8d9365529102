"""What it costs to keep what a session would need elsewhere, while nothing moves.

Two proxies in front of one primary, one that keeps everything and one that keeps open transactions
only; runs in pairs, each round beginning with the other one.
"""

import pathlib
import statistics
import subprocess
import time

from servers import HELIOS, Address, free_port
from sessions import ServerError

CLIENTS = 8
KEYS = ("capture_set_parameters", "capture_prepared_statements", "capture_temp_tables", "capture_cursors")
# Nothing of it to keep; a setting in each transaction; rows of a temporary table in each.
SCRIPTS = {
    "TPC-B-like, prepared": None,
    "with SET LOCAL": "begin; set local work_mem = '8MB'; select 1; commit;",
    "with a setting": "select set_config('app.user', :client_id::text, false); select 1;",
    "with a temporary table": (
        "create temp table if not exists kept (id int, note text);\n"
        "insert into kept values (:client_id, 'something to keep');\n"
        "delete from kept;\nselect count(*) from kept;"
    ),
}


class Proxy:
    """`helios proxy` in front of the primary of a cluster."""

    def __init__(self, folder, name, cluster, keeps):
        folder = pathlib.Path(folder) / f"proxy-{name}"
        folder.mkdir()
        port = free_port()
        secret = folder / "password"
        secret.write_text(cluster.admin.password)
        secret.chmod(0o600)
        at = cluster.admin
        keys = "\n".join(f"{key} = {str(keeps).lower()}" for key in KEYS)
        config = folder / "helios_proxy.toml"
        config.write_text(f"""
[proxy]
listen_address = "127.0.0.1:{port}"
[session_migration]
{keys}
[observability]
metrics_port = {free_port()}
[backends]
service_user = "{at.user}"
service_database = "{at.database}"
service_password_file = "{secret}"
[[backends.instances]]
name = "primary"
host = "{at.host}"
port = {at.port}
""")
        direct = cluster.direct
        self.address = Address("127.0.0.1", port, direct.user, direct.database, direct.password)
        self.log = open(folder / "log", "w")
        self.process = subprocess.Popen(
            [HELIOS, "proxy", "--config", config], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )

    def said(self):
        """The last line of its log."""
        return (pathlib.Path(self.log.name).read_text().strip().splitlines() or ["nothing"])[-1]

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=60)
        self.log.close()


def await_proxy(proxy, try_it, limit=20):
    deadline = time.monotonic() + limit
    while True:
        try:
            return try_it(proxy.address)
        except (SystemExit, subprocess.SubprocessError):
            if time.monotonic() > deadline or proxy.process.poll() is not None:
                raise ServerError(f"a proxy did not start: {proxy.said()}") from None
            time.sleep(0.2)


def cost(folder, cluster, repeats, run, try_it, say):
    """For each script the transactions a second without and with, and the median of their ratios."""
    proxies = {name: Proxy(folder, name, cluster, name == "all") for name in ("none", "all")}
    found = {}
    try:
        for proxy in proxies.values():
            await_proxy(proxy, try_it)
        for what, script in SCRIPTS.items():
            runs = {name: [] for name in proxies}
            for turn in range(repeats):
                names = list(proxies)
                for name in names[turn % 2 :] + names[: turn % 2]:
                    runs[name].append(run(proxies[name].address, script, CLIENTS))
            ratios = [one / other for one, other in zip(runs["all"], runs["none"])]
            found[what] = {
                **{name: statistics.median(tps) for name, tps in runs.items()},
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
            say(f"capture, {what}: {found[what]}")
    finally:
        for proxy in proxies.values():
            proxy.stop()
    return found
