"""Parts of `scripts/dev/measure_gpu.py` on a pretended device; for `test_measure_gpu.py`.

    pretended_measuring_worker.py SPEC.json      {"out": DIR, "parts": [NAME, ...]}

Leaves `results.json` in `out`: the rows of each part.
"""

import json
import sys
from pathlib import Path

import torch


torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(folder) for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "distributed", ROOT / "scripts/dev")]

from measuring_gpu.parts import PARTS  # noqa: E402
from measuring_gpu.sizes import TINY  # noqa: E402
from pretended_device import NAME  # noqa: E402
from pretended_training_worker import get_device, take_device  # noqa: E402


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    get_device()
    take_device(NAME)
    # a tensor in Python cannot be filled with numbers of another dtype
    torch.__future__.set_swap_module_params_on_conversion(True)
    found = {name: list(PARTS[name](TINY, torch.device(NAME, 0))) for name in spec["parts"]}
    (Path(spec["out"]) / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
