"""Many runs at once: jobs, launchers, schedulers of a cluster."""
