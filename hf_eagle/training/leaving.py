"""Leaving a distributed run."""

import logging
import os
import sys

import torch.distributed as dist


def leave() -> None:
    """End this process, as the last line of a script that may run on several gloo ranks; otherwise nothing is done.

    All ranks meet once more, then each exits without tearing Python down: threads of gloo abort or hang the
    interpreter now and then (torch 2.13), with everything already saved.
    """
    if not dist.is_initialized() or dist.get_backend() != "gloo":
        return
    dist.barrier()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
