"""Start a training worker, alone or on several gloo ranks, and say what it printed if it failed."""

import json
from pathlib import Path

from warm_python import warm_python


WORKERS = Path(__file__).parent / "distributed"


def run_worker(out: Path, ranks: int = 1, expect_kill: bool = False, worker: str = "train_worker.py", **spec) -> dict:
    """Run a worker; its spec, and what it `printed`. Raises with what its ranks printed unless it ended as expected."""
    out.mkdir(parents=True, exist_ok=True)
    spec = {"out": str(out), **spec}
    path = out / "spec.json"
    path.write_text(json.dumps(spec))
    done = warm_python().run(WORKERS / worker, path, ranks=ranks)
    if expect_kill:
        assert done.returncode == -9, f"ended with {done.returncode}, not by SIGKILL\n{done.stdout}\n{done.stderr}"
    else:
        assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return {**spec, "printed": done.stdout + done.stderr}


def losses(out: Path) -> dict[int, float]:
    """Logged training loss by step."""
    return {entry["step"]: entry["loss"] for entry in json.loads((out / "log.json").read_text()) if "loss" in entry}
