"""Watch processes that tests have started."""

import time
from pathlib import Path


def ends(pid: int, seconds: float) -> bool:
    """Wait until a process has ended, also if nobody has waited for it; returns False if it runs on."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
