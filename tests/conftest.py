import signal

import torch


# tiny models: more threads only wait for each other
torch.set_num_threads(1)

# a shell has what it starts in the background ignore Ctrl-C; tests that send one must not depend on that
signal.signal(signal.SIGINT, signal.default_int_handler)
