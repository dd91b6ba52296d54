"""An agent for tests: run_agent with arguments from JSON; its workers run worker.py."""

import json
import signal
import sys
from pathlib import Path

from fm9g.errors import UserError
from fm9g.launch.agent import run_agent
from fm9g.launch.dist_env import LaunchConfig
from fm9g.log import log_to_console


def main(values: dict) -> int:
    launch_config, argv = LaunchConfig(**values.pop("launch_config")), values.pop("argv")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored, and stays so, where the tests run under nohup
    log_dir = Path(values.pop("log_dir")) if "log_dir" in values else None
    try:
        return run_agent(
            argv,
            launch_config,
            log_dir=log_dir,
            command=[sys.executable, str(Path(__file__).with_name("worker.py"))],
            **values,
        )
    except UserError as error:
        print(f"fm9g: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    with log_to_console():
        sys.exit(main(json.loads(sys.argv[1])))
