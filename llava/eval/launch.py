"""torchrun without its report on a process that failed: `python -m llava.eval.launch --nproc_per_node N -m MODULE …`.

A process says itself what is wrong; the exit code is its own, where torchrun's is always 1.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(argv: list[str] | None = None) -> None:
    """Run the command; its options are torchrun's."""
    args = parse_args(argv)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # a process ended by a signal could say nothing
            sys.stderr.write(f"error: process {rank} was ended by {failure.signal_name()}; see the kernel's log\n")
            raise SystemExit(128 - failure.exitcode) from None
        raise SystemExit(failure.exitcode) from None


if __name__ == "__main__":
    main()
