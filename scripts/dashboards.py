#!/usr/bin/env python3
"""Writes the Grafana dashboards of charts/helios-operator.

scripts/dashboards.py           write them
scripts/dashboards.py --check   1 when what lies there is not what would be written
"""

import json
import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent.parent / "charts/helios-operator/files/dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# What both dashboards select by.
OF = 'namespace=~"$namespace",cluster=~"$cluster"'
RATE = "$__rate_interval"


def panel(title, unit, *queries, kind="timeseries", text="", width=12, height=8, **options):
    """One panel; a query is (expression, legend)."""
    result = {
        "title": title,
        "description": text,
        "type": kind,
        "datasource": SOURCE,
        "size": (width, height),
        "fieldConfig": {"defaults": {"unit": unit, "custom": {}}, "overrides": []},
        "options": {},
        "targets": [
            {"refId": chr(65 + number), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for number, (expr, legend) in enumerate(queries)
        ],
    }
    if kind == "timeseries":
        result["options"] = {"legend": {"displayMode": "list", "placement": "bottom"}}
        result["fieldConfig"]["defaults"]["custom"] = {"fillOpacity": 10, "showPoints": "never"}
        if options.get("stack"):
            result["fieldConfig"]["defaults"]["custom"]["stacking"] = {"mode": "normal"}
    else:
        result["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name"}
        for target in result["targets"]:
            target["instant"] = True
    return result


def quantile(q, metric, by, of=OF):
    return f"histogram_quantile({q}, sum by ({by}, le) (rate({metric}_bucket{{{of}}}[{RATE}])))"


def dashboard(name, title, text, panels):
    x = y = row = 0
    placed = []
    for number, each in enumerate(panels, 1):
        width, height = each.pop("size")
        if x + width > 24:
            x, y, row = 0, y + row, 0
        placed.append({"id": number, "gridPos": {"x": x, "y": y, "w": width, "h": height}, **each})
        x, row = x + width, max(row, height)
    variable = lambda label, name, query: {
        "name": name, "label": label, "type": "query", "datasource": SOURCE, "query": query,
        "refresh": 2, "multi": True, "includeAll": True, "allValue": ".*", "sort": 1,
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "uid": f"helios-{name}", "title": title, "description": text, "tags": ["helios", "postgresql"],
        "schemaVersion": 38, "version": 1, "editable": True, "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"}, "timezone": "browser",
        "templating": {"list": [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
            variable("Namespace", "namespace", "label_values(helios_cluster_ready, namespace)"),
            variable("Cluster", "cluster", 'label_values(helios_cluster_ready{namespace=~"$namespace"}, cluster)'),
        ]},
        "panels": placed,
    }


CLUSTERS = dashboard("clusters", "Helios / Clusters", "Instances, and changes of primary.", [
    panel("Clusters ready", "none", (f"sum(helios_cluster_ready{{{OF}}})", "ready"),
          (f"count(helios_cluster_ready{{{OF}}})", "all"), kind="stat", width=6, height=4),
    panel("Instances ready", "none", (f"sum(helios_cluster_instances_ready{{{OF}}})", "ready"),
          (f"sum(helios_cluster_instances{{{OF}}})", "all"), kind="stat", width=6, height=4),
    panel("Standbys that confirm commits", "none", (f"sum(helios_cluster_confirming_standbys{{{OF}}})", "standbys"),
          kind="stat", width=6, height=4, text="With none, the next failure of the primary has nowhere to go."),
    panel("Operator", "none", ("sum(helios_operator_leading)", "leads"), ("count(helios_operator_leading)", "copies"),
          kind="stat", width=6, height=4),
    panel("Ready", "none", (f"helios_cluster_ready{{{OF}}}", "{{namespace}}/{{cluster}}")),
    panel("Behind the primary", "bytes", (f"helios_cluster_lag_bytes{{{OF}}}", "{{namespace}}/{{instance}}")),
    panel("Operations by outcome", "none",
          (f"sum by (namespace, cluster, kind, outcome) (increase(helios_cluster_operations_total{{{OF}}}[{RATE}]))",
           "{{namespace}}/{{cluster}} {{kind}} {{outcome}}")),
    panel("Pause of an operation, largest", "s",
          (quantile(1, "helios_cluster_pause_seconds", "namespace, cluster, kind"), "{{namespace}}/{{cluster}} {{kind}}"),
          text="What sessions may have noticed; the upper end of the histogram's bucket."),
    panel("Failed reconciliations", "ops",
          (f"sum by (namespace, cluster) (rate(helios_operator_reconcile_failures_total{{{OF}}}[{RATE}]))",
           "{{namespace}}/{{cluster}}")),
    panel("Instances by proxies' health checks", "none",
          (f"min by (namespace, cluster, instance) (helios_backend_up{{{OF}}})", "{{namespace}}/{{instance}}")),
])

SESSIONS = dashboard("sessions", "Helios / Sessions", "Clients, what protects them, and what moves did to them.", [
    panel("Sessions", "none", (f"sum by (state) (helios_sessions{{{OF}}})", "{{state}}"), stack=True),
    panel("Protected and unprotected", "none", (f"sum(helios_protected_sessions{{{OF}}})", "protected"),
          (f"sum by (reason) (helios_unprotected_sessions{{{OF}}})", "{{reason}}"), stack=True,
          text="What a failover now would not cost an error, and what it would, with the reason."),
    panel("Requests", "reqps", (f"sum by (pod) (rate(helios_exchanges_total{{{OF}}}[{RATE}]))", "{{pod}}")),
    panel("Traffic", "Bps", (f"sum by (direction) (rate(helios_bytes_total{{{OF}}}[{RATE}]))", "{{direction}}")),
    panel("Connections", "ops", (f"sum(rate(helios_connections_total{{{OF}}}[{RATE}]))", "accepted"),
          (f"sum by (reason) (rate(helios_connections_refused_total{{{OF}}}[{RATE}]))", "refused: {{reason}}")),
    panel("Journals", "bytes", (f"sum by (pod) (helios_journal_bytes{{{OF}}})", "{{pod}} in memory"),
          (f"sum by (pod) (helios_journal_disk_bytes{{{OF}}})", "{{pod}} on disk")),
    panel("Pause of sessions", "s",
          (quantile(0.5, "helios_pause_seconds", "kind"), "p50 {{kind}}"),
          (quantile(0.99, "helios_pause_seconds", "kind"), "p99 {{kind}}")),
    panel("Where the time of a move goes", "s", (quantile(0.99, "helios_move_phase_seconds", "phase"), "{{phase}}")),
    panel("Migrations", "none",
          (f"sum by (result, reason) (increase(helios_session_migrations_total{{{OF}}}[{RATE}]))", "{{reason}}: {{result}}"),
          (f"sum(increase(helios_session_migrations_failed{{{OF}}}[{RATE}]))", "clients with an error")),
    panel("State moved with a session", "bytes",
          (quantile(0.99, "helios_session_migrations_state_bytes", "cluster"), "p99 {{cluster}}")),
    panel("Replays", "none",
          (f"sum by (result) (increase(helios_transaction_replays_total{{{OF}}}[{RATE}]))", "{{result}}")),
    panel("Time to replay a transaction", "s",
          (quantile(0.99, "helios_transaction_replay_seconds", "cluster"), "p99 {{cluster}}")),
    panel("Commits in flight, resolved", "none",
          (f"sum by (outcome) (increase(helios_commit_resolutions_total{{{OF}}}[{RATE}]))", "{{outcome}}")),
    panel("Losses prevented, and possible", "none",
          (f"sum(increase(helios_losses_prevented_total{{{OF}}}[{RATE}]))", "prevented"),
          (f"sum(increase(helios_lossy_promotions_total{{{OF}}}[{RATE}]))", "promotions that may have lost commits")),
    panel("Transactions a failover would have cost", "ops",
          (f'sum by (application, protection) (rate(helios_protection_transactions_total{{{OF}}}[{RATE}]))',
           "{{application}}: {{protection}}")),
    panel("Journals outgrown", "none", (f"sum by (pod) (increase(helios_journal_overflows_total{{{OF}}}[{RATE}]))", "{{pod}}")),
    panel("Time of sessions by protection", "percentunit",
          (f"sum by (protection) (rate(helios_protection_seconds_total{{{OF}}}[{RATE}])) / ignoring(protection) "
           f"group_left sum(rate(helios_protection_seconds_total{{{OF}}}[{RATE}]))", "{{protection}}")),
    panel("Last replay", "dateTimeFromNow", (f"max by (pod) (helios_last_replay_timestamp_seconds{{{OF}}}) * 1000", "{{pod}}"),
          kind="stat", text="1970: none since this proxy started."),
])


def main():
    drift = False
    for name, content in (("helios-clusters", CLUSTERS), ("helios-sessions", SESSIONS)):
        path = FOLDER / f"{name}.json"
        text = json.dumps(content, indent=1) + "\n"
        if "--check" in sys.argv:
            if not path.exists() or path.read_text() != text:
                print(f"{path} has drifted; run scripts/dashboards.py", file=sys.stderr)
                drift = True
        else:
            path.write_text(text)
    return 1 if drift else 0


if __name__ == "__main__":
    sys.exit(main())
