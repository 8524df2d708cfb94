"""Benchmarks: baseline and result in one run, JSON with hardware and versions out."""
