"""Report a batch that a `DataLoader` worker could not hand over, instead of waiting for it forever.

Workers hand tensors over in shared memory. If that is full, Python prints a traceback and drops the batch, and the
training process waits for it.
"""

from collections.abc import Callable
from multiprocessing import queues

from torch._utils import ExceptionWrapper


def tell_lost_batches(earlier: Callable[[int], None] | None, worker: int) -> None:
    """Make this worker send an error instead of a batch that it cannot send.

    Args:
        earlier: the previous `worker_init_fn`, called first.
        worker: number of the worker.
    """
    if earlier is not None:
        earlier(worker)

    def send_error(queue: queues.Queue, problem: Exception, sent: object) -> None:
        number = sent[0] if isinstance(sent, tuple) else sent
        queue.put((number, _wrapped(problem, worker)))

    # called in the sending thread; this process serves only the loader
    queues.Queue._on_queue_feeder_error = send_error


def _wrapped(problem: Exception, worker: int) -> ExceptionWrapper:
    """Wrapped as torch sends an error raised while a batch is read."""
    try:
        raise RuntimeError(
            f"A process that reads data (`dataloader_num_workers`) could not hand over a batch: {problem}. Is shared "
            "memory full (/dev/shm)? Give it more room, in Docker by --shm-size, or set `dataloader_num_workers` to 0."
        )
    except RuntimeError:
        return ExceptionWrapper(where=f"in DataLoader worker process {worker}")
