"""Lets torchvision's CUDA build be imported next to a PyTorch without CUDA, by declaring the operators it looks up.

The package index has no other build, and vLLM resizes pictures with it. Its compiled operators cannot be loaded then,
and are not needed for that. Read by every Python that has this folder on its path, also those that vLLM starts.
"""

import sys


class _DeclareFirst:
    """Declares two operators when torchvision is about to be imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            from torch.library import define

            for operator in ("nms", "qnms"):
                define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareFirst())
