"""Upstream's own adapter, judged in release after release, each in a process of its own."""
