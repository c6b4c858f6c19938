"""Where the package makes ranks meet, read off its source."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[1] / "hf_eagle"
# of torch.distributed, these alone ask nobody
LOCAL = {"is_available", "is_initialized", "get_backend", "get_backend_config", "get_rank", "get_world_size"}
# of accelerate, DTensor and FSDP2, these wait for other ranks
MEETING = {
    *("wait_for_everyone", "main_process_first", "local_main_process_first", "gather_for_metrics", "gather_object"),
    *("pad_across_processes", "broadcast_object_list", "synchronize_rng_states", "set_trigger", "check_trigger"),
    *("full_tensor", "redistribute", "distribute_tensor", "distribute_module", "fully_shard", "unshard"),
    *("get_model_state_dict", "set_model_state_dict", "get_optimizer_state_dict", "set_optimizer_state_dict"),
    *("get_state_dict", "set_state_dict", "init_device_mesh", "prepare_model", "DistributedDataParallel"),
}
# tensors and others have methods of these names too: they count when this is asked, or what is imported from there
SHARED = {"reduce", "gather", "broadcast", "scatter", "all_reduce", "all_gather", "barrier", "prepare"}
ASKED = ("accelerator", "state", "PartialState()", "Accelerator()")
MODULES = ("torch.distributed", "accelerate")


def collectives_of(path: Path) -> Iterator[tuple[str, str]]:
    """Function, by its name in the file, and name of each call in a file that waits for other ranks."""
    tree = ast.parse(path.read_text())
    imported, modules = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(MODULES):
            imported |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == "distributed"}
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == "torch.distributed"}

    def name_of(call: ast.Call) -> str | None:
        asked = call.func
        if isinstance(asked, ast.Name):
            return asked.id if asked.id in imported and asked.id in MEETING | SHARED else None
        if not isinstance(asked, ast.Attribute):
            return None
        owner = ast.unparse(asked.value)
        if owner in modules:
            return None if asked.attr in LOCAL else asked.attr
        return asked.attr if asked.attr in MEETING or (asked.attr in SHARED and owner.endswith(ASKED)) else None

    def walk(node: ast.AST, place: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            place = (*place, node.name)
        if isinstance(node, ast.Call) and name_of(node):
            yield ".".join(place), name_of(node)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, place)

    yield from walk(tree, ())


def collectives() -> Counter:
    """How often each function of the package calls each collective: `(file, function, name)`."""
    found = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update((str(path.relative_to(PACKAGE)), *each) for each in collectives_of(path))
    return found
