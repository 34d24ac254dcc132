"""From a Ray address to the address of its dashboard: `python -m launch.ray_dashboard ADDRESS`.

A process of its own, because it loads Ray and tries a silent cluster for a while.
"""

import os
import sys

from launch.ray_job import ADDRESS_VARIABLES


def main(address: str) -> int:
    """Print the dashboard's address; the reason goes to standard error."""
    from ray.job_submission import JobSubmissionClient

    # Ray lets these variables overrule the address that its client is given.
    for name in ADDRESS_VARIABLES:
        os.environ.pop(name, None)
    try:
        print(JobSubmissionClient(address).get_address())
    except (RuntimeError, ConnectionError, ValueError) as exc:
        print(f"{type(exc).__name__}: {exc}".partition("\n")[0], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
