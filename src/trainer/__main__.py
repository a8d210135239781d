"""In a checkout ``python -m trainer`` is ``python -m narrowgauge``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("narrowgauge", run_name="__main__", alter_sys=True)
