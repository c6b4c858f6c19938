import torch


# tiny models: more threads only wait for each other
torch.set_num_threads(1)
