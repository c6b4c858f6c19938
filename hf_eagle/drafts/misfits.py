"""What is wrong with tensors that should become a draft, of a checkpoint or of another project."""


def misfits(found: dict[str, list[int]], wanted: dict[str, list[int]]) -> list[tuple[str, str]]:
    """Tensors that are missing, unexpected or of another shape, by name, each with what is wrong with it.

    Args:
        found: shapes of the tensors found.
        wanted: shapes of the draft's tensors.
    """
    wrong = [(name, "is missing") for name in wanted if name not in found]
    wrong += [(name, "is unexpected") for name in found if name not in wanted]

    both = [name for name in wanted if name in found and found[name] != wanted[name]]
    return wrong + [(name, f"is {found[name]} instead of {wanted[name]}") for name in both]
