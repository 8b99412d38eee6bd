"""The workflows; no torch. Sets the startup timeout of Prefect's embedded server and disables telemetry before Prefect is imported.

Nor does a proxy of the environment stand between this machine and itself: its servers are reached directly, by every process started here.
"""

import os
import sys
from urllib.parse import urlsplit

os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

_direct = [host for host in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",") if host]
os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(dict.fromkeys([*_direct, "127.0.0.1", "localhost", "::1"]))

try:
    urlsplit(os.environ.get("PREFECT_API_URL", ""))
except ValueError as error:  # Prefect would end with a traceback while it is imported
    print(f"PREFECT_API_URL is no address ({error}). Correct it, or unset it.", file=sys.stderr)
    sys.exit(75)
