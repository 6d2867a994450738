"""What a training run would take, before anything is there to run it on: `moe plan`."""
