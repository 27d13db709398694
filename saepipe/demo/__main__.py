"""The whole pipeline on the embedded model: `python -m saepipe.demo`, which is what `make demo` runs.

Further arguments are overrides for every verb, e.g. `python -m saepipe.demo sae.k=16 run.dir=runs/demo-16`.
"""

import logging
import sys

from saepipe import entry
from saepipe.demo.pipeline import demo, table
from saepipe.errors import UserError


def main() -> None:
    """Run the demo from the command line."""
    entry.prepare_process()
    try:
        logging.getLogger("saepipe").info("\n%s", table(demo(sys.argv[1:])))
    except UserError as error:
        entry.refuse(str(error))
    except KeyboardInterrupt:
        entry.interrupted()


if __name__ == "__main__":
    main()
