"""Whether an error means that memory ran out, of the machine or of an accelerator, however a library says it."""

import errno


_SAID = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "(os error 12)")


def ran_out_of_memory(problem: BaseException | None) -> bool:
    """Return whether memory ran out, which a library may report as something else: `torch.save` cannot even end its
    file then."""
    seen = set()
    while problem is not None and id(problem) not in seen:
        if _says_so(problem):
            return True
        seen.add(id(problem))
        problem = problem.__cause__ or (None if problem.__suppress_context__ else problem.__context__)
    return False


def _says_so(problem: BaseException) -> bool:
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    if isinstance(problem, OSError) and problem.errno is not None:
        return problem.errno == errno.ENOMEM
    by_library = isinstance(problem, RuntimeError) or type(problem).__name__ == "SafetensorError"
    return by_library and any(said in str(problem).lower() for said in _SAID)
