"""``python -m narrowgauge`` and ``torchrun -m narrowgauge``: compose the config, train."""

from narrowgauge import native
from narrowgauge.trainer.kernels import KERNELS
from narrowgauge.trainer.lifeline import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()
    native.begin(*KERNELS)  # compilers work while this process imports torch
    from narrowgauge.trainer.entry import leave, main

    leave(main())
