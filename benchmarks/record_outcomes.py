"""A pytest plugin (`-p record_outcomes`): one line of JSON for every test, as soon as it has ended, in the file that
DASS_RECORD names. What was tested before a run was stopped is then known."""

import json
import os


def pytest_runtest_logreport(report):
    if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
        return
    message = ""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        message = report.longrepr[2]
    elif report.outcome == "failed":
        message = report.longreprtext[-1500:]
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), "message": message}
    if not os.environ.get("PYTEST_XDIST_WORKER"):  # the controller sees every worker's reports
        with open(os.environ["DASS_RECORD"], "a") as file:
            file.write(json.dumps(line) + "\n")
