"""Bounds for the numbers of `transformers.TrainingArguments`, which itself states none. No torch."""

from .bounds import Bounds


_COUNT = Bounds(least=1)
_ROWS = Bounds(least=1, most=65_536)
_STEPS = Bounds(above=0)  # below 1: a share of all steps
_SEED = Bounds(least=0, most=2**32 - 1)

INHERITED = {
    # how long, and with which batches
    "num_train_epochs": Bounds(above=0),
    "max_steps": Bounds(least=-1),  # below 1: as many as the epochs have
    "per_device_train_batch_size": _ROWS,
    "per_device_eval_batch_size": _ROWS,
    "gradient_accumulation_steps": _ROWS,
    "eval_accumulation_steps": _COUNT,
    # the optimizer; a rate of 1 or more never trained anything, but may be tried
    "learning_rate": Bounds(least=0, most=1000),
    "warmup_steps": Bounds(least=0),
    "weight_decay": Bounds(least=0, most=1000),
    "adam_beta1": Bounds(least=0, below=1),
    "adam_beta2": Bounds(least=0, below=1),
    "adam_epsilon": Bounds(least=0, most=1),
    "max_grad_norm": Bounds(least=0),  # 0: no clipping
    "label_smoothing_factor": Bounds(least=0, below=1),
    "neftune_noise_alpha": Bounds(least=0),
    # what is logged, evaluated and saved, and when
    "logging_steps": _STEPS,
    "eval_steps": _STEPS,
    "save_steps": _STEPS,
    "eval_delay": Bounds(least=0),
    "save_total_limit": _COUNT,
    "torch_empty_cache_steps": _COUNT,
    # random numbers
    "seed": _SEED,
    "data_seed": _SEED,
    # processes
    "dataloader_num_workers": Bounds(least=0, most=4096),
    "dataloader_prefetch_factor": Bounds(least=1, most=1024),
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
    "local_rank": Bounds(least=-1),
}
