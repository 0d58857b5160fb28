"""What operators look at, made from the metric catalogue by `python -m deploy.monitoring`.

promql.py   expressions over the catalogue; an unknown metric name is an error here, not an empty panel
rules.py    recording rules and alerts
panels.py   Grafana's JSON, panel by panel          boards.py   the boards
files.py    every generated file and its text       files/      the result, committed
"""
