import signal

import torch


# tiny models: more threads only wait for each other
torch.set_num_threads(1)

# a shell has what it starts in the background ignore Ctrl-C; tests that send one must not depend on that
signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # the server's environment has none
    pass
else:
    # on a busy machine examples are slow to make, which says nothing about the code
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")
