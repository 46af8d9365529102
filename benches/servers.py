"""What is measured: local clusters with their proxies, and PgBouncer in front of a primary."""

import json
import os
import pathlib
import pwd
import shutil
import socket
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
HELIOS = pathlib.Path(os.environ.get("BENCH_HELIOS", TARGET / "release" / "helios"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Address:
    """Where a client connects to: a folder of a Unix socket, or a host; and a port."""

    def __init__(self, host, port, user, database, password=""):
        self.host, self.port = host, port
        self.user, self.database, self.password = user, database, password

    def raw(self):
        if self.host.startswith("/"):
            return f"{self.host}/.s.PGSQL.{self.port}"
        return (self.host, self.port)

    def environment(self):
        return {
            **os.environ,
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGDATABASE": self.database,
            "PGPASSWORD": self.password,
        }


class Cluster:
    """`helios local` in a folder of its own, with one mode of replay."""

    def __init__(self, folder, mode, instances):
        self.folder = pathlib.Path(folder) / f"cluster-{mode}"
        port = free_port()
        # Short, outside of the cluster's folder: the name of a Unix socket has 107 bytes at most.
        sockets = pathlib.Path(folder) / f"s-{mode}"
        sockets.mkdir()
        self.run(
            "start", "--detach", "--instances", str(instances), "--mode", mode,
            "--listen", f"127.0.0.1:{port}", "--socket-dir", sockets,
            "--set", "max_connections=1300",
        )
        self.pid = self.status()["pid"]
        secret = json.loads((self.folder / "credentials.json").read_text())
        names = (secret["user"], secret["database"])
        primary = self.primary()
        endpoint = next(i for i in self.status()["instances"] if i["name"] == primary)["endpoint"]
        host = endpoint["host"]
        self.direct = Address(host, endpoint["port"], *names, secret["password"])
        # Clients reach all subjects in the same way: by Unix sockets, or by TCP.
        near = sockets if host.startswith("/") else "127.0.0.1"
        self.proxy = Address(str(near), port, *names, secret["password"])
        self.admin = Address(
            self.direct.host, self.direct.port, "helios", secret["database"], secret["service_password"]
        )

    def run(self, command, *options):
        done = subprocess.run(
            [HELIOS, "local", command, "--data-dir", self.folder, *options],
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            timeout=300,
        )
        if done.returncode != 0:
            raise SystemExit(f"bench: helios local {command} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def status(self):
        return json.loads(self.run("status", "--json"))

    def primary(self):
        return self.status()["primary"]

    def switchover(self):
        return subprocess.Popen(
            [HELIOS, "local", "switchover", "--data-dir", self.folder, "--json"],
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )

    def await_redundancy(self, limit=60):
        """Waits until every standby follows and commits wait for one of them."""
        deadline = time.monotonic() + limit
        while True:
            status = self.status()
            others = [i for i in status["instances"] if i["name"] != status["primary"]]
            follow = all(i["lag_bytes"] is not None for i in others)
            if follow and status["synchronous"] and status["phase"] == "steady":
                return
            if time.monotonic() > deadline:
                raise OSError(f"the cluster is not redundant after {limit} s: {status}")
            time.sleep(0.1)

    def stop(self):
        self.run("stop")


class PgBouncer:
    """Debian's PgBouncer, trusting its clients, logged in at the primary by password."""

    def __init__(self, folder, pool_mode, backend, size):
        self.folder = pathlib.Path(folder) / f"pgbouncer-{pool_mode}"
        self.folder.mkdir()
        port = free_port()
        near = str(self.folder) if backend.host.startswith("/") else "127.0.0.1"
        self.address = Address(near, port, backend.user, backend.database)
        password = f" password={backend.password}" if backend.password else ""
        (self.folder / "users.txt").write_text(f'"{backend.user}" "{backend.password}"\n')
        (self.folder / "pgbouncer.ini").write_text(f"""
[databases]
{backend.database} = host={backend.host} port={backend.port}{password}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir = {self.folder}
auth_type = trust
auth_file = {self.folder}/users.txt
pool_mode = {pool_mode}
max_client_conn = 2000
default_pool_size = {size}
ignore_startup_parameters = extra_float_digits
log_connections = 0
log_disconnections = 0
logfile = {self.folder}/log
""")
        command = [shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")]
        options = {}
        if os.geteuid() == 0:
            # PgBouncer refuses to run as root.
            owner = pwd.getpwnam("postgres")
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, owner.pw_uid, owner.pw_gid)
            options = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        self.process = subprocess.Popen(
            [*command, self.folder / "pgbouncer.ini"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=open(self.folder / "stderr", "w"), **options,
        )
        self.pid = self.process.pid
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    said = (self.folder / "stderr").read_text()
                    raise SystemExit(f"bench: PgBouncer did not start:\n{said}") from None
                time.sleep(0.05)

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=20)


def resident_bytes(pid):
    """Resident memory of one process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def private_bytes(pid):
    """Memory of one process that no other one shares."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Private_"))
