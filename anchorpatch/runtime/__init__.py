"""Devices, processes, checkpoints and progress: what every job runs on."""
